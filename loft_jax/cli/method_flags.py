"""Methods as flags: `--method`, and a flag for each setting of any method."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_type_hints

import docstring_parser
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from loft_jax.errors import InputError, shown
from loft_jax.methods import METHODS, Method, methods_with, settings_of

METHOD_FLAGS = ConstructorRegistry()
"""Registry with which `tyro.cli` reads fields of type `Method` and `tuple[Method, ...]`."""

_NAMES: Any = Literal.__getitem__(tuple(METHODS))

_DESCRIPTION = "\n\n".join(
    f'"{name}": {(cls.__doc__ or "").splitlines()[0]}' for name, cls in METHODS.items()
)


@METHOD_FLAGS.struct_rule
def _one_method(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not (isinstance(info.type, type) and issubclass(info.type, Method)):
        return None
    named = StructFieldSpec("method", _NAMES, info.default.name, _DESCRIPTION)
    return StructConstructorSpec(
        lambda method, **settings: make_methods([method], settings)[0],
        (named, *_settings([info.default])),
    )


@METHOD_FLAGS.struct_rule
def _several_methods(info: StructTypeInfo) -> StructConstructorSpec | None:
    if get_args(info.type) != (Method, ...):
        return None
    names = tuple(method.name for method in info.default)
    named = StructFieldSpec(
        "method", tuple[_NAMES, ...], names, f"Methods to compare.\n\n{_DESCRIPTION}"
    )
    return StructConstructorSpec(
        lambda method, **settings: tuple(make_methods(method, settings)),
        (named, *_settings(info.default)),
    )


def _settings(methods: Sequence[Method]) -> list[StructFieldSpec]:
    """The settings of all methods; those that some are given with have their values by default."""
    specs = {}
    given = {name: value for method in methods for name, value in vars(method).items()}
    for cls in METHODS.values():
        hints = get_type_hints(cls, include_extras=True)
        described = {
            p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params
        }
        for name, default in settings_of(cls).items():
            if name not in specs:
                value = given.get(name, default)
                specs[name] = StructFieldSpec(name, hints[name], value, described.get(name))
    return list(specs.values())


def make_methods(names: Iterable[str], settings: Mapping[str, Any]) -> Sequence[Method]:
    """Makes methods from the settings of all of them.

    Args:
        names: Names of the methods.
        settings: Settings by name. Those with their default value may belong to other methods.

    Returns:
        The methods, each with its own settings.

    Raises:
        InputError: A method is unknown, or none of them has a setting.

    Example:
        >>> make_methods(["loft", "lora"], {"move": "alternate"})[0].move
        'alternate'
        >>> make_methods(["lora"], {"move": "alternate"})
        Traceback (most recent call last):
        loft_jax.errors.InputError: move is 'alternate', but only method loft or loft-muon has it
    """
    names = list(names)
    for name in names:
        if name not in METHODS:
            raise InputError(f"method is {shown(name)}, expected one of {', '.join(METHODS)}")
    for setting, value in settings.items():
        owners = methods_with(setting)
        if not set(owners) & set(names) and value != settings_of(METHODS[owners[0]])[setting]:
            raise InputError(
                f"{setting} is {shown(value)}, but only method {' or '.join(owners)} has it"
            )
    return [
        METHODS[name](**{k: v for k, v in settings.items() if k in settings_of(METHODS[name])})
        for name in names
    ]
