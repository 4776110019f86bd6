"""loft-jax evaluate."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from loft_jax.cli.source import Source
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.models import Quantization


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on examples: loss and perplexity, or accuracy among given answers.

    Prints one line of JSON. What is too large for a number, as the perplexity of a loss of more
    than 700 nats, is null.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    data: DataConfig
    choices: tuple[str, ...] = ()
    """Answers to compare on every example, for accuracy; an example may bring its own instead."""
    batch_size: int = 16
    """Rows computed at once."""
    quantization: Quantization = "none"
    """What the base model's kernels are stored in; an adapter goes with what it was trained on."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.data import eval_batches, load_examples, tokenize
        from loft_jax.evaluation.choices import bring_choices, score_choices
        from loft_jax.evaluation.perplexity import perplexity

        rows = load_examples(self.data)
        model, tokenizer = self.source.load(quantization=self.quantization)
        if self.choices or bring_choices(rows):
            scores = score_choices(
                model, tokenizer, rows, self.data, choices=self.choices, batch_size=self.batch_size
            )
            names = ("accuracy", "accuracy_norm", "nll", "count")
            found = {name: getattr(scores, name) for name in names}
        else:
            data = tokenize(rows, tokenizer, self.data, vocab_size=model.config.vocab_size)
            batches = eval_batches(data, self.data, batch_size=self.batch_size)
            measured = perplexity(model, batches)
            found = {**dataclasses.asdict(measured), "perplexity": measured.perplexity}
        if math.isnan(found["nll"]):
            raise InputError(
                "the loss is no number; expected finite weights, in the model and in the adapter"
            )
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in found.items()}))
        return 0
