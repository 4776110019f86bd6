"""Finds the messages between devices in a compiled program."""

import math
import re
from dataclasses import dataclass

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_CALL = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(.*channel_id=(\d+)")
_ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program.

    Args:
        kind: XLA's name: "all-gather", "all-reduce", ...
        count: Number in the program; one in a loop over layers counts once.
        bytes: Total size of their results on one device.
    """

    kind: str
    count: int
    bytes: int


def find_collectives(program: str) -> list[Collective]:
    """Finds the collectives in the text of a compiled program.

    An asynchronous collective appears in several places, with one channel, and is counted once a
    channel. So copies of one function, which share channels, count once too.

    Args:
        program: From `compiled.as_text()`.

    Returns:
        One entry for each kind, the largest first.

    Example:
        >>> find_collectives("%x = bf16[8,16]{1,0} all-gather(%p), channel_id=3, dimensions={0}")
        [Collective(kind='all-gather', count=1, bytes=256)]
    """
    results: dict[tuple[str, str], int] = {}
    for shapes, kind, start, channel in _CALL.findall(program):
        shaped = _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shapes))
        arrays = [_bytes(*array) for array in shaped if array != ("u32", "")]  # handles
        # A start returns its operands with its results; an all-reduce has both in one place.
        if start and kind != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        size = sum(arrays)
        results[kind, channel] = max(results.get((kind, channel), 0), size)
    found = [
        Collective(kind, len(sizes), sum(sizes))
        for kind in _KINDS.split("|")
        if (sizes := [size for (of, _), size in results.items() if of == kind])
    ]
    return sorted(found, key=lambda collective: -collective.bytes)


def _bytes(dtype: str, shape: str) -> int:
    bits = re.search(r"\d+", dtype)
    size = max(1, int(bits.group()) // 8) if bits else 1  # pred
    return size * math.prod(int(n) for n in shape.split(",") if n)
