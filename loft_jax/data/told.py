"""What rows have and nothing is learned from, told by the log: each sentence once a run.

A run looks at its held-out examples again and again; they need not be told of each time. It has a
tokenizer of its own, and what was told is kept as long as that.
"""

import dataclasses
import logging
import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

from loft_jax.data.config import DataConfig
from loft_jax.errors import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_CONTEXT = 20  # characters shown of each side of a join


_told: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, set[str]]" = weakref.WeakKeyDictionary()


def tell(tokenizer: "PreTrainedTokenizerBase", sentence: str, level: int = logging.WARNING) -> None:
    """Logs a sentence, if it was not logged before with this tokenizer.

    Args:
        tokenizer: That of the run.
        sentence: Whole, with its numbers and names: another number is told again.
        level: Of the log.
    """
    told = _told.setdefault(tokenizer, set())
    if sentence not in told:
        told.add(sentence)
        _log.log(level, "%s", sentence)


def tell_unused(
    tokenizer: "PreTrainedTokenizerBase",
    columns: Collection[str],
    used: Collection[str],
    config: DataConfig,
) -> None:
    """Tells which fields are passed over: a warning if examples could be read from them.

    Args:
        tokenizer: That of the run.
        columns: The fields of the rows.
        used: Those that are read.
        config: Its field names are used.
    """
    others = [name for name in columns if name not in used]
    if rivals := sorted(config.fields.intersection(others)):
        tell(
            tokenizer,
            f"the fields {shown(rivals)} of the rows are not used: {shown(list(used))} go before "
            "them",
        )
    if rest := [name for name in others if name not in rivals]:
        tell(tokenizer, f"the fields {shown(rest)} of the rows are not used", logging.INFO)


@dataclasses.dataclass
class Joins:
    """Whether white space stands between prompts and what follows them."""

    apart: int = 0
    joined: int = 0
    first: str = ""  # how the first prompt without it is joined

    def add(self, prompt: str, following: str) -> None:
        """Looks at a pair; one with an empty side says nothing."""
        if not (prompt and following):
            return
        if prompt[-1].isspace() or following[0].isspace():
            self.apart += 1
        else:
            self.joined += 1
            self.first = self.first or prompt[-_CONTEXT:] + following[:_CONTEXT]

    def tell(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Warns if there is none in most pairs."""
        if self.joined > self.apart:
            tell(
                tokenizer,
                f"{self.joined} of {self.joined + self.apart} times there is no white space "
                "between a prompt and what follows, and none is put there: the first of them "
                f"becomes {shown(self.first)}; where words are to be apart, begin the completion "
                "or choice with a space",
            )
