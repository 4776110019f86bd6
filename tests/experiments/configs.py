"""A configuration of a run, where only the optimizer matters."""

from loft_jax.data import DataConfig
from loft_jax.training.config import FinetuneConfig


def config(**changes):
    return FinetuneConfig("", DataConfig(""), "", **{"max_grad_norm": 0, "eps": 1e-3, **changes})
