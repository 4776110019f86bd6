"""A model as what a jitted function takes, in evaluation mode."""

from flax import nnx


def inference_state(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without dropout, split; the model given is left as it is.

    Args:
        model: Any NNX model.

    Returns:
        Its structure, hashable, so that a jitted function which takes it as static compiles once
        for equal models, and its arrays, shared with the model.
    """
    silent = nnx.merge(*nnx.split(model))
    silent.eval()
    return nnx.split(silent)
