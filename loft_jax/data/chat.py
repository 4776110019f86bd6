"""Encodes conversations as token ids, and marks the assistant's turns."""

import bisect
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from loft_jax.data.log_once import log_once
from loft_jax.data.templates import REASONING, Chat, Message, Rendered, Start, Tail, render_chats
from loft_jax.data.text import decoded, encode_continuations, encode_plain
from loft_jax.errors import InputError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS = 64  # number of rows that are tokenized at once, unless they exceed this many characters:
_CHUNK = 2**20
_THINK_MARK = re.compile(r"</?think>")

_Piece = tuple[str, Message | None]  # rendered text; the learned message in it, or None


def encode_chats(
    tokenizer: "PreTrainedTokenizerBase", chats: Iterable[Chat], seen: "Seen | None" = None
) -> Iterator[tuple[list[int], list[bool]]]:
    """Encodes conversations, and marks the tokens of the assistant that are learned.

    An assistant turn begins where the template's generation prompt ends, and ends with the token
    that closes the turn. Both positions are found by rendering the conversation up to there, so the
    template needs no `{% generation %}` marks. If the rendered text is not a prefix of the whole
    (a template drops the reasoning of earlier turns, or ends with EOS), they are found
    by what follows what a message says, which must be the same in both.

    Logs a warning if the template closes no turn, leaves out some of what the assistant says (its
    reasoning, say), or does not use all fields of the messages. A turn whose tool calls it leaves
    out is not learned: the model would learn to end it instead.

    Args:
        tokenizer: Has a chat template.
        chats: Conversations whose messages have the texts `role` and `content`.
        seen: Collects what to warn of over several calls; by default the warnings are logged after
            the last conversation.

    Yields:
        For each conversation, its ids, and for each id whether it is learned: the assistant says
        it, in a message that `Chat.learned` does not leave out.

    Raises:
        InputError: There is no chat template; it refuses a conversation or fails on it; or the
            place of a learned turn cannot be found: it ends differently if others follow, say, or
            does not begin with the generation prompt.
    """
    own = seen is None
    seen = Seen() if seen is None else seen
    special = _special_ids(tokenizer)
    rendered = render_chats(tokenizer, ((seen.read(chat), _starts(chat)) for chat in chats))
    names = tuple(tokenizer.convert_ids_to_tokens(sorted(special)))
    known, longest = frozenset(names), max(map(len, names), default=0)
    for some in _together(_pieces(chat, found, names, seen) for chat, found in rendered):
        # The template writes BOS itself; a piece other than the first continues the row.
        firsts = iter(encode_plain(tokenizer, [pieces[0][0] for pieces in some if pieces]))
        following = [pair for pieces in some for pair in itertools.pairwise(pieces)]
        others = iter(
            encode_continuations(
                tokenizer,
                [text for _, (text, _) in following],
                [_special_end(before, known, longest) for (before, _), _ in following],
            )
        )
        for pieces in some:
            ids: list[int] = []
            said: list[bool] = []
            for number, (text, message) in enumerate(pieces):
                piece = next(others if number else firsts)
                spoken = 0
                if message is not None:
                    end = _end_of_turn(tokenizer, piece, special)
                    seen.add(text, message, closed=end is not None)
                    spoken = len(piece) if end is None else end
                ids += piece
                said += [index < spoken for index in range(len(piece))]
            yield ids, said
    if own:
        seen.warn(tokenizer)


def _together(rows: Iterable[list[_Piece]]) -> Iterator[list[list[_Piece]]]:
    held: list[list[_Piece]] = []
    size = 0
    for pieces in rows:
        held.append(pieces)
        size += sum(len(text) for text, _ in pieces)
        if len(held) == _ROWS or size > _CHUNK:
            yield held
            held, size = [], 0
    if held:
        yield held


def _learned(chat: Chat) -> list[int]:
    """Lists the turns of the assistant that are learned."""
    learned = chat.learned or [True] * len(chat.messages)
    return [n for n, one in enumerate(chat.messages) if one["role"] == "assistant" and learned[n]]


