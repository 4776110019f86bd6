"""Encodes strings as token ids: at the start of a row, and as its continuation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loft_jax.errors import InputError, explained, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_START = "▁"  # how SentencePiece-like tokenizers write a space
_ANCHOR = "\n"
_ANY = "a"


_LONG = 2**20  # characters of a text that is tokenized in parts
_PART = 2**16  # characters of a part; of longer ones the tokenizer leaves memory in pieces


def parts_of(text: str) -> list[str]:
    """Cuts a very long text into parts to tokenize one after another, in bounded memory.

    Args:
        text: Of any length.

    Returns:
        Parts of at most 65,536 characters, which begin where a line or at least a word does, so
        that tokenizers that split texts at white space give the tokens of the whole text; the text
        itself if it is short, also if it is empty.
    """
    parts = []
    start = 0 if len(text) > _LONG else len(text)
    while len(text) - start > _PART:
        end = start + _PART
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end)
        parts.append(text[start : cut if cut > start else end])
        start += len(parts[-1])
    return [*parts, text[start:]] if parts else [text]


def encode_starts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Encodes texts that begin a row: after the tokenizer's first tokens, and without EOS.

    A tokenizer puts BOS first as a rule, but may put nothing or several tokens. They are not
    repeated if a text begins with all of them.

    Args:
        tokenizer: A transformers tokenizer.
        texts: What to encode.

    Returns:
        One list of ids for each text.

    Raises:
        InputError: The tokenizer fails on one.
    """
    first = _put_first(tokenizer)
    encoded = encode_plain(tokenizer, texts)
    return [ids if ids[: len(first)] == first else [*first, *ids] for ids in encoded]


def _put_first(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Finds the tokens that the tokenizer puts before a text."""
    (text,) = encode_plain(tokenizer, [_ANY])
    with explained("the tokenizer cannot encode a text"):
        whole = tokenizer(_ANY, verbose=False)["input_ids"]
    places = range(len(whole) - len(text) + 1)
    start = next((at for at in places if whole[at : at + len(text)] == text), 0)
    return list(whole[:start])


def encode_continuations(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], after: Sequence[str] = ()
) -> list[list[int]]:
    """Encodes texts that continue a row: without special tokens, and without an added space.

    SentencePiece-like tokenizers put a space before every text, which is wrong within a row, unless
    they put it after every special token too. With them, each text is encoded after an anchor, and
    the anchor is removed.

    Args:
        tokenizer: A transformers tokenizer.
        texts: What to encode; a space at the start of a text belongs to it.
        after: For each text, the special token that it follows, with white space that is between
            them; empty where it follows none. By default no text follows one.

    Returns:
        One list of ids for each text.
    """
    first = [_token(tokenizer, token) for token in encode_plain(tokenizer, [_ANY])[0][:1]]
    if not (first and first[0].startswith(_WORD_START)):
        return encode_plain(tokenizer, texts)
    anchors = [one or _ANCHOR for one in after or [""] * len(texts)]
    known = list(dict.fromkeys(anchors))
    begun = dict(zip(known, encode_plain(tokenizer, known), strict=True))
    joined = encode_plain(tokenizer, list(map("".join, zip(anchors, texts, strict=True))))
    plain = encode_plain(tokenizer, texts)
    return [
        ids[len(start) :] if ids[: len(start := begun[anchor])] == start else alone
        for anchor, ids, alone in zip(anchors, joined, plain, strict=True)
    ]


def check_tokens(
    ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int | None,
    *,
    where: str,
) -> None:
    """Refuses tokens that a model has no weights for; it would look up those of other tokens.

    Args:
        ids: Token ids.
        tokenizer: The tokenizer that gave them.
        vocab_size: Number of tokens that the model has weights for; None checks nothing.
        where: Where they come from, for the message.

    Raises:
        InputError: The model has no weights for one of them.
    """
    if vocab_size is not None and (largest := max(ids, default=0)) >= vocab_size:
        token = _token(tokenizer, largest)
        raise InputError(
            f"{where}: the tokenizer gives token {largest} ({shown(token)}), and the weights have "
            f"{vocab_size} rows; expected a tokenizer and weights that belong together"
        )


def encode_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Encodes texts without adding special tokens, as for those that a chat template wrote.

    Args:
        tokenizer: A transformers tokenizer.
        texts: What to encode.

    Returns:
        One list of ids for each text.

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
    """Decodes token ids.

    Args:
        tokenizer: A transformers tokenizer.
        ids: Token ids of this tokenizer.
        special: Whether special tokens are kept.

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
