"""loft-jax evaluate."""

import dataclasses
import json
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.cli.source import Source
from loft_jax.data import DataConfig
from loft_jax.errors import InputError, shown
from loft_jax.files import replacing
from loft_jax.models import Quantization
from loft_jax.training.config import TaskConfig

if TYPE_CHECKING:
    from loft_jax.evaluation import AnswerScores
    from loft_jax.models.family import Family, PretrainedConfig
    from loft_jax.tasks.task import Task

_log = logging.getLogger(__name__)

_SHOWN = 3  # number of predictions shown
_END = 80  # number of characters shown of a prompt


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on examples: the loss and the other metrics of its task.

    Prints one line of JSON: perplexity of a language model, accuracy of multiple choice and of
    classification, correlations of regression. A number that overflows, such as the perplexity of a
    loss of more than 700 nats, is null. With --generate, it has the accuracy of generated answers
    and the share of texts without one, and some of the texts are shown.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    data: DataConfig
    task: Annotated[TaskConfig, tyro.conf.arg(name="")] = field(default_factory=TaskConfig)
    """The task to evaluate."""
    choices: tuple[str, ...] = ()
    """Answers to compare on every example, for accuracy; examples may have their own instead."""
    generate: bool = False
    """Compare the answers that the model generates with the completions of the examples."""
    answer_pattern: str = ""
    """Regular expression of the answer in a text, or of a group in it; by default all of the text.
    GSM8K's: `#### ([-0-9.,]+)`."""
    max_new_tokens: int | None = None
    """Largest number of tokens to generate; by default 256."""
    predictions: str = ""
    """File to write what the model generates to, a line of JSON for each example."""
    batch_size: int = 16
    """Number of rows computed at once."""
    quantization: Quantization = "none"
    """Storage of the base model's kernels; use the same as in the training of the adapter."""

    def __call__(self) -> int:
        """Runs the command."""
        self._check()
        return self._generated() if self.generate else self._by_task()

    def _check(self) -> None:
        """Refuses flags that would not be used."""
        unused: dict[str, Any] = {
            "answer_pattern": self.answer_pattern,
            "max_new_tokens": self.max_new_tokens,
            "predictions": self.predictions,
        }
        if self.generate:
            name = "" if self.task.name in ("auto", "causal-lm") else self.task.name
            unused = {
                "choices": self.choices,
                "label_names": self.task.label_names,
                "class_weights": self.task.class_weights,
                "task": name,
            }
        for name, value in unused.items():
            if value not in ("", (), None):
                given = "not used with --generate" if self.generate else "used with --generate only"
                raise InputError(f"{name} is {shown(value)}, which is {given}")

    def _generated(self) -> int:
        from loft_jax.data import load_examples
        from loft_jax.evaluation import generated_answers
        from loft_jax.hub import load_model_config, load_tokenizer
        from loft_jax.tasks.task import within

        rows = load_examples(self.data.held_out())
        sizes = load_model_config(self.source.base)[1]
        evaluate = generated_answers(
            rows,
            load_tokenizer(self.source.base),
            within(self.data, sizes),
            answer_pattern=self.answer_pattern,
            max_new_tokens=256 if self.max_new_tokens is None else self.max_new_tokens,
            batch_size=self.batch_size,
            vocab_size=sizes.vocab_size,
        )
        with replacing(self.predictions) if self.predictions else nullcontext() as partial:
            model, _ = self.source.load(quantization=self.quantization)
            scores = evaluate(model)
            if partial is not None:
                _write(scores, partial)
        _show(scores)
        print(json.dumps({k: getattr(scores, k) for k in ("accuracy", "unanswered", "count")}))
        return 0

    def _by_task(self) -> int:
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


def _write(scores: "AnswerScores", path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for one in scores.predictions:
            row = {**dataclasses.asdict(one), "right": one.right}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _show(scores: "AnswerScores") -> None:
    for one in scores.predictions[:_SHOWN]:
        _log.info(
            "prompt: ...%s\n  text: %s\n  answer: %s, expected: %s",
            *map(shown, (one.prompt[-_END:], one.text, one.answer, one.expected)),
        )
