"""loft-jax evaluate."""

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.cli.source import Source
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
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

        rows = load_examples(self.data)
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
        """Gives the named task, or the one inferred from the rows and the adapter."""
        from loft_jax.tasks.registry import infer_task, make_task

        given: dict[str, Any] = {"choices": self.choices, "labels": self.task.labels}
        name = self.task.name
        named = getattr(sizes, "labels", ())
        count = len(named)
        if self.source.adapter_head is not None:
            _, count, named = self.source.adapter_head
        if name == "auto":
            name = infer_task(family, rows, None, self.data, **given)
            if name == "classification" and count == 1:
                name = "regression"
        if name == "classification" and not self.task.labels:
            given["labels"] = named or self._numbers(rows, count)
        return make_task(name, rows, self.data, **given)

    def _numbers(self, rows: Any, count: int) -> tuple[str, ...]:
        """The labels of an adapter that has no names for them, whose rows have their numbers."""
        field = self.data.label_field
        if not all(isinstance(rows[index].get(field), int) for index in range(len(rows))):
            raise InputError(
                f"{self.source.adapter}: has {count} labels and no names for them, and field "
                f"{field!r} of the rows holds other than numbers; expected labels"
            )
        return tuple(map(str, range(count)))
