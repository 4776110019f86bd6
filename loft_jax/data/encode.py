"""Encodes examples as rows of tokens: fields, loss masks, truncation."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from loft_jax.data.chat import encode_chats
from loft_jax.data.config import DataConfig
from loft_jax.data.log_once import Joins, log_unused
from loft_jax.data.templates import Chat, Message, Start, render_chats
from loft_jax.data.text import check_tokens, encode_continuations, encode_plain, encode_starts
from loft_jax.errors import InputError, explained, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_CHUNK = 1000  # rows handed to the tokenizer at once

TOOLS = "tools"
"""Field with the tools that the assistant may call."""

_Encoded = tuple[int, list[int], list[bool]]  # row; token ids; which of them carry the loss


class Example(NamedTuple):
    """One example as tokens.

    Args:
        tokens: (n,) int32.
        loss_mask: (n,) bool: whether a token is to be predicted from those before it.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


class Labelled(NamedTuple):
    """Token types and labels of examples with a label.

    Args:
        token_types: (total,) int32: 1 in the second text of a pair, else 0.
        labels: (n,), int32 indices of labels, or float32 numbers.
    """

    token_types: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedData:
    """Examples as tokens, concatenated in two flat arrays.

    Args:
        tokens: (total,) int32.
        loss_mask: (total,) bool.
        offsets: (n + 1,) int64: example `i` is `offsets[i]:offsets[i + 1]`.
        pad_id: Token that pads a row; it is never attended to.
        labelled: Token types and labels; None for examples without a label.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    pad_id: int
    labelled: "Labelled | None" = None

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
    *,
    vocab_size: int | None = None,
) -> TokenizedData:
    """Encodes examples as tokens with a loss mask.

    - `messages`: the tokenizer's chat template; loss on every assistant turn. A field `tools`
      beside it, a list of JSON schemas of what the assistant may call or the JSON text of one, is
      given to the template too.
    - `prompt` and `completion`: BOS (or whatever the tokenizer puts before a text) + prompt +
      completion + EOS; loss on the completion and EOS. The two are tokenized apart, so the
      completion's tokens are its own.
    - `text`: BOS + text + EOS; loss on all of it that has something before it. One that is longer
      than `max_length` becomes several examples, each beginning with the last token of the one
      before: every token is predicted once.

    Examples with nothing to learn (an empty completion, no assistant turn, nothing left after
    truncation to `max_length`) are left out, and a warning gives their number. Fields that are not
    used are logged.

    Args:
        rows: Examples, as `load_examples` gives them or as plain dicts.
        tokenizer: A transformers tokenizer.
        config: Its field names and `max_length` are used.
        vocab_size: Number of tokens that the model has weights for; None if it is not known.

    Returns:
        The examples that have something to learn, in order.

    Raises:
        InputError: A field is missing or is not text, the chat template is missing or cannot be
            followed, the model has no weights for a token, or no example has anything to learn.

    Example:
        >>> data = tokenize(rows, tokenizer, DataConfig("reviews.jsonl"))  # doctest: +SKIP
    """
    kept: list[Example] = []
    empty = shortened = 0
    cut_away: list[int] = []  # lengths of the examples with nothing left after truncation
    filler = pad_id(tokenizer)
    check_tokens([filler], tokenizer, vocab_size, where="padding")
    for index, ids, learn in _encoded(rows, tokenizer, config):
        check_tokens(ids, tokenizer, vocab_size, where=f"row {index}")
        tokens, mask = np.asarray(ids, np.int32), np.asarray(learn, bool)
        mask[:1] = False  # there is nothing before the first token
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
        pad_id=filler,
    )


_EMPTY = "an empty completion or text, or no assistant turn"


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: "Sequence[str | Sequence[Message] | Chat]"
) -> list[list[int]]:
    """Encodes prompts exactly as in training, up to where the learned tokens begin.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Texts, as in the field `prompt` of rows; or conversations for the assistant to
            answer, as in the field `messages` or from `chat_of`, which are rendered by the chat
            template.

    Returns:
        One list of ids for each prompt.

    Raises:
        InputError: A conversation is not a list of messages, or ends with one of the assistant; or
            the chat template is missing or cannot be followed.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    chats = [
        _checked(prompt if isinstance(prompt, Chat) else Chat(f"prompt {number}", prompt))
        for number, prompt in enumerate(prompts)
        if not isinstance(prompt, str)
    ]
    starts = iter(encode_starts(tokenizer, texts))
    asked = ((chat, [Start(len(chat.messages), prompted=True)]) for chat in chats)
    questions = [
        start if isinstance(start, str) else rendered.whole[:start]
        for _, rendered in render_chats(tokenizer, asked)
        for start in rendered.starts
    ]
    turns = iter(encode_plain(tokenizer, questions))  # the template writes BOS itself
    return [next(starts) if isinstance(prompt, str) else next(turns) for prompt in prompts]


