"""Encodes examples as rows of tokens: loss masks, truncation."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from loft_jax.data.chat import Seen, encode_chats
from loft_jax.data.config import DataConfig
from loft_jax.data.log_once import Joins, log_now
from loft_jax.data.row_formats import Pair, Read, RowReader, column_names
from loft_jax.data.templates import Chat, Message, Start, render_chats
from loft_jax.data.text import (
    check_tokens,
    encode_continuations,
    encode_plain,
    encode_starts,
    parts_of,
)
from loft_jax.data.token_cache import cached
from loft_jax.errors import InputError, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # number of rows that are encoded at once, unless they exceed this many characters:
_CHARACTERS = 2**22
_MOST_OF_PAIR = 2**24  # characters of a prompt or completion, as a chat template may write at most

_Encoded = tuple[list[int], list[bool]]  # token ids; which of them carry the loss


class Example(NamedTuple):
    """One example as tokens.

    Attributes:
        tokens: (n,) int32.
        loss_mask: (n,) bool: whether a token is to be predicted from those before it.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray


class Labelled(NamedTuple):
    """Token types and labels of examples with a label.

    Attributes:
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

    - Conversations (`messages`, or ShareGPT's `conversations`): the tokenizer's chat template; loss
      on every assistant turn, but not where OpenAI's `weight` of the message is 0. A field `tools`
      beside it, a list of JSON schemas of what the assistant may call or the JSON text of one, is
      given to the template too.
    - `prompt` and `completion`: BOS (or whatever the tokenizer puts before a text) + prompt +
      completion + EOS; loss on the completion and EOS. The two are tokenized apart, so the
      completion's tokens are its own. If they are lists of messages, or with `config.chat`, they
      are given to the chat template; loss on the completion's assistant turns. Rows with a field
      `label` that is false, as TRL marks completions to avoid, are left out.
    - Preferences: the chosen side as the completion.
    - Alpaca's `instruction`, `input` and `output`: as a conversation, or with Alpaca's prompt if
      there is no chat template.
    - `text`: BOS + text + EOS; loss on all of it that has something before it. One that is longer
      than `max_length` becomes several examples, each beginning with the last token of the one
      before: every token is predicted once.

    Examples with nothing to learn (an empty completion, no assistant turn, nothing left after
    truncation to `max_length`) are left out, and a warning gives their number. Fields that are not
    used are logged. What took longer than two seconds is kept in the user's cache.

    Args:
        rows: Examples, as `load_examples` gives them or as plain dicts.
        tokenizer: A transformers tokenizer.
        config: Its names of fields, templates, `chat` and `max_length` are used.
        vocab_size: Number of tokens that the model has weights for; None if it is not known.

    Returns:
        The examples that have something to learn, in order.

    Raises:
        InputError: A field is missing or is not text, the chat template is missing or cannot be
            followed, the model has no weights for a token, or no example has anything to learn.

    Example:
        >>> data = tokenize(rows, tokenizer, DataConfig("reviews.jsonl"))  # doctest: +SKIP
    """
    filler = pad_id(tokenizer)
    check_tokens([filler], tokenizer, vocab_size, where="padding")
    columns = column_names(rows)
    settings = {name: getattr(config, name) for name in _SETTINGS}

    def make() -> dict[str, np.ndarray]:
        return _tokenized(rows, tokenizer, config, vocab_size)

    arrays = cached(make, rows, tokenizer, {**settings, "vocab": vocab_size, "columns": columns})
    return TokenizedData(arrays["tokens"], arrays["loss_mask"], arrays["offsets"], filler)


_SETTINGS = (
    "messages_field", "prompt_field", "completion_field", "text_field", "label_field", "prompt",
    "completion", "chat", "max_length",
)  # fmt: skip
"""Fields of the configuration that tokens depend on."""


