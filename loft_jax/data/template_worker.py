"""The worker process that renders chat templates under limits; `templates` starts it.

It is started by its path and imports nothing of this library. A line of its input is a chunk of
rows as JSON, and it answers each row with a line. Whatever a template does affects only this
process.
"""

import contextlib
import itertools
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils

_Messages = list[dict[str, Any]]


class _OneDay(datetime):
    """A fixed date for all renderings, so that what is learned does not depend on the day."""

    asked = False

    @classmethod
    def now(cls, tz: Any = None) -> "_OneDay":
        """Gives the date that many templates write by default."""
        cls.asked = True
        return cls(2024, 7, 26)


def main(seconds: float, memory: int, characters: int) -> None:
    """Answers rows until the input ends, which happens when the parent process ends.

    Args:
        seconds: Time limit of a row; the process is killed after it.
        memory: Memory limit in bytes, beyond what the process uses at its start.
        characters: Largest number of characters of a rendered row.
    """
    chat_template_utils.datetime = _OneDay  # type: ignore[misc]  # a class, replaced
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    _limit_memory(memory)
    for line in sys.stdin.buffer:
        chunk = json.loads(line)
        for row in chunk["rows"]:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            answer = _answer(chunk, row, characters)
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


def _limit_memory(memory: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # there is no such limit, or a lower one is set
        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _answer(chunk: dict[str, Any], row: dict[str, Any], characters: int) -> bytes:
    """Gives the rendered row, or the error of the template, as JSON."""
    try:
        return json.dumps(_render(chunk, row, characters)).encode()
    except TemplateError as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return json.dumps({"error": said[:1000]}).encode()


def _render(chunk: dict[str, Any], row: dict[str, Any], characters: int) -> dict[str, Any]:
    _OneDay.asked = False

    def render(messages: _Messages, prompted: bool) -> str:
        random.seed(0)  # Jinja has a filter that draws random numbers
        rendered = chat_template_utils.render_jinja_template(
            conversations=[messages],
            tools=row["tools"],
            chat_template=chunk["templates"][row["template"]],
            add_generation_prompt=prompted,
            **chunk["variables"],
        )
        return rendered[0][0]

    whole = render(row["messages"], False)
    starts: list[int | str] = []
    written = len(whole)
    tailed: dict[int, None] = {}  # numbers of messages
    for turns, content, prompted, tail in row["starts"]:
        messages = row["messages"][:turns]
        if content is not None:
            messages[-1] = {**messages[-1], "content": content}
        text = render(messages, prompted)
        is_start = whole.startswith(text)
        starts.append(len(text) if is_start else text)
        written += 0 if is_start else len(text)
        if written > characters:
            break
        if tail and not is_start:
            tailed[turns] = None
    tails: dict[int, tuple[int, str] | None] = {}
    prompt: tuple[str, str] | None = None
    if tailed and written <= characters:
        follows = _Follows(render, row["messages"], whole)
        tails = {turns: follows.tail(turns) for turns in tailed}
        prompt = follows.prompt()
        texts = [*(prompt or ()), *(tail[1] for tail in tails.values() if tail)]
        written += sum(map(len, texts))
    if written > characters:
        return {"error": f"it writes more than {characters} characters"}
    return {
        "whole": whole,
        "starts": starts,
        "tails": [tails.get(turns) for turns, *_ in row["starts"]],
        "prompt": prompt,
        "dated": _OneDay.asked,
    }


class _Follows:
    """Finds what is written after what a message says, by a mark in the message.

    It is found also where the template writes other messages in another way in the whole
    conversation, and where the same is said in several.

    Args:
        render: Renders messages, with or without the generation prompt.
        messages: The conversation.
        whole: Its rendering.
    """

    def __init__(
        self, render: Callable[[_Messages, bool], str], messages: _Messages, whole: str
    ) -> None:
        self._render = render
        self._messages = messages
        self._whole = whole
        taken = json.dumps(messages) + whole
        # A plain word: templates look for tags in what messages say, and may escape quotes.
        words = map("mark{}".format, itertools.count())
        self._mark = next(word for word in words if word not in taken)

    def __call__(
        self, turns: int, *, prompted: bool = False, shown: int | None = None
    ) -> str | None:
        """Gives the text after what a message says.

        Args:
            turns: Number of messages up to it.
            prompted: Whether the generation prompt follows.
            shown: Number of messages that are rendered; by default it is the last.

        Returns:
            The text; None if the template does not write the mark once, or refuses the messages.
        """
        *before, message = self._messages[:turns]
        after = self._messages[turns : shown or turns]
        for marked in self._marked(message):
            try:
                text = self._render([*before, marked, *after], prompted)
            except TemplateError:  # of a part of the conversation
                return None
            if text.count(self._mark) == 1:
                return text.partition(self._mark)[2]
        return None

    def _marked(self, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
        content = message["content"]
        # An answer comes after reasoning, which may be left out. Of other messages, templates look
        # at both ends: some take <tool_response>...</tool_response> for no question.
        at = len(content) if message["role"] == "assistant" else len(content) // 2
        yield {**message, "content": content[:at] + self._mark + content[at:]}
        if calls := message.get("tool_calls"):  # what is said beside them may be left out
            called = calls[-1]["function"]
            last = {**calls[-1], "function": {**called, "name": called["name"] + self._mark}}
            yield {**message, "tool_calls": [*calls[:-1], last]}

    def tail(self, turns: int) -> tuple[int, str] | None:
        """Gives `Tail` of `templates`; None if it is not found."""
        rest = self(turns, shown=len(self._messages))
        text = self(turns, prompted=True)
        if rest is None or text is None or not self._whole.endswith(rest):
            return None
        return len(self._whole) - len(rest), text

    def prompt(self) -> tuple[str, str] | None:
        """Gives `Rendered.prompt` of `templates`; None if it is not found."""
        for turns in range(len(self._messages), 0, -1):
            if self._messages[turns - 1]["role"] != "assistant":
                alone, prompted = self(turns), self(turns, prompted=True)
                if alone is not None and prompted is not None:
                    return alone, prompted
        return None


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
