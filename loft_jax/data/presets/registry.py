"""The presets that the library has, by name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from loft_jax.data.presets.commonsense import COMMONSENSE
from loft_jax.data.presets.glue import GLUE
from loft_jax.data.presets.preset import Preset
from loft_jax.errors import InputError, shown

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (*GLUE, *COMMONSENSE)}
"""By name."""

if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = Literal[tuple(PRESETS)]
    """The name of a preset."""


def find_preset(name: PresetName) -> Preset:
    """Finds a preset by its name.

    Args:
        name: Of the preset.

    Returns:
        The preset.

    Raises:
        InputError: There is none of that name.

    Example:
        >>> find_preset("rte").labels
        ('entailment', 'not_entailment')
    """
    if name not in PRESETS:
        raise InputError(f"preset is {shown(name)}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]
