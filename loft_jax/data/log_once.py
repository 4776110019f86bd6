"""Logs what is not learned from the rows of a run, each sentence once.

A run reads its held-out examples many times, which must not repeat the warnings. Every run has its
own tokenizer, so the sentences that were logged are kept for each tokenizer.
"""

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from loft_jax.data.config import DataConfig
from loft_jax.errors import shown

_log = logging.getLogger(__name__)

_CONTEXT = 20  # number of characters shown on each side of a join

# Of the `recorded` contexts of this thread.
_records: ContextVar[tuple[list["Logged"], ...]] = ContextVar("_records", default=())
_logged: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


class Logged(NamedTuple):
    """A sentence that was logged, or would have been if it had not been logged before."""

    sentence: str
    level: int
    once: bool


@contextlib.contextmanager
def recorded() -> Iterator[list[Logged]]:
    """Records what is logged, so that `log_again` can log it where the work is not done again.

    Yields:
        A list that grows as sentences are logged.
    """
    record: list[Logged] = []
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


def log_again(tokenizer: Any, record: Iterable[Logged]) -> None:
    """Logs what was recorded with another tokenizer."""
    for sentence, level, once in record:
        if once:
            log_once(tokenizer, sentence, level)
        else:
            log_now(sentence, level)


def log_now(sentence: str, level: int = logging.WARNING) -> None:
    """Logs a sentence, as often as this is called."""
    for record in _records.get():
        record.append(Logged(sentence, level, once=False))
    _log.log(level, "%s", sentence)


def log_once(tokenizer: Any, sentence: str, level: int = logging.WARNING) -> None:
    """Logs a sentence, unless it was logged before with this tokenizer.

    Args:
        tokenizer: Tokenizer or image processor of the run.
        sentence: With its numbers and names, so that one with another number is logged again.
        level: Level of the log record.
    """
    for record in _records.get():
        record.append(Logged(sentence, level, once=True))
    logged = _logged.setdefault(tokenizer, set())
    if sentence not in logged:
        logged.add(sentence)
        _log.log(level, "%s", sentence)


def log_unused(
    tokenizer: Any,
    columns: Collection[str],
    used: Collection[str],
    config: DataConfig,
) -> None:
    """Logs which fields are not used: as a warning if examples could be read from them.

    Args:
        tokenizer: Tokenizer or image processor of the run.
        columns: The fields of the rows.
        used: The fields that are read.
        config: Its field names are used.
    """
    others = [name for name in columns if name not in used]
    if rivals := sorted(config.fields.intersection(others)):
        log_once(
            tokenizer,
            f"the fields {shown(rivals)} of the rows are not used: {shown(list(used))} go before "
            "them",
        )
    if rest := [name for name in others if name not in rivals]:
        log_once(tokenizer, f"the fields {shown(rest)} of the rows are not used", logging.INFO)


@dataclasses.dataclass
class Joins:
    """Counts prompts with and without white space between them and what follows."""

    apart: int = 0
    joined: int = 0
    first: str = ""  # how the first prompt without white space is joined

    def add(self, prompt: str, following: str) -> None:
        """Counts a pair, unless one side is empty."""
        if not (prompt and following):
            return
        if prompt[-1].isspace() or following[0].isspace():
            self.apart += 1
        else:
            self.joined += 1
            self.first = self.first or prompt[-_CONTEXT:] + following[:_CONTEXT]

    def warn(self, tokenizer: Any) -> None:
        """Warns if most pairs have no white space."""
        if self.joined > self.apart:
            log_once(
                tokenizer,
                f"{self.joined} of {self.joined + self.apart} times there is no white space "
                "between a prompt and what follows, and none is put there: the first of them "
                f"becomes {shown(self.first)}; where words are to be apart, begin the completion "
                "or choice with a space",
            )
