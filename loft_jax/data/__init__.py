"""Data: files or a hub id to examples, tokens, batches, and a resumable stream."""

from loft_jax.data.batches import Batch
from loft_jax.data.config import DataConfig
from loft_jax.data.encode import Example, TokenizedData, tokenize
from loft_jax.data.source import load_examples
from loft_jax.data.stream import EvalBatches, TrainStream, eval_batches, train_stream

__all__ = [
    "Batch",
    "DataConfig",
    "EvalBatches",
    "Example",
    "TokenizedData",
    "TrainStream",
    "eval_batches",
    "load_examples",
    "tokenize",
    "train_stream",
]
