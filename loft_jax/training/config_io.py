"""Writes, reads, checks and compares the configurations of runs, in YAML."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from loft_jax.errors import InputError, cut, explained, shown
from loft_jax.files import read_text, replacing
from loft_jax.methods import METHODS, Method, methods_with
from loft_jax.settings import expected_of
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.field_names import meant_field

_MOST_BYTES = 2**18
_MOST_TOLD = 8  # unknown fields that a message names
_MOST_NODES = 10_000  # keys, values and lists of a file, with its aliases written out
_MOST_DEPTH = 20  # of lists and mappings in each other


def save_config(config: FinetuneConfig, path: str | os.PathLike[str]) -> None:
    """Writes a configuration as YAML.

    Args:
        config: Of a run.
        path: Of the file, which is replaced whole.

    Raises:
        OSError: It cannot be written.
    """
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields that a YAML file sets, checked by name and type.

    Args:
        path: Of the file.

    Returns:
        Those fields alone, in plain values.

    Raises:
        InputError: The file cannot be read, is not a mapping, sets an unknown field, or sets a
            field to a value of the wrong type.
    """
    text = read_text(Path(path), "settings in YAML", most_bytes=_MOST_BYTES)
    with explained(f"{path}: cannot be read as YAML"):
        try:
            fields = yaml.load(text, _Loader)
        except yaml.YAMLError as error:  # says over several lines what is wrong, and where
            raise ValueError(" ".join(str(error).split())) from None
    return checked_fields(fields, str(path))


