"""Multiple choice: which of several answers a model finds the likeliest."""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loft_jax.data import DataConfig, Example
from loft_jax.data.batches import bucket_lengths, check_batch_size, smallest_bucket
from loft_jax.data.encode import encode_prompts, pad_id, truncate
from loft_jax.data.log_once import Joins, log_once, log_unused
from loft_jax.data.row_formats import (
    chat_with,
    check_chat,
    fields_of,
    part_of,
    require_fields,
    told_of_texts,
)
from loft_jax.data.text import check_tokens, encode_continuations
from loft_jax.errors import InputError, shown
from loft_jax.models.activations import gathered
from loft_jax.models.family import LanguageModel
from loft_jax.models.inference import inference_state
from loft_jax.progress import progress_bar
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.tasks.task import CHOICE_FIELDS, Arrays, Evaluation, Given, Measured, Rows
from loft_jax.tasks.token_losses import token_losses_in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Predicted tokens of a row are padded to a multiple of this.
_MULTIPLE = 8


class Choice(CausalLM):
    """Language modeling, evaluated by which of several answers is the likeliest.

    Training is that of `CausalLM`, on prompts and completions; only the evaluation differs.
    """

    name = "choice"

    def __init__(self, choices: Sequence[str] = ()) -> None:
        """Sets the answers to compare.

        Args:
            choices: The answers of every row; empty if each row brings its own.
        """
        self.choices = tuple(choices)
        # Answers of all rows are compared as they are; others differ in length.
        self.measures = ("loss", "accuracy", *([] if choices else ["accuracy_norm"]))

    @classmethod
    def fits(cls, given: Given) -> bool:
        """Whether answers are to be compared."""
        return given.asks_choices

    @classmethod
    def make(cls, given: Given) -> "Choice":
        """Makes the task with the answers of all rows, if they are given."""
        cls.refuse(given, "labels", "class_weights")
        return cls(given.choices)

    def settings(self) -> dict[str, list[str]]:
        """Gives the answers of all rows."""
        return {"choices": list(self.choices)}

    def evaluation(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        batch_size: int,
        vocab_size: int | None = None,
        progress: bool = True,
    ) -> Evaluation:
        """Evaluates the loss of the right answers, and the accuracy of the likeliest ones."""
        check_batch_size(batch_size)
        asked = _encoded(tokenizer, rows, data, self.choices, vocab_size)

        def measure(model: LanguageModel) -> Measured:
            scores = _scores(model, asked, batch_size=batch_size, progress=progress)
            names = ("accuracy", "accuracy_norm", "nll", "count")
            report = {name: getattr(scores, name) for name in names}
            values = {"loss": scores.nll, "accuracy": scores.accuracy}
            right = {"accuracy": scores.right}
            if not self.choices:  # answers differ from row to row, and in length
                values["accuracy_norm"] = scores.accuracy_norm
                right["accuracy_norm"] = scores.right_norm
            return Measured(values, report, right)

        return measure


@dataclass(frozen=True)
class ChoiceScores:
    """The result of `score_choices`.

    Args:
        right: For each row, whether its right answer has the highest log-likelihood.
        right_norm: The same with log-likelihoods divided by the number of characters of the
            answers, without a leading space.
        nll: Mean negative log-likelihood of the right answer over the whole vocabulary, in nats.
    """

    right: tuple[bool, ...]
    right_norm: tuple[bool, ...]
    nll: float

    @property
    def accuracy(self) -> float:
        """The share of rows that are right."""
        return sum(self.right) / self.count

    @property
    def accuracy_norm(self) -> float:
        """The share of rows that are right by `right_norm`."""
        return sum(self.right_norm) / self.count

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.right)


