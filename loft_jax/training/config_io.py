"""Configurations of runs in YAML files: written, read, checked, and compared at resume."""

import dataclasses
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from loft_jax.errors import InputError
from loft_jax.training.config import FinetuneConfig

# A resumed run may change these: they do not change what is learned.
_FREE_ON_RESUME = {
    "output", "log_every", "save_every", "keep_last", "keep_best", "mesh", "remat",
    "offload_optimizer", "max_skipped_steps", "profile_steps", "wandb", "eval_batch_size",
}  # fmt: skip


def save_config(config: FinetuneConfig, path: str | os.PathLike[str]) -> None:
    """Writes a configuration as YAML."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields that a YAML file sets, checked by name and type.

    Raises:
        InputError: The file cannot be read, is no mapping, sets an unknown field, or sets a field
            to a value of another type than its own.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds a {type(fields).__name__}, expected fields and values")
    return _checked(FinetuneConfig, fields, f"{path}: ")


def config_from_dict(fields: dict[str, Any]) -> FinetuneConfig:
    """Makes a configuration of plain values, as `config_to_dict` gives them.

    Raises:
        InputError: A field that has no default is missing, or a value is out of its range.
    """
    return _made(FinetuneConfig, fields)


def config_to_dict(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration in plain values, as JSON and YAML hold them."""
    return _plain(dataclasses.asdict(config))


def check_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with a run under settings that would have made it another one.

    Raises:
        InputError: Names the first field that differs, with both values.
    """
    for name in sorted(saved.keys() | now.keys()):
        if name in _FREE_ON_RESUME or saved.get(name) == now.get(name):
            continue
        was, became = saved.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(became, dict):
            keys = was.keys() | became.keys()
            inner = next(key for key in sorted(keys) if was.get(key) != became.get(key))
            name, was, became = f"{name}.{inner}", was.get(inner), became.get(inner)
        raise InputError(
            f"cannot resume with another {name}: the run was started with {was!r}, now it is "
            f"{became!r}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _checked(cls: Any, fields: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    hints = get_type_hints(cls)
    if unknown := sorted(set(map(str, fields)) - hints.keys()):
        raise InputError(
            f"{where}unknown field {prefix}{unknown[0]}; expected some of {sorted(hints)}"
        )
    checked = {}
    for key, value in fields.items():
        if not dataclasses.is_dataclass(hints[key]):
            checked[key] = _typed(hints[key], value, where=f"{where}field {prefix}{key}")
        elif isinstance(value, dict):
            checked[key] = _checked(hints[key], value, where, f"{prefix}{key}.")
        else:
            first = dataclasses.fields(hints[key])[0].name
            raise InputError(
                f"{where}field {prefix}{key} is {value!r}, expected a mapping such as {first}: ..."
            )
    return checked


def _made(cls: Any, fields: dict[str, Any], prefix: str = "") -> Any:
    values = dict(fields)
    for known in dataclasses.fields(cls):
        hint = get_type_hints(cls)[known.name]
        required = known.default is known.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(hint) and (required or known.name in values):
            values[known.name] = _made(hint, values.get(known.name, {}), f"{prefix}{known.name}.")
        elif required and known.name not in values:
            raise InputError(f"field {prefix}{known.name} is missing")
        elif get_origin(hint) is tuple and known.name in values:
            values[known.name] = tuple(values[known.name])
    return cls(**values)


_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _typed(hint: Any, value: Any, *, where: str) -> Any:
    """A value that YAML gave, as the type hint of its field has it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in inner:
            return value
        expected = f"one of {list(inner)}"
    elif origin is UnionType:  # of a plain type and None
        (plain,) = set(inner) - {NoneType}
        return None if value is None else _typed(plain, value, where=where)
    elif origin is tuple:
        if isinstance(value, list):
            return [_typed(inner[0], v, where=f"{where}[{i}]") for i, v in enumerate(value)]
        expected = "a list"
    elif origin is dict:
        if isinstance(value, dict):
            return {
                _typed(inner[0], k, where=f"{where}, key {k!r},"): _typed(
                    inner[1], v, where=f"{where}[{k!r}]"
                )
                for k, v in value.items()
            }
        expected = "a mapping"
    else:
        if type(value) is hint:
            return value
        if hint is float and type(value) in (int, str):
            try:
                return float(value)  # YAML 1.1 reads 3e-4 as a text
            except ValueError:
                pass
        expected = _EXPECTED[hint]
    raise InputError(f"{where} is {value!r}, expected {expected}")