def _tokenized(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    vocab_size: int | None,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `TokenizedData`."""
    kept: list[Example] = []
    empty = shortened = 0
    cut_away: list[int] = []  # lengths of the examples with nothing left after truncation
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
        log_now(
            f"left out {empty + len(cut_away)} of {len(rows)} examples: {empty} with nothing to "
            f"learn ({_EMPTY}), {len(cut_away)} cut to nothing by max_length {config.max_length}",
        )
    if shortened:
        log_now(
            f"shortened {shortened} of {len(rows)} examples to max_length {config.max_length}: "
            "first the beginning of the prompt is cut off, then the end of what is learned",
        )
    return {
        "tokens": np.concatenate([example.tokens for example in kept]),
        "loss_mask": np.concatenate([example.loss_mask for example in kept]),
        "offsets": np.cumsum([0, *(len(example.tokens) for example in kept)], dtype=np.int64),
    }


_EMPTY = "an empty completion or text, or no assistant turn"


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: "Sequence[str | Sequence[Message] | Chat]"
) -> list[list[int]]:
    """Encodes prompts exactly as in training, up to where the learned tokens begin.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Texts, as in the field `prompt` of rows; or conversations for the assistant to
            answer, as in the field `messages` or in a `Chat`, which are rendered by the chat
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


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _encoded(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """Yields examples in the order of rows: index of the row, tokens, which carry the loss."""
    reader = RowReader(column_names(rows), tokenizer, config)
    if not isinstance(rows, Sequence):
        rows = rows.select_columns(reader.columns)
    seen, joins = Seen(), Joins()
    texts = pieces = 0
    for indices, some in _chunks(rows, reader):
        for index, read, examples in zip(
            indices, some, _encode(some, tokenizer, config, seen, joins), strict=True
        ):
            texts += isinstance(read, str)
            for ids, learn in examples:
                pieces += isinstance(read, str)
                yield index, ids, learn
    seen.warn(tokenizer)
    joins.warn(tokenizer)
    reader.log()
    if pieces > texts:
        sentence = f"cut {texts} texts into {pieces} examples of max_length {config.max_length}"
        log_now(sentence, logging.INFO)


def _chunks(
    rows: "Dataset | Sequence[Mapping[str, Any]]", reader: RowReader
) -> Iterator[tuple[list[int], list[Read]]]:
    """Yields rows that are encoded at once: few if they are long."""
    held: list[int] = []
    read: list[Read] = []
    size = 0
    # delay: only a dataset that takes a while shows a bar
    with tqdm(total=len(rows), desc="tokenizing", unit="row", leave=False, delay=2) as bar:
        for index, row in enumerate(rows):
            if (one := reader.read(index, row)) is not None:
                held.append(index)
                read.append(one)
                size += _size(one)
            if len(held) == _CHUNK or size > _CHARACTERS:
                yield held, read
                bar.update(index + 1 - bar.n)
                held, read, size = [], [], 0
        if held:
            yield held, read
        bar.update(len(rows) - bar.n)


def _size(read: Read) -> int:
    """The number of characters of an example."""
    if isinstance(read, str):
        return len(read)
    if isinstance(read, Pair):
        return sum(map(len, read))
    return sum(len(message["content"]) for message in read.messages)


def _encode(
    some: Sequence[Read],
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    seen: Seen,
    joins: Joins,
) -> Iterator[Iterator[_Encoded]]:
    """Encodes rows of all kinds; each becomes one example, and a text one or several."""
    texts = _encode_texts(tokenizer, [one for one in some if isinstance(one, str)], config)
    pairs = _encode_pairs(tokenizer, [one for one in some if isinstance(one, Pair)], joins)
    chats = encode_chats(tokenizer, [one for one in some if isinstance(one, Chat)], seen)
    for one in some:
        if isinstance(one, str):
            yield next(texts)
        else:
            yield iter([next(pairs if isinstance(one, Pair) else chats)])


def _encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[Pair], joins: Joins
) -> Iterator[_Encoded]:
    for pair in pairs:
        for name, text in pair._asdict().items():
            if len(text) > _MOST_OF_PAIR:
                raise InputError(
                    f"a {name} has {len(text)} characters; expected at most {_MOST_OF_PAIR} (a "
                    "text may be longer)"
                )
        joins.add(*pair)
    starts = encode_starts(tokenizer, [pair.prompt for pair in pairs])
    ends = _closed(tokenizer, encode_continuations(tokenizer, [pair.completion for pair in pairs]))
    for start, end in zip(starts, ends, strict=True):
        yield start + end, [False] * len(start) + [True] * len(end)


def _encode_texts(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], config: DataConfig
) -> Iterator[Iterator[_Encoded]]:
    first = iter(encode_starts(tokenizer, [parts_of(text)[0] for text in texts]))
    for text in texts:
        yield (
            (piece, [text != ""] * len(piece))
            for piece in _pieces(_ids(tokenizer, text, next(first)), config.max_length)
        )


def _ids(tokenizer: "PreTrainedTokenizerBase", text: str, first: list[int]) -> Iterator[list[int]]:
    """Yields the tokens of a text, with EOS: those of its first part, and of the others."""
    _, *others = parts_of(text)
    last = first
    for part in others:
        yield last
        (last,) = encode_continuations(tokenizer, [part])
    yield from _closed(tokenizer, [last])


def _pieces(parts: Iterator[list[int]], max_length: int) -> Iterator[list[int]]:
    """Splits a text into rows; each begins with the last token of the previous one."""
    step = max(1, max_length - 1)
    ids: list[int] = []
    start = 0
    for part in parts:
        ids, start = ids[start:] + part, 0
        while len(ids) - start > step + 1:
            yield ids[start : start + step + 1]
            start += step
    yield ids[start:]


def _closed(tokenizer: "PreTrainedTokenizerBase", encoded: list[list[int]]) -> list[list[int]]:
    """Appends EOS to each list that is not empty and does not end with it."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise InputError("the tokenizer has no EOS token; expected one to close a completion with")
    return [ids if not ids or ids[-1] == eos else [*ids, eos] for ids in encoded]