def _checked(chat: Chat) -> Chat:
    """Refuses what is no conversation for the assistant to answer."""
    where, messages = chat.where, chat.messages
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise InputError(
            f"{where}: found {shown(messages)}; expected a text, or a list of messages, each with "
            "the texts role and content"
        )
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: the last message is the assistant's; expected one to answer")
    return chat


def truncate(example: Example, max_length: int) -> Example:
    """Truncates an example to `max_length`: the left of its prompt first, then its end.

    The first token of the prompt is always kept, BOS if there is one, so that the first token of
    the completion is predicted from something.

    Args:
        example: With at least one token to learn.
        max_length: In tokens.

    Returns:
        The truncated example, or the example itself if it is short enough.
    """
    tokens, mask = example
    excess = max(0, len(tokens) - max_length)
    first = int(np.argmax(mask))  # where the prompt ends
    cut = min(excess, first - 1)
    keep = np.ones(len(tokens), bool)
    keep[1 : 1 + cut] = False
    return Example(tokens[keep][:max_length], mask[keep][:max_length])


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Chooses the token that pads a row: any token works, since it is never attended to.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The id of the padding token, else of EOS, else 0.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def text_of(row: Mapping[str, Any], field: str, index: int) -> str:
    """Gets the text in a field of a row.

    Args:
        row: An example.
        field: The name of the field.
        index: Index of the row, for the message.

    Returns:
        The text.

    Raises:
        InputError: The field is missing or is not a text.
    """
    value = row.get(field)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"row {index}: field {field!r} is {kind} ({shown(value)}); expected text")
    return value


def column_names(rows: "Dataset | Sequence[Mapping[str, Any]]") -> list[str]:
    """Gives the names of the fields of examples.

    Args:
        rows: From `load_examples`, or plain dicts, of which the first one is used.

    Returns:
        Their names.

    Raises:
        InputError: There is no example.
    """
    if len(rows) == 0:
        raise InputError("the dataset is empty; expected examples")
    return list(rows[0] if isinstance(rows, Sequence) else rows.column_names)


_Numbered = Sequence[tuple[int, Mapping[str, Any]]]  # rows and their places in the dataset


def _encoded(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
) -> Iterator[_Encoded]:
    columns = column_names(rows)
    encode, used = _encoder(columns, config)
    used = [name for name in used if name in columns]
    log_unused(tokenizer, columns, used, config)
    if not isinstance(rows, Sequence):
        rows = rows.select_columns(used)
    yield from encode(_chunks(rows), tokenizer, config)


def _chunks(rows: "Dataset | Sequence[Mapping[str, Any]]") -> Iterator[_Numbered]:
    # delay: only a dataset that takes a while shows a bar
    for start in tqdm(range(0, len(rows), _CHUNK), desc="tokenizing", leave=False, delay=2):
        yield [(i, rows[i]) for i in range(start, min(start + _CHUNK, len(rows)))]


_Encoder = Callable[
    [Iterable[_Numbered], "PreTrainedTokenizerBase", DataConfig], Iterator[_Encoded]
]