def score_choices(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    config: DataConfig,
    *,
    choices: Sequence[str] = (),
    batch_size: int = 16,
    progress: bool = True,
) -> ChoiceScores:
    """Compares the log-likelihoods of answers that continue a prompt.

    A row is `{"prompt", "choices", "answer"}`, whose answer is an index; or, with `choices` given
    for all rows, `{"prompt", "completion"}`, whose completion is one of them. Answers are tokenized
    like completions in training, without EOS. A row passes through the model once: its prompt, and
    after it the answers, as branches that do not see each other. The head is applied only where a
    token of an answer is predicted. Of equally likely answers the first is chosen; if a
    log-likelihood is NaN, none is.

    Nothing is inserted between a prompt and its answers: if a space is needed, answers begin with
    it, and prompts do not end with it.

    Args:
        model: The model with its adapters.
        tokenizer: The model's.
        rows: Examples, from `load_examples` or as plain dicts.
        config: Its names and templates of prompts and completions, `chat` and `max_length` are
            used. If a prompt with the longest of its answers is too long, the left of the prompt is
            cut, and a warning gives the number of such prompts.
        choices: The answers of every row; empty if each row brings its own.
        batch_size: Number of rows computed at once.
        progress: Show a bar.

    Returns:
        Which rows are right, and the mean negative log-likelihood of the right answers.

    Raises:
        InputError: A field is missing or malformed, a completion is not one of the choices, an
            answer has no token or does not fit into `max_length`, or the model has no weights for a
            token.

    Example:
        >>> rows = [{"prompt": "Review: a joy\\nSentiment:", "completion": " positive"}]
        >>> labels = [" negative", " positive"]
        >>> score_choices(model, tokenizer, rows, config, choices=labels)  # doctest: +SKIP
        ChoiceScores(right=(True,), right_norm=(True,), nll=0.31)

    Source:
        The conventions of EleutherAI's lm-evaluation-harness: acc and acc_norm.
    """
    check_batch_size(batch_size)
    asked = _encoded(tokenizer, rows, config, choices, model.config.vocab_size)
    return _scores(model, asked, batch_size=batch_size, progress=progress)


class _Asked(NamedTuple):
    """Rows as tokens: questions, what is computed for each, and what fills a batch up."""

    questions: "list[_Question]"
    encoded: "list[_Row]"
    filler: int


def _encoded(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    config: DataConfig,
    choices: Sequence[str],
    vocab_size: int | None,
) -> _Asked:
    questions, filler = _questions(tokenizer, rows, config, choices), pad_id(tokenizer)
    _check_tokens(questions, filler, tokenizer, vocab_size)
    encoded = [_row(index, asked, config) for index, asked in enumerate(questions)]
    cut = sum(
        row.branches.count(0) < len(asked.prompt)
        for row, asked in zip(encoded, questions, strict=True)
    )
    if cut:
        _log.warning(
            "shortened the prompts of %d of %d questions to max_length %d",
            *(cut, len(questions), config.max_length),
        )
    return _Asked(questions, encoded, filler)


def _scores(
    model: LanguageModel, asked: _Asked, *, batch_size: int, progress: bool
) -> ChoiceScores:
    questions, encoded, filler = asked
    scores = [np.zeros(0)] * len(questions)  # log-likelihoods of the answers of each
    graphdef, state = inference_state(model)
    with progress_bar(total=len(encoded), desc="choices", leave=False, shown=progress) as bar:
        for indices, batch in _batches(encoded, batch_size, filler):
            found = np.asarray(_answer_scores(graphdef, state, batch), np.float64)  # (b, c)
            for index, values in zip(indices, found, strict=False):  # further rows are padding
                scores[index] = values[questions[index].which]
            bar.update(len(indices))
    both = list(zip(questions, scores, strict=True))
    return ChoiceScores(
        right=tuple(_likeliest(score) == asked.answer for asked, score in both),
        right_norm=tuple(_likeliest(score / asked.sizes) == asked.answer for asked, score in both),
        nll=-float(np.mean([score[asked.answer] for asked, score in both])),
    )


@dataclass(frozen=True)
class _Question:
    prompt: list[int]
    choices: list[list[int]]  # without duplicates, so that rounding cannot decide between them
    which: list[int]  # index in `choices` of each choice of the row, (c,)
    sizes: np.ndarray  # number of characters of each choice of the row, (c,)
    answer: int


