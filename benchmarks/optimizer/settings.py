"""What `python -m benchmarks.optimizer` is asked to measure."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from benchmarks.history import RESULTS
from benchmarks.optimizer.contestants import Contestant
from loft_jax.errors import InputError

Group = Literal["update", "compile", "train"]

RANK = 16
"""Of the compile and train groups."""


@dataclass(frozen=True)
class Bench:
    """Measure optimizer updates, their compilation, and the whole training step."""

    cases: tuple[Group, ...] = get_args(Group)
    """What to measure."""
    optimizers: tuple[Contestant, ...] = tuple(
        name
        for name in get_args(Contestant)
        if "fused" not in name  # the same as without, on CPUs
    )
    """Contestants; ratios are to adamw and dense, where they take part."""
    shapes: tuple[str, ...] = ("256x256", "1024x1024x8", "4096x4096", "4096x11008", "8192x8192")
    """Weights of the update group: INxOUT, or INxOUTxPAIRS for several pairs."""
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    """Ranks of the update group."""
    rounds: int = 40
    """Turns of each contestant at most."""
    seconds: float = 30.0
    """Time for the turns of an update case; they end early, but not before three rounds."""
    batches: tuple[str, ...] = ("8x128", "16x128")
    """Batches of the train group: ROWSxTOKENS."""
    train_rounds: int = 12
    """Steps of each contestant in the train group, after two to warm up."""
    memory_gib: float = 8.0
    """What one contestant of an update case may take; above it is skipped, as the table says."""
    model: str = "assets/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Model of the train group; where the file is missing, the same sizes with random weights."""
    results: Path = RESULTS
    """Folder of the results: add to those that are kept, or start others."""
    quick: bool = False
    """Tiny sizes and two rounds, to see that it runs: its numbers mean nothing."""

    def sizes(self) -> list[tuple[int, int, int]]:
        """The shapes of the update group as (in, out, pairs).

        Raises:
            InputError: One that is not INxOUT or INxOUTxPAIRS.
        """
        found = []
        for text in self.shapes:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
                raise InputError(
                    f"shapes holds {text!r}, expected INxOUT or INxOUTxPAIRS: 1024x1024x8"
                )
            m, n, pairs = (*map(int, text.split("x")), 1)[:3]
            found.append((m, n, pairs))
        return found