def _encoder(columns: Sequence[str], config: DataConfig) -> tuple[_Encoder, list[str]]:
    """Chooses how rows with these fields are encoded, and which fields are used."""
    if config.messages_field in columns:
        return _encode_messages, [config.messages_field, TOOLS]
    if config.prompt_field in columns and config.completion_field in columns:
        return _encode_completions, [config.prompt_field, config.completion_field]
    if config.text_field in columns:
        return _encode_texts, [config.text_field]
    pair = {config.prompt_field, config.completion_field}
    missing = pair.difference(columns) if pair.intersection(columns) else set()
    named = f"field {missing.pop()!r} is missing" if missing else "no known field"
    raise InputError(
        f"{named}; found the fields {shown(sorted(columns))}; expected {config.messages_field!r}, "
        f"or {config.prompt_field!r} and {config.completion_field!r}, or {config.text_field!r}"
    )


def _encode_completions(
    chunks: Iterable[_Numbered], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> Iterator[_Encoded]:
    joins = Joins()
    for numbered in chunks:
        prompts = [text_of(row, config.prompt_field, i) for i, row in numbered]
        completions = [text_of(row, config.completion_field, i) for i, row in numbered]
        starts = encode_starts(tokenizer, prompts)
        ends = _closed(tokenizer, encode_continuations(tokenizer, completions))
        for prompt, completion in zip(prompts, completions, strict=True):
            joins.add(prompt, completion)
        for (index, _), start, end in zip(numbered, starts, ends, strict=True):
            yield index, start + end, [False] * len(start) + [True] * len(end)
    joins.warn(tokenizer)


def _encode_texts(
    chunks: Iterable[_Numbered], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> Iterator[_Encoded]:
    for numbered in chunks:
        texts = [text_of(row, config.text_field, i) for i, row in numbered]
        whole = _closed(tokenizer, encode_starts(tokenizer, texts))
        for (index, _), text, ids in zip(numbered, texts, whole, strict=True):
            for piece in _pieces(ids, config.max_length):
                yield index, piece, [text != ""] * len(piece)


def _pieces(ids: list[int], max_length: int) -> Iterator[list[int]]:
    """Splits a text into rows; each begins with the last token of the previous one."""
    step = max(1, max_length - 1)
    for start in range(0, max(1, len(ids) - 1), step):
        yield ids[start : start + step + 1]


def _encode_messages(
    chunks: Iterable[_Numbered], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
) -> Iterator[_Encoded]:
    chats = (chat_of(index, row, config) for numbered in chunks for index, row in numbered)
    for index, (ids, said) in enumerate(encode_chats(tokenizer, chats)):
        yield index, ids, said


def chat_of(index: int, row: Mapping[str, Any], config: DataConfig) -> Chat:
    """Gets the conversation of a row.

    Args:
        index: Index of the row, for messages of errors.
        row: An example.
        config: Its `messages_field` is used.

    Returns:
        The messages, and the tools of the field `tools`.

    Raises:
        InputError: The fields do not hold a list of messages, and a list of tools or none.
    """
    messages = row.get(config.messages_field)
    where = f"row {index}, field {config.messages_field!r}"
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise InputError(
            f"{where}: found {shown(messages)}; "
            "expected a list of messages, each with the texts role and content"
        )
    return Chat(where, messages, _tools(index, row.get(TOOLS)))


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _tools(index: int, found: Any) -> list[dict[str, Any]] | None:
    """Gets the tools that the assistant may call, from a list of JSON schemas or its JSON text."""
    tools = found
    if isinstance(found, str):
        with explained(f"row {index}, field {TOOLS!r}: cannot be read as JSON"):
            tools = json.loads(found) if found else None
    if tools is None or (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        return tools
    raise InputError(
        f"row {index}, field {TOOLS!r}: found {shown(found)}; expected a list of objects, or the "
        "JSON text of one"
    )


def _closed(tokenizer: "PreTrainedTokenizerBase", encoded: list[list[int]]) -> list[list[int]]:
    """Appends EOS to each list that is not empty and does not end with it."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no EOS token; expected one to close a completion with")
    return [ids if not ids or ids[-1] == eos else [*ids, eos] for ids in encoded]
