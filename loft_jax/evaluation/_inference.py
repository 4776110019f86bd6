"""A model as what a jitted function takes, in evaluation mode."""

import jax
from flax import nnx

from loft_jax.models.loss import Arrays


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


def batch_logits(graphdef: nnx.GraphDef, state: nnx.State, batch: Arrays) -> jax.Array:
    """Logits (b, t, vocab) of a batch of rows, which may be padded or packed."""
    model = nnx.merge(graphdef, state)
    return model(batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
