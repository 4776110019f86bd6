"""The worker process that renders chat templates under limits; `templates` starts it.

It is started by its path and imports nothing of this library. A line of its input is a chunk of
rows as JSON, and it answers each row with a line. Whatever a template does affects only this
process.
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

    def render(messages: list[dict[str, Any]], prompted: bool) -> str:
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
