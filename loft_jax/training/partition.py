"""Partitions a model for training: trained parameters, counters, frozen arrays."""

from typing import Any, NamedTuple

from flax import nnx

Tree = Any


class ModelPartition(NamedTuple):
    """A model partitioned for training.

    Attributes:
        graphdef: The structure of the model.
        params: Trained parameters.
        streams: Counters of its random streams.
        frozen: All other arrays: base weights and random keys.
    """

    graphdef: nnx.GraphDef[Any]
    params: Tree
    streams: Tree
    frozen: Tree

    def merged(self, params: Tree, streams: Tree) -> Any:
        """Builds the model with the given parameters and counters."""
        return nnx.merge(self.graphdef, params, streams, self.frozen, copy=True)


def split_model(model: nnx.Module, trained: Any) -> ModelPartition:
    """Partitions a model.

    Args:
        model: With its adapters, if there are any.
        trained: NNX's filter of the variables that are trained, from `trained_variables`.

    Returns:
        The partition, with nested dicts of arrays.
    """
    graphdef, *states = nnx.split(model, trained, nnx.RngCount, ...)
    params, streams, frozen = map(nnx.to_pure_dict, states)
    return ModelPartition(graphdef, params, streams, frozen)
