"""The process that renders chat templates, under limits; `templates` starts it by its path.

It imports nothing of this library. A line of its input is a chunk of rows as JSON; each row is
answered by a line. What a template does to this process ends there.
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils import chat_template_utils


class _OneDay(datetime):
    """The day of every rendering, so that what is learned is the same on every day."""

    asked = False

    @classmethod
    def now(cls, tz: Any = None) -> "_OneDay":
        """The day that templates write where there is no clock."""
        cls.asked = True
        return cls(2024, 7, 26)


def main(seconds: float, memory: int, characters: int) -> None:
    """Answers until the input ends, which it does when the other process ends.

    Args:
        seconds: That a row may take; this process is killed after them.
        memory: Bytes that it may take over what it has at its start.
        characters: That a row may become.
    """
    chat_template_utils.datetime = _OneDay  # type: ignore[misc]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process whatever it is at
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
    with contextlib.suppress(OSError, ValueError):  # where there is no such limit, or a lower one
        with open("/proc/self/statm") as pages:
            taken = int(pages.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _answer(chunk: dict[str, Any], row: dict[str, Any], characters: int) -> bytes:
    """What a row becomes, or the error of the template, as JSON."""
    try:
        return json.dumps(_render(chunk, row, characters)).encode()
    except TemplateError as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return json.dumps({"error": said[:1000]}).encode()


def _render(chunk: dict[str, Any], row: dict[str, Any], characters: int) -> dict[str, Any]:
    _OneDay.asked = False

    def render(messages: list[dict[str, Any]], prompted: bool) -> str:
        random.seed(0)  # Jinja has a filter that draws
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
    for turns, content, prompted in row["starts"]:
        messages = row["messages"][:turns]
        if content is not None:
            messages[-1] = {**messages[-1], "content": content}
        text = render(messages, prompted)
        is_start = whole.startswith(text)
        starts.append(len(text) if is_start else text)
        written += 0 if is_start else len(text)
        if written > characters:
            break
    if written > characters:
        return {"error": f"it writes more than {characters} characters"}
    return {"whole": whole, "starts": starts, "dated": _OneDay.asked}


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