@dataclass(frozen=True)
class _Row:
    """A prompt followed by its answers, each without its last token, which predicts nothing."""

    tokens: list[int]
    branches: list[int]  # 0 in the prompt, 1 and higher in the answers
    places: list[int]  # where a token of an answer is predicted, (n,)
    targets: list[int]  # these tokens, (n,)
    answers: list[int]  # index of the answer that each belongs to, (n,)


def _questions(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Rows,
    config: DataConfig,
    choices: Sequence[str],
) -> list[_Question]:
    check_chat(tokenizer, config)
    answered = fields_of("completion", config) if choices else CHOICE_FIELDS
    needed = [*fields_of("prompt", config), *answered]
    instead = "" if choices else " (or choices given for all rows)"
    columns = require_fields(rows, needed, f"to score answers{instead}")
    log_unused(tokenizer, columns, needed, config)
    if told := told_of_texts(config, chats=bool(tokenizer.chat_template)):
        log_once(tokenizer, told, logging.INFO)
    joins = Joins()
    prompts, offered, answers = [], [], []
    for index in range(len(rows)):
        row = rows[index]
        prompts.append(part_of("prompt", index, row, config))
        offered.append(list(choices) or _own_choices(row, index))
        if not config.chat:  # the template decides what stands between them
            for choice in offered[-1]:
                joins.add(prompts[-1], choice)
        answers.append(
            _position(part_of("completion", index, row, config), choices, index)
            if choices
            else _own_answer(row, index)
        )
    joins.warn(tokenizer)
    known = sorted({choice for row_choices in offered for choice in row_choices})
    encoded = dict(zip(known, encode_continuations(tokenizer, known), strict=True))
    if empty := [choice for choice, ids in encoded.items() if not ids]:
        raise InputError(f"choice {shown(empty[0])} has no token; expected some text")
    questions = []
    asked = [
        chat_with(prompt, f"row {index}") if config.chat else prompt
        for index, prompt in enumerate(prompts)
    ]
    for prompt, row_choices, answer in zip(
        encode_prompts(tokenizer, asked), offered, answers, strict=True
    ):
        distinct = list(dict.fromkeys(row_choices))
        questions.append(
            _Question(
                prompt=prompt,
                choices=[encoded[choice] for choice in distinct],
                which=[distinct.index(choice) for choice in row_choices],
                sizes=np.asarray([_size(choice) for choice in row_choices]),
                answer=answer,
            )
        )
    return questions


def _check_tokens(
    questions: Sequence[_Question],
    filler: int,
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int | None,
) -> None:
    check_tokens([filler], tokenizer, vocab_size, where="padding")
    for index, asked in enumerate(questions):
        for ids in (asked.prompt, *asked.choices):
            check_tokens(ids, tokenizer, vocab_size, where=f"row {index}")


def _likeliest(scores: np.ndarray) -> int:
    """Gives the index of the first largest score; -1 if one is NaN."""
    return -1 if np.isnan(scores).any() else int(np.argmax(scores))


def _size(choice: str) -> int:
    """Counts the characters of an answer, without a leading space."""
    return max(1, len(choice.removeprefix(" ")))


def _own_choices(row: Mapping[str, Any], index: int) -> list[str]:
    found = row.get("choices")
    if not (isinstance(found, list) and found and all(isinstance(one, str) for one in found)):
        raise InputError(
            f"row {index}: field 'choices' is {shown(found)}; expected a list of texts"
        )
    return found


def _own_answer(row: Mapping[str, Any], index: int) -> int:
    found, count = row.get("answer"), len(row["choices"])
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < count:
        raise InputError(
            f"row {index}: field 'answer' is {shown(found)}; expected a whole number, 0 to "
            f"{count - 1}"
        )
    return found


def _position(completion: str, choices: Sequence[str], index: int) -> int:
    if completion not in choices:
        raise InputError(
            f"row {index}: the completion {shown(completion)} is none of the choices "
            f"{shown(list(choices))}"
        )
    return list(choices).index(completion)


