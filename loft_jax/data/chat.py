"""Conversations to token ids, with the assistant's turns marked."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loft_jax.data.text import encode_continuations
from loft_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, where: str
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant says.

    An assistant turn reaches from where the template's generation prompt ends to the token that
    closes the turn. Both places come from rendering the conversation up to there, so the template
    needs no `{% generation %}` marks; what has been rendered must be a prefix of the whole.

    Args:
        tokenizer: Has a chat template.
        messages: Turns, each with the texts `role` and `content`.
        where: Names the conversation in errors.

    Returns:
        The ids, and one flag an id: said by the assistant.

    Raises:
        InputError: There is no chat template, it refuses the conversation, or it writes a turn
            differently once others follow.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"{where}: the tokenizer has no chat template; expected one, "
            "or prompt and completion fields in place of messages"
        )
    ids: list[int] = []
    said: list[bool] = []
    special = _special_ids(tokenizer)
    for text, assistant in _pieces(tokenizer, messages, where=where):
        # The template writes BOS itself; a piece other than the first continues the row.
        encode = encode_continuations if ids else _encode_opening
        (piece,) = encode(tokenizer, [text])
        spoken = _spoken_length(piece, special) if assistant else 0
        ids += piece
        said += [index < spoken for index in range(len(piece))]
    return ids, said


def _encode_opening(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, where: str
) -> list[tuple[str, bool]]:
    """The rendered conversation, cut where the assistant begins and ends to speak."""
    whole = _render(tokenizer, messages, where=where)
    pieces = []
    done = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered_before(tokenizer, messages[: turn + 1], where=where)
        after = _render(tokenizer, messages[: turn + 1], where=where)
        if not (whole.startswith(after) and after.startswith(before) and done <= len(before)):
            raise InputError(
                f"{where}: the chat template does not write turn {turn} the same way on its own "
                "as inside the whole conversation, so the assistant's tokens cannot be told apart; "
                "expected a template that only appends, or prompt and completion fields"
            )
        pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    pieces.append((whole[done:], False))
    return [(text, assistant) for text, assistant in pieces if text]


def _rendered_before(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, where: str
) -> str:
    """What stands before the content of the last message, which is the assistant's."""
    *context, last = messages
    if context:
        return _render(tokenizer, context, where=where, add_generation_prompt=True)
    # No template renders an empty conversation: compare two that differ in the content alone.
    one, other = (_render(tokenizer, [{**last, "content": c}], where=where) for c in "xy")
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    where: str,
    add_generation_prompt: bool = False,
) -> str:
    from jinja2.exceptions import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses the messages: {error}") from error
    return str(rendered)


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added.union(tokenizer.all_special_ids)


def _spoken_length(piece: list[int], special: set[int]) -> int:
    """Up to the special token that closes the turn; a line break behind it is the template's."""
    closing = [index for index, token in enumerate(piece) if token in special]
    return closing[-1] + 1 if closing else len(piece)