class _Loader(yaml.SafeLoader):
    """Refuses a file of too many values or levels before any value is built.

    A few lines of nested aliases can stand for more values than any memory holds.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._size = self._depth = 0
        self._sizes: dict[int, int] = {}  # of every complete node, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias, before = self.check_event(yaml.AliasEvent), self._size
        self._size, self._depth = self._size + 1, self._depth + 1
        if self._size > _MOST_NODES or self._depth > _MOST_DEPTH:
            raise InputError(
                f"expected at most {_MOST_NODES} values, in {_MOST_DEPTH} levels at most"
            )
        node = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._sizes:
                raise InputError("a value holds itself, by an alias")
            self._size += self._sizes[id(node)]
        else:
            self._sizes[id(node)] = self._size - before
        self._depth -= 1
        return node


def checked_fields(fields: Any, where: str) -> dict[str, Any]:
    """Checks the fields of a configuration from an untrusted file by name and type.

    Args:
        fields: What was read.
        where: The file, for messages.

    Returns:
        The same fields, each with the type that it has in a `FinetuneConfig`.

    Raises:
        InputError: They are not a mapping, or a field is unknown or of the wrong type.
    """
    if not isinstance(fields, dict):
        raise InputError(f"{where}: holds a {type(fields).__name__}, expected fields and values")
    return _checked(FinetuneConfig, fields, f"{where}: ")


def config_from_dict(fields: dict[str, Any]) -> FinetuneConfig:
    """Builds a configuration from plain values.

    Args:
        fields: As `config_to_dict` gives them, or some of them.

    Returns:
        The configuration, with defaults for the others.

    Raises:
        InputError: A field that has no default is missing, or a value is out of its range.
    """
    for section in ("model", "data"):  # their defaults are for objects, which no file can hold
        if "path" not in fields.get(section, {}):
            raise InputError(f"field {section}.path is missing")
    return _made(FinetuneConfig, fields)


def config_to_dict(config: FinetuneConfig) -> dict[str, Any]:
    """Converts a configuration to plain values.

    Args:
        config: Of a run.

    Returns:
        Its fields as values that JSON and YAML can hold.
    """
    return _plain(dataclasses.asdict(config))


def settings_of_all(config: FinetuneConfig) -> dict[str, Any]:
    """Gives the settings that every process of a run must have, by dotted name.

    Args:
        config: Of the run.

    Returns:
        All but the places of models and examples, whose content is compared instead, the output
        folder, which may be mounted in other places, and what process 0 alone needs.
    """
    free = {*_may_change(FinetuneConfig, {"place"}), "output", "logging.wandb"}
    settings = dict(_flat(config_to_dict(config)))
    return {k: v for k, v in settings.items() if k not in free and not k.startswith("export.")}


def check_same_run(saved: dict[str, Any], now: dict[str, Any], *, same_content: bool) -> None:
    """Refuses to resume a run with settings that would have made it another run.

    The number of steps may change if the learning rate does not depend on it, with the schedule
    "constant".

    Args:
        saved: What the run was started with, from `config_to_dict`.
        now: What it is to be resumed with.
        same_content: Whether fingerprints will show that model and examples are the same; their
            paths may then differ.

    Raises:
        InputError: Names the first field that differs, with both values.
    """
    free = set(_may_change(FinetuneConfig, {"free", "place"} if same_content else {"free"}))
    was, became = dict(_flat(saved)), dict(_flat(now))
    for name in (*was, *became):
        section, _, _ = name.partition(".")
        if was.get(name) == became.get(name) or {section, name} & free:
            continue
        why = ""
        if name in _NUMBERS_OF_STEPS:
            shapes = was.get("schedule.shape"), became.get("schedule.shape")
            if shapes == ("constant", "constant"):
                continue
            trained = "--model" if was.get("method.name") == "full" else "--adapter"
            why = (
                f". The learning rates of a {shapes[0]} schedule depend on the number of steps; "
                f"expected a new run that goes on from this one ({trained} with the folder that it "
                "wrote), or the schedule constant from the start, which can be extended"
            )
        raise InputError(
            f"cannot resume with another {name}: the run was started with "
            f"{shown(was.get(name))}, now it is {shown(became.get(name))}{why}"
        )


_NUMBERS_OF_STEPS = ("schedule.steps", "schedule.epochs")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields by their dotted names."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _may_change(cls: Any, kinds: set[str], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of fields and sections that a resumed run may change."""
    hints = get_type_hints(cls)
    for known in dataclasses.fields(cls):
        name = f"{prefix}{known.name}"
        if known.metadata.get("resume") in kinds:
            yield name
        elif dataclasses.is_dataclass(hints[known.name]):
            yield from _may_change(hints[known.name], kinds, f"{name}.")
        if "place" in kinds:
            yield from (f"{name}.{place}" for place in known.metadata.get("places", ()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _checked(cls: Any, fields: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    if cls is Method:
        cls, settings = _method(fields, where)
        return {"name": cls.name, **_checked(cls, settings, where, prefix)}
    hints = get_type_hints(cls)
    known = sorted(each.name for each in dataclasses.fields(cls) if each.init)
    if unknown := [key for key in fields if key not in known]:
        told = []
        for key in unknown[:_MOST_TOLD]:
            name = cut(key) if isinstance(key, str) else shown(key)
            meant = meant_field(f"{prefix}{name}", dict(_names(FinetuneConfig)))
            told.append(f"{prefix}{name}" + (f" (did you mean {meant}?)" if meant else ""))
        many = "fields" if len(unknown) > 1 else "field"
        raise InputError(f"{where}unknown {many} {', '.join(told)}; expected some of {known}")
    checked = {}
    for key, value in fields.items():
        if not dataclasses.is_dataclass(hints[key]):
            checked[key] = _typed(hints[key], value, where=f"{where}field {prefix}{key}")
        elif isinstance(value, dict):
            checked[key] = _checked(hints[key], value, where, f"{prefix}{key}.")
        else:
            first = dataclasses.fields(hints[key])[0].name
            raise InputError(
                f"{where}field {prefix}{key} is {shown(value)}, expected a mapping such as "
                f"{first}: ..."
            )
    return checked


def _names(cls: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names of fields and of their flags, and for each the dotted name of the field."""
    hints = get_type_hints(cls, include_extras=True)
    for known in dataclasses.fields(cls):
        kind, *notes = (
            get_args(hint) if hasattr(hint := hints[known.name], "__metadata__") else [hint]
        )
        dotted = f"{prefix}{known.name}"
        if dataclasses.is_dataclass(kind):
            yield dotted, dotted
        if kind is Method:
            yield f"{dotted}.name", f"{dotted}.name"
            for method in METHODS.values():
                yield from _names(method, f"{dotted}.")
        elif dataclasses.is_dataclass(kind):
            yield from _names(kind, f"{dotted}.")
        else:
            yield dotted, dotted
            yield from ((note.name.replace("-", "_"), dotted) for note in notes if note.name)


def _method(fields: dict[str, Any], where: str = "") -> tuple[type[Method], dict[str, Any]]:
    """Gives the class of a method and its settings, from the fields of a file."""
    if "name" not in fields:
        raise InputError(f"{where}field method.name is missing")
    settings = dict(fields)
    name = settings.pop("name")
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(
            f"{where}field method.name is {shown(name)}, expected one of {list(METHODS)}"
        )
    for setting, value in settings.items():
        if (owners := methods_with(setting)) and name not in owners:
            raise InputError(
                f"{where}field method.{setting} is {shown(value)}, but only method "
                f"{' or '.join(owners)} has it"
            )
    return METHODS[name], settings


def _made(cls: Any, fields: dict[str, Any], prefix: str = "") -> Any:
    if cls is Method:
        cls, fields = _method(fields)
    values = dict(fields)
    for known in dataclasses.fields(cls):
        hint = get_type_hints(cls)[known.name]
        required = known.default is known.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(hint) and (required or known.name in values):
            values[known.name] = _made(hint, values.get(known.name, {}), f"{prefix}{known.name}.")
        elif required and known.name not in values:
            raise InputError(f"field {prefix}{known.name} is missing")
        elif isinstance(values.get(known.name), list):
            values[known.name] = tuple(values[known.name])
    return cls(**values)


_LARGEST = 2**32 - 1  # integer of any field: a seed


def _typed(hint: Any, value: Any, *, where: str) -> Any:
    """Converts a value from YAML to the type of its field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in inner:
            return value
    elif origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        lists = {kind for kind in inner if get_origin(kind) is tuple}
        fitting = lists if isinstance(value, list) and lists else {*inner} - lists - {NoneType}
        return _typed(fitting.pop(), value, where=where)
    elif origin is tuple:
        if isinstance(value, list):
            return [_typed(inner[0], v, where=f"{where}[{i}]") for i, v in enumerate(value)]
    elif origin is dict:
        if isinstance(value, dict):
            return {
                _typed(inner[0], k, where=f"{where}, key {shown(k)},"): _typed(
                    inner[1], v, where=f"{where}[{shown(k)}]"
                )
                for k, v in value.items()
            }
    else:
        if type(value) is int and hint is int and abs(value) > _LARGEST:
            limit = f"at most {_LARGEST}" if value > 0 else f"at least {-_LARGEST}"
            raise InputError(f"{where} is {shown(value)}, expected {limit}")
        if type(value) is hint:
            return value
        if hint is float and type(value) in (int, str):
            try:
                return float(value)  # YAML 1.1 reads 3e-4 as a text
            except (ValueError, OverflowError):
                pass
    raise InputError(f"{where} is {shown(value)}, expected {expected_of(hint)}")