def _row(index: int, asked: _Question, config: DataConfig) -> _Row:
    if not asked.prompt:
        raise InputError(
            f"row {index}: the prompt has no token, and the tokenizer adds no BOS; expected some "
            "text"
        )
    tokens = _prompt_beside(max(asked.choices, key=len), index, asked.prompt, config)
    row = _Row(tokens, [0] * len(tokens), [], [], [])
    last = len(tokens) - 1
    for answer, choice in enumerate(asked.choices):
        row.places.extend([last, *range(len(tokens), len(tokens) + len(choice) - 1)])
        row.targets.extend(choice)
        row.answers.extend([answer] * len(choice))
        row.branches.extend([answer + 1] * (len(choice) - 1))
        tokens.extend(choice[:-1])
    return row


def _prompt_beside(
    longest: list[int], index: int, prompt: list[int], config: DataConfig
) -> list[int]:
    """Cuts the left of a prompt if it is too long with its longest answer."""
    tokens = np.asarray(prompt + longest, np.int32)
    mask = np.arange(len(tokens)) >= len(prompt)
    example = truncate(Example(tokens, mask), config.max_length)
    if example.loss_mask.sum() < len(longest):
        raise InputError(
            f"row {index}: max_length is {config.max_length}; an answer of {len(longest)} tokens "
            f"needs {len(longest) + 1}"
        )
    return example.tokens[: -len(longest)].tolist()


def _batches(
    rows: Sequence[_Row], batch_size: int, pad: int
) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
    """Yields indices of rows of similar lengths, and their arrays, in few shapes."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    longest = np.asarray([len(rows[group[-1]].tokens) for group in groups])
    buckets = bucket_lengths(longest, batch_size=1)
    lengths = [smallest_bucket(buckets, int(length)) for length in longest]
    answers = max(row.answers[-1] + 1 for row in rows)
    predicted = dict.fromkeys(lengths, 0)
    for group, length in zip(groups, lengths, strict=True):
        predicted[length] = max(predicted[length], *(len(rows[i].places) for i in group))
    for group, length in zip(groups, lengths, strict=True):
        places = -(-predicted[length] // _MULTIPLE) * _MULTIPLE
        batch = {
            "tokens": np.full((batch_size, length), pad, np.int32),
            "segment_ids": np.zeros((batch_size, length), np.int32),
            "branch_ids": np.zeros((batch_size, length), np.int32),
            "places": np.zeros((batch_size, places), np.int32),
            "targets": np.zeros((batch_size, places), np.int32),
            "belongs": np.zeros((batch_size, places, answers), bool),
        }
        for slot, index in enumerate(group):
            row, count = rows[index], len(rows[index].places)
            batch["tokens"][slot, : len(row.tokens)] = row.tokens
            batch["segment_ids"][slot, : len(row.tokens)] = 1
            batch["branch_ids"][slot, : len(row.tokens)] = row.branches
            batch["places"][slot, :count] = row.places
            batch["targets"][slot, :count] = row.targets
            batch["belongs"][slot, range(count), row.answers] = True
        yield group, batch


@functools.partial(jax.jit, static_argnums=0)
def _answer_scores(
    graphdef: nnx.GraphDef[Any], state: nnx.State[Any, Any], batch: Arrays
) -> jax.Array:
    """Computes the log-likelihoods of the answers of each row, (b, c)."""
    model = nnx.merge(graphdef, state)
    ids = {name: jnp.asarray(batch[name]) for name in ("segment_ids", "branch_ids")}
    hidden, _ = model.hidden_states(jnp.asarray(batch["tokens"]), **ids)  # (b, t, hidden)
    places, targets = (jnp.asarray(batch[name]) for name in ("places", "targets"))
    found = -token_losses_in_parts(model, hidden, places, targets)  # (b, n)
    return gathered(jnp.where(batch["belongs"], found[..., None], 0.0).sum(axis=1))
