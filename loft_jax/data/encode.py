"""Examples to rows of tokens: which fields, which tokens carry the loss, what is cut."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from loft_jax.data.chat import encode_chat
from loft_jax.data.config import DataConfig
from loft_jax.data.text import encode_continuations, encode_starts
from loft_jax.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_CHUNK = 1000  # rows handed to the tokenizer at once

_Encoded = tuple[list[int], list[bool]]  # token ids; which of them carry the loss


class Example(NamedTuple):
    """One example as tokens.

    Args:
        tokens: (n,) int32.
        loss_mask: (n,) bool: the token is to be predicted from what stands before it.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedData:
    """Many examples as tokens, end to end in two flat arrays.

    Args:
        tokens: (total,) int32.
        loss_mask: (total,) bool.
        offsets: (n + 1,) int64: example `i` is `offsets[i]:offsets[i + 1]`.
        pad_id: The token that fills a row; it is never attended to.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    pad_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.tokens[part], self.loss_mask[part])

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each example, (n,)."""
        return np.diff(self.offsets)


def tokenize(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
) -> TokenizedData:
    """Turn examples into tokens with a loss mask.

    - `messages`: the tokenizer's chat template; loss on every assistant turn.
    - `prompt` and `completion`: BOS (if the tokenizer has it) + prompt + completion + EOS; loss on
      the completion and EOS. The two are tokenized apart, so the completion's tokens are its own.
    - `text`: BOS + text + EOS; loss on all of it that has something before it. One that is longer
      than `max_length` becomes several examples, each beginning with the last token of the one
      before: every token is predicted once.

    Examples with nothing to learn (an empty completion, no assistant turn) are left out with a
    warning that says how many; so are those of which `max_length` leaves nothing to learn.

    Args:
        rows: Examples, as `load_examples` gives them or as plain dicts.
        tokenizer: A transformers tokenizer.
        config: Its field names and `max_length` are used.

    Returns:
        The examples that have something to learn, in order.

    Raises:
        InputError: A field is missing or is not text, the chat template is missing or cannot be
            followed, or no example has anything to learn.

    Example:
        >>> data = tokenize(rows, tokenizer, DataConfig("reviews.jsonl"))  # doctest: +SKIP
    """
    kept: list[Example] = []
    empty = shortened = 0
    cut_away: list[int] = []  # lengths of the examples that max_length leaves nothing of
    for ids, learn in _encoded(rows, tokenizer, config):
        tokens, mask = np.asarray(ids, np.int32), np.asarray(learn, bool)
        mask[:1] = False  # nothing stands before the first token
        if not mask.any():
            empty += 1
            continue
        example = truncate(Example(tokens, mask), config.max_length)
        if example.loss_mask.any():
            kept.append(example)
            shortened += len(example.tokens) < len(tokens)
        else:
            cut_away.append(len(tokens))
    if cut_away and not kept:
        raise InputError(
            f"every completion was truncated away: max_length is {config.max_length}; a row needs "
            f"2 tokens to learn anything, and the shortest example has {min(cut_away)}"
        )
    if not kept:
        raise InputError(f"none of the {len(rows)} examples has anything to learn: {_EMPTY}")
    if empty or cut_away:
        _log.warning(
            "left out %d of %d examples: %d with nothing to learn (%s), %d cut to nothing by "
            "max_length %d",
            *(empty + len(cut_away), len(rows), empty, _EMPTY, len(cut_away), config.max_length),
        )
    if shortened:
        _log.warning(
            "shortened %d of %d examples to max_length %d", shortened, len(rows), config.max_length
        )
    return TokenizedData(
        tokens=np.concatenate([example.tokens for example in kept]),
        loss_mask=np.concatenate([example.loss_mask for example in kept]),
        offsets=np.cumsum([0, *(len(example.tokens) for example in kept)], dtype=np.int64),
        pad_id=pad_id(tokenizer),
    )


_EMPTY = "an empty completion or text, or no assistant turn"


