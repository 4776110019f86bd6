"""Strings to token ids: at the start of a row, and as what continues it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loft_jax.errors import InputError, explained, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_START = "▁"  # how SentencePiece-like tokenizers write a space
_ANCHOR = "\n"
_ANY = "a"


def encode_starts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that open a row: behind what the tokenizer puts first, and without EOS.

    What it puts first is BOS as a rule, or nothing, or several tokens. They stand there once, even
    if a text has all of them itself.

    Args:
        tokenizer: A transformers tokenizer.
        texts: What to encode.

    Returns:
        One list of ids a text.

    Raises:
        InputError: The tokenizer fails on one.
    """
    first = _put_first(tokenizer)
    encoded = encode_plain(tokenizer, texts)
    return [ids if ids[: len(first)] == first else [*first, *ids] for ids in encoded]


def _put_first(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before a text: what stands before one that it is known to have."""
    (text,) = encode_plain(tokenizer, [_ANY])
    with explained("the tokenizer cannot encode a text"):
        whole = tokenizer(_ANY, verbose=False)["input_ids"]
    places = range(len(whole) - len(text) + 1)
    start = next((at for at in places if whole[at : at + len(text)] == text), 0)
    return list(whole[:start])


def encode_continuations(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> list[list[int]]:
    """Token ids of texts that continue a row: no special tokens, no space put before them.

    SentencePiece-like tokenizers put a space before every text they are given. In
    mid-row that space is not there: each text is encoded behind an anchor, and the anchor is cut.

    Args:
        tokenizer: A transformers tokenizer.
        texts: What to encode; a space at the start of one is its own.

    Returns:
        One list of ids a text.
    """
    first = [_token(tokenizer, token) for token in encode_plain(tokenizer, [_ANY])[0][:1]]
    if not (first and first[0].startswith(_WORD_START)):
        return encode_plain(tokenizer, texts)
    (anchor,) = encode_plain(tokenizer, [_ANCHOR])
    joined = encode_plain(tokenizer, [_ANCHOR + text for text in texts])
    plain = encode_plain(tokenizer, texts)
    return [
        ids[len(anchor) :] if ids[: len(anchor)] == anchor else alone
        for ids, alone in zip(joined, plain, strict=True)
    ]


def check_tokens(
    ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int | None,
    *,
    where: str,
) -> None:
    """Refuses tokens that a model has no weights for: looking them up gives those of other tokens.

    Args:
        ids: Of tokens.
        tokenizer: That gave them.
        vocab_size: How many tokens the model has weights for; None checks nothing.
        where: Names what they stand for, in the error.

    Raises:
        InputError: One of them is of another model.
    """
    if vocab_size is not None and (largest := max(ids, default=0)) >= vocab_size:
        token = _token(tokenizer, largest)
        raise InputError(
            f"{where}: the tokenizer gives token {largest} ({shown(token)}), and the weights have "
            f"{vocab_size} rows; expected a tokenizer and weights that belong together"
        )


def encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that bring their special tokens themselves, as a chat template's do.

    Args:
        tokenizer: A transformers tokenizer.
        texts: What to encode.

    Returns:
        One list of ids a text.

    Raises:
        InputError: The tokenizer fails on one.
    """
    if not texts:
        return []
    with explained("the tokenizer cannot encode a text"):
        # verbose=False: a text over the tokenizer's own limit is cut here later, by max_length
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def decoded(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, special: bool = True
) -> str:
    """The text of token ids.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Of tokens that it has.
        special: Whether special tokens are written too.

    Returns:
        The text.

    Raises:
        InputError: The tokenizer fails on them.
    """
    with explained("the tokenizer cannot decode tokens"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special))


def _token(tokenizer: "PreTrainedTokenizerBase", number: int) -> str:
    with explained("the tokenizer cannot name a token"):
        return str(tokenizer.convert_ids_to_tokens([number])[0])
