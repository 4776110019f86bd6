"""The held-out examples of a run, and what a model does on them."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loft_jax.data import Batch, eval_batches, load_examples, tokenize
from loft_jax.evaluation.choices import bring_choices, check_choices, score_choices
from loft_jax.evaluation.perplexity import perplexity
from loft_jax.models import Llama
from loft_jax.training.config import FinetuneConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HeldOut:
    """Examples to measure a model on, as its configuration says."""

    def __init__(
        self,
        config: FinetuneConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        vocab_size: int | None = None,
        progress: bool,
    ) -> None:
        """Reads them.

        Args:
            config: Its evaluation is used, and the form of its data.
            tokenizer: Of the model.
            vocab_size: The tokens that the model has weights for; None if it is not at hand.
            progress: Show bars.

        Raises:
            InputError: They cannot be read, are not of the form of the data, or have a token that
                the model has no weights for.
        """
        self._tokenizer, self._progress = tokenizer, progress
        self._choices, self._batch_size = config.evaluation.choices, config.evaluation.batch_size
        self._data = dataclasses.replace(
            config.data, path=config.evaluation.path, split=config.evaluation.split
        )
        self._rows = load_examples(self._data)
        self._batches: Sequence[Batch] = ()
        if self._has_choices:
            check_choices(
                tokenizer, self._rows, self._data, choices=self._choices, vocab_size=vocab_size
            )
        else:
            tokens = tokenize(self._rows, tokenizer, self._data, vocab_size=vocab_size)
            self._batches = eval_batches(tokens, self._data, batch_size=self._batch_size)

    @property
    def count(self) -> int:
        """How many examples there are."""
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """What tells these examples from others, wherever their file lies: 32 digits."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self._rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def _has_choices(self) -> bool:
        return bool(self._choices) or bring_choices(self._rows)

    def measure(self, model: Llama) -> dict[str, float]:
        """The mean loss, in nats, and the accuracy if there are choices.

        Args:
            model: With its adapters.

        Returns:
            `loss` a token; or, with choices, `loss` of the right answer and `accuracy`, and where
            rows bring their own choices also `accuracy_norm`.
        """
        return self.measure_rows(model)[0]

    def measure_rows(self, model: Llama) -> tuple[dict[str, float], dict[str, tuple[bool, ...]]]:
        """As `measure`, and of each accuracy whether each row is right.

        Args:
            model: With its adapters.

        Returns:
            The measures, and by the names of the accuracies a truth value for each row.
        """
        if not self._has_choices:
            return {"loss": perplexity(model, self._batches, progress=self._progress).nll}, {}
        scores = score_choices(
            model,
            self._tokenizer,
            self._rows,
            self._data,
            choices=self._choices,
            batch_size=self._batch_size,
            progress=self._progress,
        )
        measured = {"loss": scores.nll, "accuracy": scores.accuracy}
        if self._choices:
            return measured, {"accuracy": scores.right}
        # Labels of every row are what they are; answers of a row differ in length.
        measured["accuracy_norm"] = scores.accuracy_norm
        return measured, {"accuracy": scores.right, "accuracy_norm": scores.right_norm}
