"""loft-jax data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.data import DataConfig, TokenizedData, load_examples
from loft_jax.data.text import decoded
from loft_jax.errors import InputError, shown
from loft_jax.tasks.registry import find_task
from loft_jax.tasks.task import Given, Task, within
from loft_jax.training.config import TaskConfig

if TYPE_CHECKING:
    import numpy as np

_BEGIN, _END = "⟦", "⟧"
_COUNTED = 10  # number of labels whose rows are counted


@dataclass(frozen=True)
class Data:
    """Show examples as the model sees them, with what is learned marked; no weights are read.

    Args:
        model: The base model: folder, GGUF file or hub id, for its tokenizer and its chat template.
        data: The examples.
        show: Number of examples to print.
        task: What is learned.
    """

    model: str
    data: DataConfig
    show: int = 3
    task: Annotated[TaskConfig, tyro.conf.arg(name="")] = field(default_factory=TaskConfig)

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.hub import load_model_config, load_processor

        if self.show < 0:
            raise InputError(f"show is {self.show}; expected at least 0")
        processor = load_processor(self.model)
        family, sizes = load_model_config(self.model)
        data = within(self.data, sizes)
        rows = load_examples(data)
        given = Given(
            data,
            rows,
            labels=self.task.label_names,
            class_weights=self.task.class_weights,
            known=getattr(sizes, "labels", ()),
        )
        task = find_task(self.task.name, family, given).make(given)
        examples = task.tokenize(rows, processor, data, vocab_size=sizes.vocab_size)
        if not isinstance(examples, TokenizedData):
            raise InputError(f"{data.path}: holds images; expected texts to show")
        print(_summary(len(rows), examples, task))
        for index in range(min(self.show, len(examples))):
            print(f"\n{_shown(index, examples, processor, task)}")
        return 0


def _summary(rows: int, examples: TokenizedData, task: Task) -> str:
    lengths = examples.lengths
    summary = (
        f"{rows:,} rows give {len(examples):,} examples of {lengths.min():,} to "
        f"{lengths.max():,} tokens, {lengths.mean():,.1f} on average"
    )
    if examples.labelled is not None:
        return summary + _counted(examples.labelled.labels, _names(task))
    learned = int(examples.loss_mask.sum())
    total = len(examples.tokens)
    return f"{summary}; {learned:,} of {total:,} tokens are learned, {_BEGIN}here{_END}"


def _counted(labels: "np.ndarray", names: Sequence[str]) -> str:
    """Writes how many rows have each label, where labels have names."""
    import numpy as np

    if not names:
        return ""
    counts = np.bincount(labels, minlength=len(names))
    # With quotes, names that differ by a space at an end are seen to differ.
    said = [f"{shown(name)} {count:,}" for name, count in zip(names, counts, strict=True)]
    more = [f"{len(said) - _COUNTED:,} more"] if len(said) > _COUNTED else []
    return f"; labels: {', '.join([*said[:_COUNTED], *more])}"


def _names(task: Task) -> tuple[str, ...]:
    """Gives the names of the labels; none for regression, whose single one names no label."""
    names = task.labels or ()
    return names if len(names) > 1 else ()


def _shown(index: int, examples: TokenizedData, tokenizer: Any, task: Task) -> str:
    """Writes an example with its special tokens, and marks around what is learned."""
    tokens, mask = examples[index]
    if examples.labelled is not None:
        label = examples.labelled.labels[index]
        names = _names(task)
        name = f" ({names[int(label)]})" if names else ""
        return (
            f"example {index + 1}: {len(tokens)} tokens, label {label:g}{name}\n"
            f"{decoded(tokenizer, tokens.tolist())}"
        )
    text, written = "", ""
    edges = [at for at in range(1, len(mask)) if mask[at] != mask[at - 1]]
    for start, end in zip([0, *edges], [*edges, len(mask)], strict=True):
        whole = decoded(tokenizer, tokens[:end].tolist())  # a part would lose a space at its start
        part, written = whole[len(written) :], whole
        text += f"{_BEGIN}{part}{_END}" if mask[start] else part
    return f"example {index + 1}: {len(tokens)} tokens, {int(mask.sum())} learned\n{text}"
