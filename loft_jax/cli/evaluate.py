"""loft-jax evaluate."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.cli.source import Source
from loft_jax.data import DataConfig, load_examples
from loft_jax.data.presets import find_preset
from loft_jax.errors import InputError, shown
from loft_jax.files import replacing
from loft_jax.models import Quantization
from loft_jax.models.family import Family, PretrainedConfig
from loft_jax.tasks import Classification, Regression
from loft_jax.tasks.registry import find_task
from loft_jax.tasks.task import Given, Task, within
from loft_jax.training.config import TaskConfig

if TYPE_CHECKING:
    from loft_jax.evaluation import AnswerScores, QuestionScores

_log = logging.getLogger(__name__)

_SHOWN = 3  # number of predictions shown
_END = 80  # number of characters shown of a prompt
_OF_TASKS = ("task", "label_names", "class_weights", "choices")
_OF_GENERATION = ("answer_pattern", "max_new_tokens", "predictions")


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on examples: the loss and the other metrics of its task.

    Prints one line of JSON: perplexity of a language model, accuracy of multiple choice and of
    classification, correlations of regression. A number that overflows, such as the perplexity of a
    loss of more than 700 nats, is null. With --generate, it has the accuracy of generated answers
    and the share of texts without one, and some of the texts are shown. With a preset of questions,
    such as commonsense, answers are generated and also compared by likelihood, and a table has a
    line for each set of questions that is in the folder, and the mean.
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
    """Largest number of tokens to generate; by default 256, and 32 with a preset of questions."""
    predictions: str = ""
    """File to write what the model generates to, a line of JSON for each example."""
    sample: int | None = None
    """Evaluate this many examples of each data set, drawn at random, the same ones every time."""
    batch_size: int = 16
    """Number of rows computed at once."""
    quantization: Quantization = "none"
    """Storage of the base model's kernels; use the same as in the training of the adapter."""

    def __call__(self) -> int:
        """Runs the command."""
        preset = self.data.preset
        if preset is not None and find_preset(preset).is_of_questions:
            self._refuse(f"not used with preset {preset}", *_OF_TASKS, "answer_pattern", "generate")
            return self._by_questions()
        if self.generate:
            self._refuse("not used with --generate", *_OF_TASKS)
            return self._by_generation()
        self._refuse("used with --generate only", *_OF_GENERATION)
        self._refuse("not used: evaluation has no weights", "class_weights")
        return self._by_task()

    def _refuse(self, said: str, *flags: str) -> None:
        """Refuses flags that are set, and would not be used."""
        task = self.task.name if self.task.name != "auto" else None
        for name, value in {**vars(self), **vars(self.task), "task": task}.items():
            if name in flags and value not in (None, "", (), False):
                raise InputError(f"{name} is {shown(value)}, and is {said}")

    def _by_questions(self) -> int:
        from loft_jax.evaluation import mean_of, question_sets

        evaluate = question_sets(
            **self._prepared(),
            sample=self.sample,
            max_new_tokens=32 if self.max_new_tokens is None else self.max_new_tokens,
        )
        with self._file_of_predictions() as file:
            scores = evaluate(self.source.load(quantization=self.quantization)[0])
            if file is not None:
                _write({name: one.generated for name, one in scores.items()}, file)
        _show(next(iter(scores.values())).generated)
        mean = mean_of(scores)
        _log.info("%s", _table(scores, mean))
        print(json.dumps({**{name: one.report for name, one in scores.items()}, "mean": mean}))
        return 0

    def _by_generation(self) -> int:
        from loft_jax.evaluation import generated_answers, sampled

        evaluate = generated_answers(
            sampled(load_examples(self.data.held_out()), self.sample),
            **self._prepared(),
            answer_pattern=self.answer_pattern,
            max_new_tokens=256 if self.max_new_tokens is None else self.max_new_tokens,
        )
        with self._file_of_predictions() as file:
            scores = evaluate(self.source.load(quantization=self.quantization)[0])
            if file is not None:
                _write({"": scores}, file)
        _show(scores)
        print(json.dumps({k: getattr(scores, k) for k in ("accuracy", "unanswered", "count")}))
        return 0

    def _file_of_predictions(self) -> AbstractContextManager[Path | None]:
        if not self.predictions:
            return nullcontext()
        if not Path(self.predictions).parent.is_dir():
            raise InputError(f"{self.predictions}: there is no such folder to write predictions in")
        return replacing(self.predictions)

    def _prepared(self) -> dict[str, Any]:
        """Gives what evaluations by generation need of the model before it is loaded."""
        from loft_jax.hub import load_model_config

        family, sizes = load_model_config(self.source.base)
        family.model("causal-lm")  # refuses a family that generates no text
        return {
            "tokenizer": self.source.processor,
            "data": within(self.data, sizes),
            "batch_size": self.batch_size,
            "vocab_size": sizes.vocab_size,
        }

    def _by_task(self) -> int:
        from loft_jax.evaluation import sampled
        from loft_jax.hub import load_model_config

        rows = sampled(load_examples(self.data.held_out()), self.sample)
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

    def _task(self, family: Family, sizes: PretrainedConfig, rows: Any) -> Task:
        """Gives the named task, or the one that fits, with the labels of the model or adapter."""
        adapter = self.source.adapter_head
        known = getattr(sizes, "labels", ()) if adapter is None else adapter[1]
        given = Given(
            self.data, rows, choices=self.choices, labels=self.task.label_names, known=known
        )
        task = find_task(self.task.name, family, given)
        if adapter is not None and adapter[0] == task.head:
            self._refuse_other(task, given)
        return task.make(dataclasses.replace(given, rows=None))

    def _refuse_other(self, task: type[Task], given: Given) -> None:
        """Refuses an adapter of regression for classification, and the reverse."""
        number = len(given.known) == 1
        if task is not (Classification if number else Regression):
            return
        predicted = "a number" if number else f"one of the labels {shown(list(given.known))}"
        expected = f"task {(Regression if number else Classification).name}"
        if given.data.preset is not None:
            found = f"preset {given.data.preset} is for {task.name}"
        elif self.task.name != "auto":
            found = f"task is {shown(self.task.name)}"
        elif given.labels:
            found = f"label_names are {shown(list(given.labels))}"
        else:
            kind = "texts" if number else "decimal numbers"
            found = f"field {given.data.label_field!r} of the rows has {kind}"
            expected = "numbers" if number else "these labels"
        raise InputError(
            f"{self.source.adapter}: predicts {predicted}, but {found}; expected {expected}, or an "
            f"adapter that was trained for {task.name}"
        )


def _write(scores: "Mapping[str, AnswerScores]", path: Path) -> None:
    """Writes predictions, with the name of their data set if it has one."""
    with path.open("w", encoding="utf-8") as file:
        for name, one in scores.items():
            for prediction in one.predictions:
                row = {**dataclasses.asdict(prediction), "right": prediction.right}
                text = json.dumps({"preset": name, **row} if name else row, ensure_ascii=False)
                file.write(text + "\n")


def _show(scores: "AnswerScores") -> None:
    for one in scores.predictions[:_SHOWN]:
        _log.info(
            "prompt: ...%s\n  text: %s\n  answer: %s, expected: %s",
            *map(shown, (one.prompt[-_END:], one.text, one.answer, one.expected)),
        )


def _table(scores: "Mapping[str, QuestionScores]", mean: Mapping[str, float]) -> str:
    names = list(mean)
    lines = [f"{'':14}" + "".join(f"{name:>12}" for name in names)]
    for title, report in (*((name, one.report) for name, one in scores.items()), ("mean", mean)):
        cells = [f"{report[n]:12.4f}" if n != "count" else f"{report[n]:12}" for n in names]
        lines.append(f"{title:14}" + "".join(cells))
    return "\n".join(lines)
