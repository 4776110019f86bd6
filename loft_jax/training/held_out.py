"""The held-out examples of a run, and what a model does on them."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from loft_jax.data import DataConfig
from loft_jax.tasks.task import Measured, Task
from loft_jax.training.config import FinetuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def held_out_data(config: FinetuneConfig) -> DataConfig:
    """Where the held-out examples of a run are, in the form of its training examples."""
    evaluation = config.evaluation
    return dataclasses.replace(config.data, path=evaluation.path, split=evaluation.split)


class HeldOut:
    """Examples to measure a model on."""

    def __init__(
        self,
        task: Task,
        rows: Any,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        batch_size: int,
        vocab_size: int | None = None,
        progress: bool,
    ) -> None:
        """Prepares them.

        Args:
            task: Of the run.
            rows: As `load_examples` gives them.
            tokenizer: Of the model.
            data: Names of fields, and `max_length`.
            batch_size: Rows computed at once.
            vocab_size: The tokens that the model has weights for; None if it is not at hand.
            progress: Show bars.

        Raises:
            InputError: They are not of the task, or have a token that the model has no weights for.
        """
        self._rows = rows
        self._evaluate = task.evaluation(
            rows, tokenizer, data, batch_size=batch_size, vocab_size=vocab_size, progress=progress
        )

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """What tells these examples from others, wherever their file lies: 32 digits."""
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(self._rows)):
            row = dict(self._rows[index])
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def measure(self, model: Any) -> Measured:
        """What the task says of a model on these examples.

        Args:
            model: With its adapters.

        Returns:
            The loss, and what else the task measures.
        """
        return self._evaluate(model)
