"""Methods as flags: `--method`, and a flag for each setting that any of them has."""

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_type_hints

import docstring_parser
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from loft_jax.methods import METHODS, Method, make_methods, settings_of

METHOD_FLAGS = ConstructorRegistry()
"""Makes `tyro.cli` read fields of type `Method` and `tuple[Method, ...]`."""

_NAMES: Any = Literal.__getitem__(tuple(METHODS))

_TOLD = " ".join(
    f'"{name}": {(cls.__doc__ or "").splitlines()[0]}' for name, cls in METHODS.items()
)


@METHOD_FLAGS.struct_rule
def _one_method(info: StructTypeInfo) -> StructConstructorSpec | None:
    if not (isinstance(info.type, type) and issubclass(info.type, Method)):
        return None
    named = StructFieldSpec("method", _NAMES, info.default.name, _TOLD)
    return StructConstructorSpec(
        lambda method, **settings: make_methods([method], settings)[0],
        (named, *_settings([info.default])),
    )


@METHOD_FLAGS.struct_rule
def _several_methods(info: StructTypeInfo) -> StructConstructorSpec | None:
    if get_args(info.type) != (Method, ...):
        return None
    names = tuple(method.name for method in info.default)
    named = StructFieldSpec("method", tuple[_NAMES, ...], names, f"Methods to compare. {_TOLD}")
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
        told = {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
        for name, default in settings_of(cls).items():
            if name not in specs:
                value = given.get(name, default)
                specs[name] = StructFieldSpec(name, hints[name], value, told.get(name))
    return list(specs.values())
