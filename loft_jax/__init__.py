"""LoFT in JAX: low-rank adaptation that behaves like full fine-tuning."""

from loft_jax.optim.links import alternate_factors, clip_by_projected_norm, project_gradients
from loft_jax.optim.loft import loft
from loft_jax.optim.moments import calibrate_moments, project_updates

__all__ = [
    "alternate_factors",
    "calibrate_moments",
    "clip_by_projected_norm",
    "loft",
    "project_gradients",
    "project_updates",
]
