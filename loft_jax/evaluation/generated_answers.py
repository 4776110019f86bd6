"""Evaluation by generation: the answers that a model writes, compared with the true ones."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loft_jax.data import DataConfig
from loft_jax.data.batches import check_batch_size
from loft_jax.data.encode import encode_prompts
from loft_jax.data.row_formats import Pair, RowReader, check_named, column_names
from loft_jax.data.templates import Chat
from loft_jax.data.text import check_tokens, decoded
from loft_jax.errors import InputError, explained, shown
from loft_jax.generation import ending_tokens, generate
from loft_jax.models.family import LanguageModel
from loft_jax.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_NUMBER = re.compile(r"([-+]?)([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.([0-9]*))?")


@dataclass(frozen=True)
class Prediction:
    """What a model wrote for one row.

    Args:
        prompt: What it was given, with special tokens; without its left if that was cut.
        text: What it wrote.
        answer: The answer in the text; None if it has none.
        expected: The true answer.
    """

    prompt: str
    text: str
    answer: str | None
    expected: str

    @property
    def right(self) -> bool:
        """Whether the answer is the true one."""
        return self.answer == self.expected


@dataclass(frozen=True)
class AnswerScores:
    """The result of an evaluation by generation.

    Args:
        predictions: One for each row, in the order of the rows.
    """

    predictions: tuple[Prediction, ...]

    @property
    def count(self) -> int:
        """The number of rows."""
        return len(self.predictions)

    @property
    def accuracy(self) -> float:
        """The share of rows whose answer is the true one."""
        return sum(one.right for one in self.predictions) / self.count

    @property
    def unanswered(self) -> float:
        """The share of texts without an answer; they count as wrong."""
        return sum(one.answer is None for one in self.predictions) / self.count


def generated_answers(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    *,
    answer_pattern: str = "",
    max_new_tokens: int = 256,
    batch_size: int = 16,
    vocab_size: int | None = None,
    progress: bool = True,
) -> Callable[[LanguageModel], AnswerScores]:
    """Prepares rows to evaluate a model by the answers that it generates.

    A row has a prompt and a completion, or a conversation whose last message is the assistant's, in
    one of the formats of training. Prompts are encoded as in training, and continued greedily, the
    longest first, so that the time that is left is not underestimated and a lack of memory shows at
    once.

    Without a pattern, the whole text is compared with the completion, both without white space at
    their ends. With one, the answer is its first match, in the text as in the completion: the first
    group that matched, or all of it if there is no group. If no completion has a match, completions
    are answers already. Answers that are numbers are compared by value: `1,000` is `1000.0`.

    Args:
        rows: From `load_examples`, or plain dicts.
        tokenizer: The model's.
        data: Its field names are used, and `max_length`, the largest length of a prompt with its
            new tokens. The left of a longer prompt is cut, and a warning gives their number.
        answer_pattern: A regular expression of Python, searched for; empty for the whole text.
        max_new_tokens: Largest number of new tokens of a row.
        batch_size: Number of rows computed at once.
        vocab_size: Number of tokens that the model has weights for; None if it is not known.
        progress: Show a bar.

    Returns:
        A function that evaluates a model.

    Raises:
        InputError: A field is missing or malformed, some completions have an answer and others do
            not, the pattern is no regular expression, a number is out of its range, or the model
            has no weights for a token.

    Example:
        GSM8K's answers stand after `####`:

        >>> data = DataConfig("gsm8k", prompt_field="question", completion_field="answer")
        >>> evaluate = generated_answers(
        ...     rows, tokenizer, data, answer_pattern="#### ([-0-9.,]+)"
        ... )  # doctest: +SKIP
        >>> evaluate(model).accuracy  # doctest: +SKIP
        0.25
    """
    check_batch_size(batch_size)
    with explained(f"answer_pattern {shown(answer_pattern)} is no regular expression"):
        pattern = re.compile(answer_pattern)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {shown(max_new_tokens)}; expected at least 1")
    room = data.max_length - max_new_tokens
    if room < 1:
        raise InputError(
            f"max_new_tokens is {max_new_tokens}, expected less than max_length, {data.max_length}"
        )
    prompts, completions = _questions(rows, tokenizer, data)
    expected = _true_answers(completions, pattern)
    encoded = encode_prompts(tokenizer, prompts)
    for index, ids in enumerate(encoded):
        check_tokens(ids, tokenizer, vocab_size, where=f"row {index}")
        if not ids:
            raise InputError(
                f"row {index}: the prompt has no token, and the tokenizer adds no BOS; expected "
                "some text"
            )
    if longer := sum(len(ids) > room for ids in encoded):
        _log.warning(
            "shortened the prompts of %d of %d rows to %d tokens: max_length is %d, and "
            "max_new_tokens %d",
            *(longer, len(encoded), room, data.max_length, max_new_tokens),
        )
        encoded = [ids[:1] + ids[max(1, len(ids) - room + 1) :] for ids in encoded]

    def measure(model: LanguageModel) -> AnswerScores:
        texts = [""] * len(encoded)
        with progress_bar(total=len(encoded), desc="answers", leave=False, shown=progress) as bar:
            for indices in _batches(encoded, batch_size):
                # Filled up with a row of its own, since another size would be compiled anew.
                full = indices + indices[:1] * (batch_size - len(indices))
                new = generate(
                    model,
                    [encoded[index] for index in full],
                    max_new_tokens=max_new_tokens,
                    eos_token_ids=ending_tokens(model, tokenizer),
                )
                for index, ids in zip(indices, new, strict=False):
                    texts[index] = decoded(tokenizer, ids, special=False)
                bar.update(len(indices))
        return AnswerScores(
            tuple(
                Prediction(decoded(tokenizer, ids), text, answer_in(text, pattern), answer)
                for ids, text, answer in zip(encoded, texts, expected, strict=True)
            )
        )

    return measure


def answer_in(text: str, pattern: "re.Pattern[str]") -> str | None:
    """Finds the answer in a text.

    Args:
        text: What a model wrote.
        pattern: What to search for; an empty one finds the whole text.

    Returns:
        The answer without white space at its ends, a number in its shortest form; None if there is
        none, or an empty one.

    Example:
        >>> answer_in("so it is #### 1,000.", re.compile("#### ([-0-9.,]+)"))
        '1000'
        >>> answer_in("the correct answer is answer2", re.compile("answer[1-5]"))
        'answer2'
        >>> answer_in(" Paris\\n", re.compile(""))
        'Paris'
    """
    if not pattern.pattern:
        return text.strip() or None
    found = pattern.search(text)
    if found is None:
        return None
    matched = next((group for group in found.groups() if group is not None), found[0]).strip()
    return _shortest(matched) or None


def _shortest(answer: str) -> str:
    """Writes a number in its shortest form, and returns what is none as it is."""
    number = _NUMBER.fullmatch(answer)
    if number is None:
        return answer
    sign, whole, fraction = number.groups(default="")
    digits, fraction = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
    value = f"{digits}.{fraction}" if fraction else digits
    return f"-{value}" if sign == "-" and value != "0" else value


def _questions(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
) -> tuple[list[str | Chat], list[str]]:
    """Gives the prompts of rows, and their completions."""
    columns = column_names(rows)
    check_named(columns, data)
    reader = RowReader(columns, tokenizer, data)
    prompts: list[str | Chat] = []
    completions = []
    for index in range(len(rows)):
        match reader.read(index, rows[index]):
            case None:
                raise InputError(
                    f"row {index}: field {data.label_field!r} is false, as of a completion to "
                    "avoid; expected rows whose completion has the true answer"
                )
            case str():
                raise InputError(
                    f"row {index}: is a plain text; expected a prompt and a completion, which has "
                    "the true answer"
                )
            case Pair(prompt, completion):
                prompts.append(prompt)
                completions.append(completion)
            case chat:
                if chat.messages[-1]["role"] != "assistant":
                    raise InputError(
                        f"{chat.where}: the last message is of "
                        f"{shown(chat.messages[-1]['role'])}; expected the assistant's, which has "
                        "the true answer"
                    )
                prompts.append(chat._replace(messages=chat.messages[:-1]))
                completions.append(chat.messages[-1]["content"])
    reader.log()
    return prompts, completions


def _true_answers(completions: Sequence[str], pattern: "re.Pattern[str]") -> list[str]:
    found = [answer_in(text, pattern) for text in completions]
    if pattern.pattern and not any(found):
        found = [_shortest(text.strip()) or None for text in completions]
    if None in found:
        index = found.index(None)
        raise InputError(
            f"row {index}: the completion {shown(completions[index])} has no answer; expected one "
            "in every row" + (f" that {shown(pattern.pattern)} finds" if pattern.pattern else "")
        )
    return [answer for answer in found if answer is not None]


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Yields indices of prompts of similar lengths."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
