"""The families that the library has, one line each."""

from collections.abc import Mapping

from loft_jax.errors import InputError, shown
from loft_jax.models import (
    bert,
    deberta,
    dinov2,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
    roberta,
    vit,
)
from loft_jax.models.family import Family, PretrainedConfig

_FAMILIES = (
    bert.FAMILY,
    deberta.FAMILY,
    dinov2.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gpt2.FAMILY,
    llama.FAMILY,
    mistral.FAMILY,
    phi3.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    roberta.FAMILY,
    vit.FAMILY,
)

# Known by name to say why they are refused.
_MIXTURES_OF_EXPERTS = ("mixtral", "phimoe", "qwen2_moe", "qwen3_moe")

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _FAMILIES}
"""Families by Hugging Face's `model_type`."""

WELL_KNOWN: Mapping[str, tuple[Family, PretrainedConfig]] = {
    name: (family, config) for family in _FAMILIES for name, config in family.sizes.items()
}
"""Families and configurations of well-known models, by name."""


def family_of(model_type: object) -> Family:
    """Finds the family of a `model_type`.

    Args:
        model_type: The value in a `config.json`.

    Returns:
        The family.

    Raises:
        InputError: There is no such family; the message lists the known ones.

    Example:
        >>> family_of("transformer-xl")
        Traceback (most recent call last):
        loft_jax.errors.InputError: config: model_type is 'transformer-xl', expected one of ...
    """
    if model_type in _MIXTURES_OF_EXPERTS:
        raise InputError(
            f"config: model_type is {shown(model_type)}, a mixture of experts, which is not "
            f"supported; expected one of {', '.join(FAMILIES)}"
        )
    if isinstance(model_type, str) and (text := f"{model_type}_text") in FAMILIES:
        raise InputError(
            f"config: model_type is {shown(model_type)}, only its text model, {text!r}, is "
            "supported"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"config: model_type is {shown(model_type)}, expected one of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def gguf_family(architecture: object) -> Family:
    """Finds the family of a GGUF file.

    Args:
        architecture: The value in the file.

    Returns:
        The family.

    Raises:
        InputError: GGUF files of that architecture are not supported.
    """
    readable = {f.gguf.architecture: f for f in _FAMILIES if f.gguf is not None}
    if not isinstance(architecture, str) or architecture not in readable:
        raise InputError(
            f"architecture is {shown(architecture)}, expected one of {', '.join(readable)}"
        )
    return readable[architecture]
