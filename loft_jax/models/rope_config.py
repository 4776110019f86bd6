"""Reads rotary settings from a `config.json`, and writes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from loft_jax.errors import InputError, cut, shown
from loft_jax.models.config_checks import is_positive
from loft_jax.models.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

_KINDS: Mapping[Any, type[RopeScaling]] = {
    kind.rope_type: kind
    for kind in (LinearScaling, Llama3Scaling, DynamicScaling, YarnScaling, LongRopeScaling)
}


def read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Reads base and scaling from a `config.json`, in either of the two formats.

    Args:
        config: Its contents.

    Returns:
        The base of the frequencies, and their scaling.

    Raises:
        InputError: The kind of scaling is not supported, or a value is out of its range.
    """
    both = [key for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    if len(both) > 1 and config[both[0]] != config[both[1]]:
        raise InputError("config: rope_scaling and rope_parameters differ, expected one of them")
    key = both[0] if both else "rope_scaling"
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise InputError(f"config: {key} is {shown(found)}, expected a mapping")
    rope = dict(found)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise InputError(
            f"config: {key}.{cut(nested[0])} is an object, expected a number or a name"
        )
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    if not is_positive(theta):
        raise InputError(f"config: rope_theta is {shown(theta)}, expected a positive number")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"config: {key}.partial_rotary_factor is set, only 1.0 is supported")
    legacy_type = rope.pop("type", "default")
    rope_type = rope.pop("rope_type", legacy_type)
    if rope_type == "default":
        return float(theta), None
    if not isinstance(rope_type, str) or rope_type not in _KINDS:
        raise InputError(
            f"config: {key}.rope_type is {shown(rope_type)}, only "
            f"{', '.join(map(repr, ['default', *_KINDS]))} are supported"
        )
    kind = _KINDS[rope_type]
    length = config.get("max_position_embeddings")
    rope["max_position_embeddings"] = 2048 if length is None else length
    # transformers too prefers the model's own field to that of the scaling.
    original = config.get("original_max_position_embeddings")
    if original is not None:
        rope["original_max_position_embeddings"] = original
    rope.setdefault("original_max_position_embeddings", rope["max_position_embeddings"])
    if "truncate" in rope and rope["truncate"] is None:
        rope["truncate"] = False  # to transformers, null is not the default here
    values = {}
    for field in dataclasses.fields(kind):
        if rope.get(field.name) is not None or field.default is dataclasses.MISSING:
            values[field.name] = _checked(key, field.name, rope.get(field.name))
    return float(theta), kind(**values)


def rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Gives the value of `rope_scaling` in a `config.json`, the key that every release reads.

    Args:
        scaling: A scaling, or None.

    Returns:
        Its fields that are set, without `max_position_embeddings`, which the model has.
    """
    if scaling is None:
        return None
    fields = {}
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if field.name != "max_position_embeddings" and value not in (None, field.default):
            fields[field.name] = list(value) if isinstance(value, tuple) else value
    return {"rope_type": scaling.rope_type, **fields}


def _checked(key: str, name: str, value: Any) -> Any:
    """Checks the value of a field of a scaling."""
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, (list, tuple)) or not all(map(is_positive, value)):
            raise InputError(
                f"config: {key}.{name} is {shown(value)}, expected a list of positive numbers"
            )
        return tuple(map(float, value))
    if name == "truncate":
        if not isinstance(value, bool):
            raise InputError(f"config: {key}.{name} is {shown(value)}, expected true or false")
    elif not is_positive(value):
        where = name if name == "max_position_embeddings" else f"{key}.{name}"
        raise InputError(f"config: {where} is {shown(value)}, expected a positive number")
    return value
