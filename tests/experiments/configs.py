"""A configuration of a run, where only the optimizer matters."""

from loft_jax.data import DataConfig
from tests.flat_config import flat_config


def config(**changes):
    flags = {"model": "", "data": DataConfig(""), "output": "", "max_grad_norm": 0, "eps": 1e-3}
    return flat_config(**{**flags, **changes})
