"""Checks of the values in a model's configuration, common to all families."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from loft_jax.errors import InputError, shown

# Far above the sizes of any model: larger ones are damage, or meant to exhaust memory.
MOST_TOKENS = 2**24
MOST_HIDDEN = 2**20
MOST_FEATURES = 2**22  # of an MLP
MOST_HEAD_DIM = 2**16
MOST_LAYERS = 2**13
MOST_HEADS = 2**14
MOST_POSITIONS = 2**31
MOST_PIXELS = 2**14  # of a side of an image

FULL, SLIDING = LAYER_TYPES = ("full_attention", "sliding_attention")

_MOST_NUMBER = 3e38  # of float32, in which it is computed


def is_positive(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a positive number that float32 holds."""
    return type(value) in (int, float) and 0 < value <= _MOST_NUMBER


def required(config: Mapping[str, Any], name: str) -> int:
    """Reads a size that a `config.json` must have.

    Raises:
        InputError: It is missing, or not a positive integer.
    """
    if config.get(name) is None:
        raise InputError(f"config: {name} is missing")
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config: {name} is {shown(value)}, expected an integer of 1 or more")
    return value


def tokens(value: Any) -> Any:
    """Converts tokens for a configuration: several become a tuple."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


def check_values(
    config: Any,
    *,
    sizes: Mapping[str, int],
    positive: Iterable[str] = (),
    rates: Iterable[str] = (),
    flags: Iterable[str] = (),
) -> None:
    """Checks fields of a configuration, including those of special tokens.

    Args:
        config: A dataclass.
        sizes: Names of integers, with the largest value of each.
        positive: Names of positive numbers.
        rates: Names of numbers in [0, 1).
        flags: Names of booleans.

    Raises:
        InputError: A field is wrong; the message names it.
    """
    for name, most in sizes.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(
                f"config: {name} is {shown(value)}, expected an integer from 1 to {most}"
            )
    for name in positive:
        if not is_positive(value := getattr(config, name)):
            raise InputError(f"config: {name} is {shown(value)}, expected a positive number")
    for name in rates:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(f"config: {name} is {shown(value)}, expected a number in [0, 1)")
    for name in flags:
        if not isinstance(value := getattr(config, name), bool):
            raise InputError(f"config: {name} is {shown(value)}, expected true or false")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)  # a model of images has no tokens
        several = value if isinstance(value, tuple) and name == "eos_token_id" else (value,)
        if not all(token is None or type(token) is int for token in several):
            raise InputError(f"config: {name} is {shown(value)}, expected a token's number")


def check_multiple(config: Any, name: str, divisor: str) -> None:
    """Checks that a field is a multiple of another.

    Raises:
        InputError: It is not.
    """
    value, by = getattr(config, name), getattr(config, divisor)
    if value % by:
        raise InputError(f"config: {name} is {value}, expected a multiple of {divisor} ({by})")


def check_one_of(config: Any, name: str, known: Collection[str]) -> None:
    """Checks that a field is one of some names.

    Raises:
        InputError: It is not.
    """
    if (value := getattr(config, name)) not in tuple(known):
        raise InputError(
            f"config: {name} is {shown(value)}, expected one of {', '.join(map(repr, known))}"
        )


def layer_types(types: Any, count: int) -> tuple[str, ...]:
    """Checks the types of the layers of a model in which some have a window.

    Args:
        types: `layer_types` of a configuration.
        count: Number of layers.

    Returns:
        The types, each one of `LAYER_TYPES`.

    Raises:
        InputError: They are not a list of that many, or one is another type.
    """
    if not isinstance(types, (list, tuple)) or len(types) != count:
        raise InputError(
            f"config: layer_types is {shown(types)}, expected a list of {count}, the number of "
            "layers"
        )
    for layer, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise InputError(
                f"config: layer_types has {shown(kind)} for layer {layer}, only "
                f"{' and '.join(map(repr, LAYER_TYPES))} are supported"
            )
    return tuple(types)


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Reads the labels of a `config.json`, in the order of the logits.

    Args:
        config: Its contents: `id2label`, or else `num_labels`, which is 2 by default.

    Returns:
        Their names.

    Raises:
        InputError: `id2label` does not name the labels from 0.
    """
    kind = config.get("problem_type")
    if kind not in (None, "regression", "single_label_classification"):
        raise InputError(
            f"config: problem_type is {shown(kind)}, expected 'regression' or "
            "'single_label_classification'"
        )
    names = config.get("id2label")
    if names is None:
        count = config.get("num_labels", 2)
        if type(count) is not int or not 1 <= count <= _MOST_LABELS:
            raise InputError(f"config: num_labels is {shown(count)}, expected 1 to {_MOST_LABELS}")
        return tuple(f"LABEL_{number}" for number in range(count))
    if not isinstance(names, Mapping) or not 1 <= len(names) <= _MOST_LABELS:
        raise InputError(f"config: id2label is {shown(names)}, expected names by number")
    by_number = {str(number): name for number, name in names.items()}
    found = [by_number.get(str(number)) for number in range(len(names))]
    if not all(isinstance(name, str) for name in found) or len(set(found)) < len(found):
        raise InputError(
            f"config: id2label is {shown(names)}, expected another name for each number from 0 on"
        )
    return tuple(str(name) for name in found)


_MOST_LABELS = 2**16


def labels_to_hf(names: Sequence[str]) -> dict[str, Any]:
    """Makes the fields of a `config.json` for labels.

    Args:
        names: Names of the labels; a single one is for regression.

    Returns:
        Fields as transformers reads them.
    """
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "problem_type": "regression" if len(names) == 1 else "single_label_classification",
    }