def _starts(chat: Chat) -> list[Start]:
    """Lists the beginnings of a conversation that show where learned turns begin and end."""
    starts = []
    for turn in _learned(chat):
        # No template renders an empty conversation: two are compared that differ in content.
        starts += (
            [Start(turn, prompted=True, tail=True)] if turn else [Start(1, "x"), Start(1, "y")]
        )
        if turn + 1 < len(chat.messages):
            starts.append(Start(turn + 1, tail=True))
    return starts


def _pieces(chat: Chat, rendered: Rendered, special: tuple[str, ...], seen: "Seen") -> list[_Piece]:
    """Cuts a rendered conversation where learned turns begin and end."""
    whole = rendered.whole
    answers = iter(zip(rendered.starts, rendered.tails, strict=True))
    prompt = None if rendered.prompt is None else _generation_prompt(*rendered.prompt, special)
    pieces: list[_Piece] = []
    done = 0
    for turn in _learned(chat):
        if turn:
            before = _placed(whole, *next(answers), "")
        else:
            before = _common(whole, next(answers)[0], next(answers)[0])
        last = turn + 1 == len(chat.messages)
        after = len(whole) if last else _placed(whole, *next(answers), prompt)
        if isinstance(after, str):
            raise InputError(
                f"{chat.where}: the chat template does not write turn {turn} the same way on its "
                "own as inside the whole conversation, so the assistant's tokens cannot be "
                f"found; expected a template that only appends, or {_NOT_LEARNED}"
            )
        if isinstance(before, str) or not done <= before <= after:
            raise InputError(f"{chat.where}: {_not_begun(whole[:after], before, turn, last)}")
        message: Message | None = chat.messages[turn]
        if not all(name in whole[before:after] for name in _called(chat.messages[turn])):
            message = None
            seen.uncalled += 1
        pieces += [(whole[done:before], None), (whole[before:after], message)]
        done = after
    pieces.append((whole[done:], None))
    return [(text, message) for text, message in pieces if text]


_NOT_LEARNED = (
    "the weight 0 in the turn's message, or the messages up to it as the prompt and the others as "
    "the completion, so that it is not learned"
)


@functools.lru_cache(maxsize=64)
def _generation_prompt(alone: str, prompted: str, special: tuple[str, ...]) -> str:
    """Gives the generation prompt, from texts without and with it."""
    same = _shared(alone, prompted)
    if same < len(alone):
        # The template ends with EOS, and both EOS and the prompt may begin with "<|".
        begun = (
            size
            for token in special
            for size in range(1, min(len(token), same + 1))
            if any(text.startswith(token, same - size) for text in (alone, prompted))
        )
        same -= max(begun, default=0)
    return prompted[same:]


def _placed(whole: str, start: int | str, tail: Tail | None, prompt: str | None) -> int | str:
    """Finds where a beginning ends in the whole.

    Args:
        whole: The whole conversation.
        start: The length of the beginning, or its text if the whole does not begin with it.
        tail: What follows its last message; None if it is not known.
        prompt: What the tail has after the end of the beginning; None if it is not known.

    Returns:
        Where it ends; its text if that is not found.
    """
    if isinstance(start, int) or tail is None or prompt is None:
        return start
    text = tail.text.removesuffix(prompt)
    return tail.place + len(text) if whole.startswith(text, tail.place) else start


def _called(message: Message) -> list[str]:
    """Lists the names of the functions that a message calls."""
    return [str(call["function"]["name"]) for call in message.get("tool_calls") or ()]


def _common(whole: str, *starts: int | str) -> int | str:
    """Gives the common prefix of two beginnings, as a beginning."""
    texts = [whole[:start] if isinstance(start, int) else start for start in starts]
    same = texts[0][: _shared(*texts)]
    return len(same) if whole.startswith(same) else same


