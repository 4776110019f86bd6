"""A model taken apart for training: what is trained, what counts, what stays."""

from typing import Any, NamedTuple

from flax import nnx

from loft_jax.models.family import PretrainedModel

Tree = Any


class ModelPartition(NamedTuple):
    """A model taken apart for training.

    Attributes:
        graphdef: Its structure.
        params: What is trained.
        streams: Counters of its random streams.
        frozen: All the rest: base weights, random keys.
    """

    graphdef: nnx.GraphDef[PretrainedModel]
    params: Tree
    streams: Tree
    frozen: Tree

    def merged(self, params: Tree, streams: Tree) -> PretrainedModel:
        """The model with other parameters and counters."""
        return nnx.merge(self.graphdef, params, streams, self.frozen, copy=True)


def split_model(model: PretrainedModel, trained: Any) -> ModelPartition:
    """Takes a model apart.

    Args:
        model: With its adapters, if there are any.
        trained: Kind of variable that is trained: `nnx.LoRAParam`, or `nnx.Param` for all.

    Returns:
        Its parts, as nested dicts of arrays.
    """
    graphdef, *states = nnx.split(model, trained, nnx.RngCount, ...)
    params, streams, frozen = map(nnx.to_pure_dict, states)
    return ModelPartition(graphdef, params, streams, frozen)