def truncate(example: Example, max_length: int) -> Example:
    """Cut an example to `max_length`: the left of its prompt first, then its end.

    Of the prompt one token always stays, BOS where there is one, so that the first token of the
    completion is predicted from something.

    Args:
        example: With some token to learn.
        max_length: In tokens.

    Returns:
        The example, or what is left of it.
    """
    tokens, mask = example
    excess = max(0, len(tokens) - max_length)
    first = int(np.argmax(mask))  # where the prompt ends
    cut = min(excess, first - 1)
    keep = np.ones(len(tokens), bool)
    keep[1 : 1 + cut] = False
    return Example(tokens[keep][:max_length], mask[keep][:max_length])


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that fills a row: any will do, since it is never attended to."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def text_of(row: Mapping[str, Any], field: str, index: int) -> str:
    """The text in a field of a row, or an error that names both."""
    value = row.get(field)
    if not isinstance(value, str):
        raise InputError(
            f"row {index}: field {field!r} is {type(value).__name__} ({value!r}); expected text"
        )
    return value


def column_names(rows: "Dataset | Sequence[Mapping[str, Any]]") -> list[str]:
    """The fields of the examples."""
    if len(rows) == 0:
        raise InputError("the dataset is empty; expected examples")
    return list(getattr(rows, "column_names", rows[0]))


def _encoded(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
) -> Iterator[_Encoded]:
    encode = _encoder(column_names(rows), config)
    # delay: only a dataset that takes a while shows a bar
    for start in tqdm(range(0, len(rows), _CHUNK), desc="tokenizing", leave=False, delay=2):
        numbered = [(i, rows[i]) for i in range(start, min(start + _CHUNK, len(rows)))]
        yield from encode(numbered, tokenizer, config)


_Numbered = Sequence[tuple[int, Mapping[str, Any]]]  # a row and its place in the dataset


def _encoder(
    columns: Sequence[str], config: DataConfig
) -> Callable[[_Numbered, "PreTrainedTokenizerBase", DataConfig], Iterator[_Encoded]]:
    if config.messages_field in columns:
        return _encode_messages
    if config.prompt_field in columns and config.completion_field in columns:
        return _encode_completions
    if config.text_field in columns:
        return _encode_texts
    pair = {config.prompt_field, config.completion_field}
    missing = pair.difference(columns) if pair.intersection(columns) else set()
    named = f"field {missing.pop()!r} is missing" if missing else "no known field"
    raise InputError(
        f"{named}; found the fields {sorted(columns)}; expected {config.messages_field!r}, or "
        f"{config.prompt_field!r} and {config.completion_field!r}, or {config.text_field!r}"
    )


def _encode_completions(
    numbered: _Numbered, tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> Iterator[_Encoded]:
    prompts = [text_of(row, config.prompt_field, i) for i, row in numbered]
    completions = [text_of(row, config.completion_field, i) for i, row in numbered]
    starts = encode_starts(tokenizer, prompts)
    ends = _closed(tokenizer, encode_continuations(tokenizer, completions))
    for start, end in zip(starts, ends, strict=True):
        yield start + end, [False] * len(start) + [True] * len(end)


def _encode_texts(
    numbered: _Numbered, tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> Iterator[_Encoded]:
    texts = [text_of(row, config.text_field, i) for i, row in numbered]
    for text, ids in zip(texts, _closed(tokenizer, encode_starts(tokenizer, texts)), strict=True):
        for piece in _pieces(ids, config.max_length):
            yield piece, [text != ""] * len(piece)


def _pieces(ids: list[int], max_length: int) -> Iterator[list[int]]:
    """A text in rows; each begins with the last token of the one before, to predict from."""
    step = max(1, max_length - 1)
    for start in range(0, max(1, len(ids) - 1), step):
        yield ids[start : start + step + 1]


def _encode_messages(
    numbered: _Numbered, tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> Iterator[_Encoded]:
    for index, row in numbered:
        messages = row.get(config.messages_field)
        where = f"row {index}, field {config.messages_field!r}"
        if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
            raise InputError(
                f"{where}: found {messages!r:.80}; "
                "expected a list of messages, each with the texts role and content"
            )
        yield encode_chat(tokenizer, messages, where=where)


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _closed(tokenizer: "PreTrainedTokenizerBase", encoded: list[list[int]]) -> list[list[int]]:
    """EOS behind each that is not empty and does not end in it already."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no EOS token; expected one to close a completion with")
    return [ids if not ids or ids[-1] == eos else [*ids, eos] for ids in encoded]
