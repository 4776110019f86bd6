"""The optimizers that are measured, by name."""

from typing import Any, Literal

import jax.numpy as jnp
import optax

import loft_jax
from benchmarks.optimizer.dense_loft import dense_loft

Contestant = Literal[
    "adamw",
    "loft",
    "loft-factored",
    "loft-alternate",
    "loft-alternate-factored",
    "loft-fused",
    "loft-alternate-fused",
    "loft-balanced",
    "loft-bf16",
    "loft-diagonal",
    "loft-muon",
    "dense",
    "dense-einsum",
]

DENSE: tuple[Contestant, ...] = ("dense", "dense-einsum")
"""Contestants that hold the full matrices."""

REFERENCES: tuple[Contestant, ...] = ("adamw", *DENSE)
"""Contestants that the others are compared with."""

_RATE, _CLIP = 1e-3, 1.0


def make_optimizer(name: Contestant) -> optax.GradientTransformation:
    """A contestant by its name, clipping by the global norm of its gradients.

    Args:
        name: "adamw" is Optax's on the factors, "dense" the paper's formulas as written,
            "dense-einsum" these with the second moment's product in the order of least work, the
            others are `loft_jax.loft` by its second moment and its move ("loft" is the exact
            moment in float32, along the tangent space; "fused" makes its direction by a kernel),
            the exact one with balanced factors, and `loft_jax.loft_muon`.

    Returns:
        The transformation.
    """
    if name == "adamw":
        return optax.chain(optax.clip_by_global_norm(_CLIP), optax.adamw(_RATE, weight_decay=0.0))
    if name in DENSE:
        return dense_loft(_RATE, max_grad_norm=_CLIP, from_the_left=name == "dense")
    if name == "loft-muon":
        return loft_jax.loft_muon(_RATE, max_grad_norm=_CLIP)
    settings: dict[str, dict[str, Any]] = {
        "loft": {},
        "loft-factored": {"second_moment": "factored"},
        "loft-alternate": {"move": "alternate"},
        "loft-alternate-factored": {"second_moment": "factored", "move": "alternate"},
        "loft-fused": {"fused": True},
        "loft-alternate-fused": {"fused": True, "move": "alternate"},
        "loft-balanced": {"balance": True},
        "loft-bf16": {"state_dtype": jnp.bfloat16},
        "loft-diagonal": {"second_moment": "diagonal"},
    }
    return loft_jax.loft(_RATE, max_grad_norm=_CLIP, **{"second_moment": "full", **settings[name]})
