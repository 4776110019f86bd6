"""Presets: published data sets that are read, trained on and judged by their name."""

from loft_jax.data.presets.preset import Preset
from loft_jax.data.presets.registry import PRESETS, PresetName, find_preset

__all__ = ["PRESETS", "Preset", "PresetName", "find_preset"]
