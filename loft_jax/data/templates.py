"""Renders chat templates, which are untrusted programs, in a separate process."""

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loft_jax.data.log_once import log_once
from loft_jax.errors import InputError, cut, explained, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 4.0  # time limit of a row
_MEMORY = 2**31  # limit of the memory for rendering, in bytes
_CHARACTERS = 2**24  # largest number of characters of a rendered row
_ROWS = 64  # number of rows sent at once, unless they exceed this many characters:
_CHUNK = 2**20

REASONING = ("reasoning_content", "thinking", "reasoning")  # the first found is used

_WORKER = Path(__file__).with_name("template_worker.py")

Message = dict[str, Any]


class Start(NamedTuple):
    """The beginning of a conversation.

    Args:
        turns: Number of its messages.
        content: Replaces the content of the last message, unless it is None.
        prompted: Whether the generation prompt follows the messages.
        tail: Whether a `Tail` is needed if the whole text does not begin with it.
    """

    turns: int
    content: str | None = None
    prompted: bool = False
    tail: bool = False


class Tail(NamedTuple):
    """What follows the last message of a beginning, where the template does not only append.

    Args:
        place: Where what follows the message begins in the whole text.
        text: What follows the message if it is the last, up to the end of the generation prompt.
    """

    place: int
    text: str


class Chat(NamedTuple):
    """A conversation to render.

    Args:
        where: Its place in the data, for messages of errors.
        messages: Its messages.
        tools: JSON schemas of the tools that the assistant may call, if the row has any.
        learned: For each message, whether it is learned if it is the assistant's; by default all.
    """

    where: str
    messages: Sequence[Message]
    tools: list[dict[str, Any]] | None = None
    learned: Sequence[bool] | None = None


class Rendered(NamedTuple):
    """A conversation as rendered by its template.

    Args:
        whole: The whole text.
        starts: For each requested start, its length if the whole text begins with it, else its
            text.
        tails: For each requested start, its tail if one is needed and found, else None.
        prompt: What follows a message that is not the assistant's if it is the last, without and
            with the generation prompt; None if no tail is needed or it is not found.
    """

    whole: str
    starts: list[int | str]
    tails: Sequence[Tail | None] = ()
    prompt: Sequence[str] | None = None


def render_chats(
    tokenizer: "PreTrainedTokenizerBase", chats: Iterable[tuple[Chat, Sequence[Start]]]
) -> Iterator[tuple[Chat, Rendered]]:
    """Renders conversations as `tokenizer.apply_chat_template` does, in another process.

    A template is a program in the files of a model. It runs in another process under limits on its
    time, its memory and the length of its output, and its exceptions become one error. The date
    there is always 26 July 2024, the default of many templates: otherwise a template that writes
    the date would teach another text every day. A warning is logged if a template writes the date.

    Args:
        tokenizer: Has the template and its special tokens.
        chats: Conversations, each with the beginnings to render too.

    Yields:
        The conversations, each with its rendering.

    Raises:
        InputError: There is no template, or it refuses a conversation, fails on it or exceeds a
            limit.
    """
    dated = False
    unanswered = 0
    worker: _Worker | None = None
    try:
        for chunk, text in _chunks(tokenizer, chats):
            worker = worker or _take()
            _hand_over(worker, text, chunk[0][0].where)
            unanswered = len(chunk)
            for chat, _ in chunk:
                answer = _answer(worker, chat.where)
                unanswered -= 1
                if "error" in answer:
                    said = cut(" ".join(answer["error"].split()))
                    raise InputError(
                        f"{chat.where}: the chat template refuses the messages: {said}"
                    )
                dated |= answer["dated"]
                tails = [tail and Tail(*tail) for tail in answer["tails"]]
                yield chat, Rendered(answer["whole"], answer["starts"], tails, answer["prompt"])
    finally:
        if worker and unanswered:
            _end(worker)  # the next caller must not read its remaining output
        elif worker:
            _idle.append(worker)
    if dated:
        log_once(
            tokenizer,
            "the chat template writes the day: it is 26 July 2024 in every example, so that what "
            "is learned does not depend on the day of the run",
        )


