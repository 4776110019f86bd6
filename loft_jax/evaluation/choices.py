"""Multiple choice: which of the given answers does a model find most likely."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from loft_jax.data import Batch, DataConfig, Example
from loft_jax.data.batches import bucket_lengths, pad_batch, smallest_bucket
from loft_jax.data.encode import column_names, pad_id, text_of, truncate
from loft_jax.data.text import encode_continuations, encode_starts
from loft_jax.errors import InputError
from loft_jax.evaluation._inference import batch_logits, inference_state
from loft_jax.models.activations import gathered
from loft_jax.models.loss import Arrays, token_losses

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChoiceScores:
    """What `score_choices` found.

    Args:
        right: Of each row, whether its right answer has the highest log-likelihood.
        right_norm: The same with log-likelihoods divided by the answers' characters, without the
            space before them.
        nll: Mean negative log-likelihood of the right answer over the whole vocabulary, nats.
    """

    right: tuple[bool, ...]
    right_norm: tuple[bool, ...]
    nll: float

    @property
    def accuracy(self) -> float:
        """Share of rows that are right."""
        return sum(self.right) / self.count

    @property
    def accuracy_norm(self) -> float:
        """Share of rows that are right by character."""
        return sum(self.right_norm) / self.count

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.right)


def score_choices(
    model: nnx.Module,
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    config: DataConfig,
    *,
    choices: Sequence[str] = (),
    batch_size: int = 16,
    progress: bool = True,
) -> ChoiceScores:
    """Compare the log-likelihoods of answers that continue a prompt.

    A row is `{"prompt", "choices", "answer"}`, the answer an index; or, with `choices` given for
    all rows, `{"prompt", "completion"}`, the completion one of them. Answers are tokenized as
    completions are in training, without EOS. A row whose answers are single tokens costs one
    forward pass of its prompt, whatever their number; any other costs one an answer. Of answers
    equally likely the first is taken.

    Args:
        model: `model(tokens, positions=, segment_ids=)` gives logits (b, t, vocab).
        tokenizer: The model's.
        rows: Examples, as `load_examples` gives them or as plain dicts.
        config: Its `prompt_field`, `completion_field`, `max_length` and `buckets` are used.
        choices: The answers of every row; empty if each row brings its own.
        batch_size: Forward passes of one sequence done together.
        progress: Show a bar.

    Returns:
        Which rows are right, and the mean negative log-likelihood of the right answers.

    Raises:
        InputError: A field is missing or malformed, a completion is none of the choices, or an
            answer has no token or does not fit into `max_length`.

    Example:
        >>> rows = [{"prompt": "Review: a joy\\nSentiment:", "completion": " positive"}]
        >>> labels = [" negative", " positive"]
        >>> score_choices(model, tokenizer, rows, config, choices=labels)  # doctest: +SKIP
        ChoiceScores(right=(True,), right_norm=(True,), nll=0.31)

    Source:
        The conventions of EleutherAI's lm-evaluation-harness: acc and acc_norm.
    """
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}; expected at least 1")
    questions = _questions(tokenizer, rows, config, choices)
    passes = [one for row, asked in enumerate(questions) for one in _passes(row, asked, config)]
    scores = [np.zeros(len(asked.choices)) for asked in questions]  # log-likelihoods
    graphdef, state = inference_state(model)
    with tqdm(total=len(passes), desc="choices", leave=False, disable=not progress) as bar:
        for group, batch in _batches(passes, config, batch_size, pad_id(tokenizer)):
            score = _next_token_scores if group[0].candidates else _answer_scores
            found = np.asarray(score(graphdef, state, batch), np.float64)
            for one, values in zip(group, found, strict=False):  # the rows behind are padding
                scores[one.row][one.answers] = values[: max(1, len(one.candidates))]
            bar.update(len(group))
    both = list(zip(questions, scores, strict=True))
    return ChoiceScores(
        right=tuple(bool(np.argmax(score) == asked.answer) for asked, score in both),
        right_norm=tuple(
            bool(np.argmax(score / asked.sizes) == asked.answer) for asked, score in both
        ),
        nll=-float(np.mean([score[asked.answer] for asked, score in both])),
    )


def bring_choices(rows: "Dataset | Sequence[Mapping[str, Any]]") -> bool:
    """Whether each example has answers of its own to compare: `choices` and `answer`."""
    return set(_OWN_CHOICES) <= set(column_names(rows))


@dataclass(frozen=True)
class _Question:
    prompt: list[int]
    choices: list[list[int]]
    sizes: np.ndarray  # of the choices in characters, (c,)
    answer: int


@dataclass(frozen=True)
class _Pass:
    """One row of a forward pass."""

    row: int
    answers: slice  # those of the row that it scores
    example: Example
    candidates: list[int]  # tokens to score behind the example; empty: the answer stands in it


def _questions(
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    config: DataConfig,
    choices: Sequence[str],
) -> list[_Question]:
    needed = [config.prompt_field, *([config.completion_field] if choices else _OWN_CHOICES)]
    columns = column_names(rows)
    if missing := [field for field in needed if field not in columns]:
        raise InputError(
            f"field {missing[0]!r} is missing; found the fields {sorted(columns)}; expected "
            f"{needed} to score answers{'' if choices else ' (or choices given for all rows)'}"
        )
    prompts, offered, answers = [], [], []
    for index in range(len(rows)):
        row = rows[index]
        prompts.append(text_of(row, config.prompt_field, index))
        offered.append(list(choices) or _own_choices(row, index))
        answers.append(
            _position(text_of(row, config.completion_field, index), choices, index)
            if choices
            else _own_answer(row, index)
        )
    known = sorted({choice for row_choices in offered for choice in row_choices})
    encoded = dict(zip(known, encode_continuations(tokenizer, known), strict=True))
    if untold := [choice for choice, ids in encoded.items() if not ids]:
        raise InputError(f"choice {untold[0]!r} has no token; expected some text")
    return [
        _Question(
            prompt=prompt,
            choices=[encoded[choice] for choice in row_choices],
            sizes=np.asarray([_size(choice) for choice in row_choices]),
            answer=answer,
        )
        for prompt, row_choices, answer in zip(
            encode_starts(tokenizer, prompts), offered, answers, strict=True
        )
    ]


_OWN_CHOICES = ["choices", "answer"]


def _size(choice: str) -> int:
    """Characters of an answer; the space that only sets it apart from the prompt is none of it."""
    return max(1, len(choice.removeprefix(" ")))


def _own_choices(row: Mapping[str, Any], index: int) -> list[str]:
    found = row.get("choices")
    if not (isinstance(found, list) and found and all(isinstance(one, str) for one in found)):
        raise InputError(f"row {index}: field 'choices' is {found!r:.80}; expected a list of texts")
    return found


def _own_answer(row: Mapping[str, Any], index: int) -> int:
    found, count = row.get("answer"), len(row["choices"])
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < count:
        raise InputError(f"row {index}: field 'answer' is {found!r}; expected 0 to {count - 1}")
    return found


def _position(completion: str, choices: Sequence[str], index: int) -> int:
    if completion not in choices:
        raise InputError(
            f"row {index}: the completion {completion!r} is none of the choices {list(choices)}"
        )
    return list(choices).index(completion)


def _passes(row: int, asked: _Question, config: DataConfig) -> Iterator[_Pass]:
    if not asked.prompt:
        raise InputError(
            f"row {row}: the prompt has no token, and the tokenizer adds no BOS; expected some text"
        )
    examples = [_answered(row, asked.prompt, choice, config) for choice in asked.choices]
    if all(len(choice) == 1 for choice in asked.choices):
        prompt = Example(*(array[:-1] for array in examples[0]))
        yield _Pass(row, slice(None), prompt, [choice[0] for choice in asked.choices])
    else:
        for index, example in enumerate(examples):
            yield _Pass(row, slice(index, index + 1), example, [])


def _answered(row: int, prompt: list[int], choice: list[int], config: DataConfig) -> Example:
    """The prompt, cut on its left if need be, with an answer behind it."""
    tokens = np.asarray(prompt + choice, np.int32)
    mask = np.arange(len(tokens)) >= len(prompt)
    example = truncate(Example(tokens, mask), config.max_length)
    if example.loss_mask.sum() < len(choice):
        raise InputError(
            f"row {row}: max_length is {config.max_length}; an answer of {len(choice)} tokens "
            f"needs {len(choice) + 1}"
        )
    return example


def _batches(
    passes: Sequence[_Pass], config: DataConfig, batch_size: int, pad: int
) -> Iterator[tuple[list[_Pass], Batch]]:
    """Passes of one kind and of alike lengths together; all batches have `batch_size` rows."""
    for single in (True, False):
        alike = [one for one in passes if bool(one.candidates) == single]
        alike.sort(key=lambda one: len(one.example.tokens))
        groups = [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
        if not groups:
            continue
        longest = np.asarray([len(group[-1].example.tokens) for group in groups])
        buckets = config.buckets or bucket_lengths(longest, batch_size=1)
        width = max(len(one.candidates) for one in alike)
        for group, length in zip(groups, longest, strict=True):
            batch = pad_batch(
                [[one.example] for one in group],
                batch_size=batch_size,
                length=smallest_bucket(buckets, length),
                pad_id=pad,
            )
            if single:
                batch["candidates"] = np.zeros((batch_size, width), np.int32)
                for index, one in enumerate(group):
                    batch["candidates"][index, : len(one.candidates)] = one.candidates
            yield group, batch


@functools.partial(jax.jit, static_argnums=0)
def _next_token_scores(graphdef: nnx.GraphDef, state: nnx.State, batch: Arrays) -> jax.Array:
    """Log-probabilities of `candidates` (b, c) as the token behind each row, (b, c)."""
    logits = batch_logits(graphdef, state, batch)  # (b, t, vocab)
    last = jnp.maximum(jnp.sum(batch["segment_ids"] > 0, axis=1) - 1, 0)  # (b,)
    scores = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]  # (b, vocab)
    scores = jax.nn.log_softmax(scores.astype(jnp.float32))
    return gathered(jnp.take_along_axis(scores, batch["candidates"], axis=1))


@functools.partial(jax.jit, static_argnums=0)
def _answer_scores(graphdef: nnx.GraphDef, state: nnx.State, batch: Arrays) -> jax.Array:
    """Log-probability of what carries the loss in each row, (b, 1)."""
    losses = token_losses(batch_logits(graphdef, state, batch), batch)  # (b, t)
    return gathered(-losses.sum(axis=1, keepdims=True))
