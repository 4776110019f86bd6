"""loft-jax evaluate."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.cli.source import Source
from loft_jax.data import DataConfig
from loft_jax.errors import InputError, shown
from loft_jax.models import Quantization
from loft_jax.training.config import TaskConfig

if TYPE_CHECKING:
    from loft_jax.models.family import Family, PretrainedConfig
    from loft_jax.tasks.task import Task


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on examples: the loss and the other metrics of its task.

    Prints one line of JSON: perplexity of a language model, accuracy of multiple choice and of
    classification, correlations of regression. A number that overflows, such as the perplexity of a
    loss of more than 700 nats, is null.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    data: DataConfig
    task: Annotated[TaskConfig, tyro.conf.arg(name="")] = field(default_factory=TaskConfig)
    """The task to evaluate."""
    choices: tuple[str, ...] = ()
    """Answers to compare on every example, for accuracy; examples may have their own instead."""
    batch_size: int = 16
    """Number of rows computed at once."""
    quantization: Quantization = "none"
    """Storage of the base model's kernels; use the same as in the training of the adapter."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.data import load_examples
        from loft_jax.hub import load_model_config
        from loft_jax.tasks.task import within

        if weights := self.task.class_weights:
            raise InputError(f"class_weights are {shown(weights)}, but evaluation has no weights")
        rows = load_examples(self.data.held_out())
        family, sizes = load_model_config(self.source.base)
        task = self._task(family, sizes, rows)
        model, tokenizer = self.source.load(
            head=task.head, labels=task.labels, quantization=self.quantization
        )
        measure = task.evaluation(
            rows,
            tokenizer,
            within(self.data, sizes),
            batch_size=self.batch_size,
            vocab_size=sizes.vocab_size,
        )
        measured = measure(model)
        if math.isnan(measured.values["loss"]):
            raise InputError(
                "the loss is NaN; expected finite weights, in the model and in the adapter"
            )
        report = measured.report.items()
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in report}))
        return 0

    def _task(self, family: "Family", sizes: "PretrainedConfig", rows: Any) -> "Task":
        """Gives the named task, or the one that fits, with the labels of the model or adapter."""
        from loft_jax.tasks.registry import find_task
        from loft_jax.tasks.task import Given

        adapter = self.source.adapter_head
        known = getattr(sizes, "labels", ()) if adapter is None else adapter[1]
        given = Given(
            self.data, rows, choices=self.choices, labels=self.task.label_names, known=known
        )
        return find_task(self.task.name, family, given).make(dataclasses.replace(given, rows=None))
