"""What rows have and nothing is learned from, told by the log: each sentence once a process.

A run looks at its held-out examples again and again; they need not be told of each time.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection

from loft_jax.data.config import DataConfig
from loft_jax.errors import shown

_log = logging.getLogger(__name__)

_CONTEXT = 20  # characters shown of each side of a join


@functools.lru_cache(maxsize=1000)
def tell(sentence: str, level: int = logging.WARNING) -> None:
    """Logs a sentence, if it was not logged before."""
    _log.log(level, "%s", sentence)


def tell_unused(columns: Collection[str], used: Collection[str], config: DataConfig) -> None:
    """Tells which fields are passed over: a warning if examples could be read from them.

    Args:
        columns: The fields of the rows.
        used: Those that are read.
        config: Its field names are used.
    """
    others = [name for name in columns if name not in used]
    if rivals := sorted(config.fields.intersection(others)):
        tell(
            f"the fields {shown(rivals)} of the rows are not used: {shown(list(used))} go before "
            "them"
        )
    if rest := [name for name in others if name not in rivals]:
        tell(f"the fields {shown(rest)} of the rows are not used", logging.INFO)


@dataclasses.dataclass
class Joins:
    """Whether white space stands between prompts and what follows them."""

    apart: bool = False
    first: str = ""  # how the first prompt without it is joined

    def add(self, prompt: str, following: str) -> None:
        """Looks at a pair; one with an empty side says nothing."""
        if not (prompt and following):
            return
        if prompt[-1].isspace() or following[0].isspace():
            self.apart = True
        elif not self.first:
            self.first = prompt[-_CONTEXT:] + following[:_CONTEXT]

    def tell(self) -> None:
        """Warns if there is none in any pair."""
        if self.first and not self.apart:
            tell(
                "no prompt has white space between it and what follows, and none is put there: the "
                f"first of them becomes {shown(self.first)}; where words are to be apart, begin "
                "the completion or choice with a space"
            )