def _chunks(
    tokenizer: "PreTrainedTokenizerBase", chats: Iterable[tuple[Chat, Sequence[Start]]]
) -> Iterator[tuple[list[tuple[Chat, Sequence[Start]]], str]]:
    """Yields chunks of conversations, each with the text to send to the worker."""
    held: list[tuple[Chat, Sequence[Start]]] = []
    rows: list[str] = []
    templates: dict[str, int] = {}

    def text() -> str:
        header = {"templates": list(templates), "variables": tokenizer.special_tokens_map}
        return f'{json.dumps(header, default=str)[:-1]}, "rows": [{", ".join(rows)}]}}\n'

    for chat, starts in chats:
        template = _template(tokenizer, chat)
        row = {
            "template": templates.setdefault(template, len(templates)),
            "messages": [_uniform(message) for message in chat.messages],
            "tools": chat.tools,
            "starts": starts,
        }
        with explained(f"{chat.where}: cannot be given to the chat template"):
            rows.append(json.dumps(row, default=_placeholder))
        held.append((chat, starts))
        if len(rows) == _ROWS or sum(map(len, rows)) > _CHUNK:
            yield held, text()
            held, rows = [], []
    if held:
        yield held, text()


def _uniform(message: Message) -> Message:
    """Gives the fields that transformers 5.23 and newer give a template; older ones do not."""
    kept = {key: value for key, value in message.items() if value is not None}
    for key in REASONING:
        if key in kept:
            return {"thinking": kept[key], **kept, "reasoning_content": kept[key]}
    return kept


def _placeholder(value: Any) -> str:
    return f"<{type(value).__name__}>"  # transformers gives a template this text instead


def _template(tokenizer: "PreTrainedTokenizerBase", chat: Chat) -> str:
    if not tokenizer.chat_template:
        raise InputError(
            f"{chat.where}: the tokenizer has no chat template; expected one, "
            "or prompt and completion fields in place of messages"
        )
    try:
        template = tokenizer.get_chat_template(None, chat.tools)
    except ValueError as error:
        raise InputError(
            f"{chat.where}: the tokenizer has chat templates of the names "
            f"{shown(sorted(tokenizer.chat_template))}; expected one of the name 'default'"
        ) from error
    if not isinstance(template, str):
        raise InputError(f"{chat.where}: the chat template is {shown(template)}; expected a text")
    return template


_Worker = subprocess.Popen[bytes]

_idle: list[_Worker] = []


def _take() -> _Worker:
    """Gives an idle worker, or starts a new one."""
    while _idle:
        if (worker := _idle.pop()).poll() is None:
            return worker
    limits = map(str, (_SECONDS, _MEMORY, _CHARACTERS))
    # -P: it must not import the files beside it. PYTHONHASHSEED: sets have the same order always.
    return subprocess.Popen(
        [sys.executable, "-P", str(_WORKER), *limits],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"},
        start_new_session=True,  # a keyboard interrupt is handled by this process
    )


def _hand_over(worker: _Worker, text: str, where: str) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(text.encode())
        worker.stdin.flush()
    except OSError as error:
        raise _ended(worker, where) from error


def _answer(worker: _Worker, where: str) -> dict[str, Any]:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line.endswith(b"\n"):
        raise _ended(worker, where)
    return json.loads(line)


def _ended(worker: _Worker, where: str) -> InputError:
    code = worker.wait()
    if code == -signal.SIGALRM:
        return InputError(f"{where}: the chat template takes more than {_SECONDS:g} seconds")
    return InputError(
        f"{where}: the process that renders the chat template ended, with the code {code}"
    )


def _end(worker: _Worker) -> None:
    worker.kill()
    worker.communicate()


@atexit.register
def _end_idle() -> None:
    while _idle:
        _end(_idle.pop())
