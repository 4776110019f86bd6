"""Splits models for jitted functions, in evaluation mode."""

from typing import Any

from flax import nnx


def inference_state(model: nnx.Module) -> tuple[nnx.GraphDef[Any], nnx.State[Any, Any]]:
    """Splits a model in evaluation mode, without changing the model itself.

    Args:
        model: Any NNX model.

    Returns:
        Its structure, and its arrays, which are shared with the model. The structure is hashable,
        so that a jitted function with it as a static argument compiles once for equal models.
    """
    silent = nnx.merge(*nnx.split(model))
    silent.eval()
    return nnx.split(silent)