def _shared(one: str, other: str) -> int:
    """Counts the characters of the common prefix of two texts."""
    sizes = range(min(len(one), len(other)))
    return bisect.bisect_left(sizes, True, key=lambda size: one[: size + 1] != other[: size + 1])


def _not_begun(written: str, before: int | str, turn: int, last: bool) -> str:
    """Explains why a turn does not begin with the generation prompt."""
    prompted = written[:before] if isinstance(before, int) else before
    same = _shared(written, prompted)
    rest = prompted[same:]
    cause = ""
    if "think" in rest:
        cause = " (it opens a think block, which the template leaves out of what was said)"
    return (
        f"the chat template's generation prompt does not begin turn {turn}: it has "
        f"{shown(rest)}{cause} where the turn has {shown(written[same:])}, so the assistant's "
        "tokens cannot be found; expected a template whose generation prompt every learned turn "
        f"begins with, or {'prompts and completions that are texts' if last else _NOT_LEARNED}"
    )


def _special_end(text: str, special: frozenset[str], longest: int) -> str:
    """Gives the special token that a text ends with, and the white space after it; or nothing."""
    bare = text.rstrip()
    # By size, since some tokenizers have thousands of special tokens.
    for start in range(max(len(bare) - longest, 0), len(bare)):
        if bare[start:] in special:
            return text[start:]
    return ""


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    return added.union(tokenizer.all_special_ids)


def _end_of_turn(
    tokenizer: "PreTrainedTokenizerBase", piece: list[int], special: set[int]
) -> int | None:
    """Finds the position after the special token that closes a turn; white space may follow it."""
    last = max((index for index, token in enumerate(piece) if token in special), default=None)
    if last is None or decoded(tokenizer, piece[last + 1 :]).strip():
        return None
    return last + 1


@dataclasses.dataclass
class Seen:
    """Collects what is not learned from the conversations, for warnings."""

    turns: int = 0
    closed: int = 0
    partial: int = 0
    uncalled: int = 0
    lost: str = ""  # the first text that a turn was to have
    fields: set[str] = dataclasses.field(default_factory=set)

    def read(self, chat: Chat) -> Chat:
        """Collects the fields that a template is given."""
        for message in chat.messages:
            self.fields.update(name for name, value in message.items() if value is not None)
        if chat.tools:
            self.fields.add("tools")
        return chat

    def add(self, text: str, message: Message, *, closed: bool) -> None:
        """Counts a turn that a template wrote as `text`."""
        self.turns += 1
        self.closed += closed
        thought = next((message[key] for key in REASONING if message.get(key) is not None), "")
        parts = [*_THINK_MARK.split(message["content"]), str(thought)]
        if lost := [part for part in map(str.strip, parts) if part not in text]:
            self.partial += 1
            self.lost = self.lost or lost[0]

    def warn(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Warns once about what is not learned."""
        if self.turns and not self.closed:
            log_once(
                tokenizer,
                "the chat template closes the assistant's turns with no special token, so no end "
                "is learned, and generation will not stop by itself: to learn one, let the "
                f"template write {{{{ eos_token }}}} ({shown(tokenizer.eos_token)}) after what "
                "the assistant says",
            )
        if self.uncalled:
            log_once(
                tokenizer,
                f"the chat template leaves out the tool calls of {self.uncalled} turns of the "
                "assistant, which are not learned; expected the template of a model that calls "
                "tools",
            )
        if self.partial:
            log_once(
                tokenizer,
                "the chat template leaves out or rewrites some of what the assistant says (its "
                f"reasoning, say) in {self.partial} of {self.turns} turns, and that is not "
                f"learned: the first such text is {shown(self.lost)}",
            )
        template = str(tokenizer.chat_template)
        fields = sorted(self.fields.difference(REASONING))
        if unread := [name for name in fields if name not in template]:
            log_once(
                tokenizer, f"the chat template does not use {shown(unread)} of the conversations"
            )
