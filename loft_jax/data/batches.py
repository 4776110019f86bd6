"""Makes batches of a fixed shape from rows of tokens: padding, bucket lengths, packing."""

from collections.abc import Sequence

import numpy as np

from loft_jax.data.encode import Example
from loft_jax.errors import InputError

Batch = dict[str, np.ndarray]

_BUCKETS = 4  # every bucket costs a compilation
_WORTHWHILE = 0.9  # largest ratio to the next longer bucket that is worth a compilation
_MULTIPLE = 8


def pad_batch(
    rows: Sequence[Sequence[Example]], *, batch_size: int, length: int, pad_id: int
) -> Batch:
    """Pads rows of one or more examples to a batch.

    Args:
        rows: At most `batch_size`; the examples of a row have at most `length` tokens together.
        batch_size: Number of rows; missing ones are padded, without weight.
        length: Number of tokens of a row.
        pad_id: Token that fills the rest.

    Returns:
        `tokens`, `positions` (from 0 in each example), `segment_ids` (0 is padding, examples count
        from 1), all int32, and `loss_mask` float32; each of shape (batch_size, length).
    """
    shape = (batch_size, length)
    tokens = np.full(shape, pad_id, np.int32)
    positions, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            size = len(example.tokens)
            place = (index, slice(start, start + size))
            tokens[place] = example.tokens
            positions[place] = np.arange(size)
            segment_ids[place] = segment
            loss_mask[place] = example.loss_mask
            start += size
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segment_ids,
        "loss_mask": loss_mask,
    }


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch without rows.

    Raises:
        InputError: The number of rows is below 1.
    """
    if batch_size < 1:
        raise InputError(f"batch size is {batch_size}; expected at least 1")


def bucket_lengths(lengths: np.ndarray, batch_size: int) -> tuple[int, ...]:
    """Chooses a few lengths to pad random batches to, each for an equal share of the batches.

    The longest of b rows drawn at random is below the p-quantile of the rows with probability
    p^b; so the q-quantile of a batch's longest row is the rows' quantile at q^(1/b).

    Args:
        lengths: Lengths of the rows in tokens, (n,).
        batch_size: Number of rows b of a batch; 1 if `lengths` are the longest of each batch
            already.

    Returns:
        At most four increasing multiples of 8, each at least a tenth below the next; the last
        holds the longest row.

    Example:
        >>> bucket_lengths(np.arange(1, 101), batch_size=1)
        (32, 56, 80, 104)
    """
    shares = (np.arange(1, _BUCKETS + 1) / _BUCKETS) ** (1 / batch_size)
    quantiles = np.quantile(lengths, shares, method="higher")
    buckets: list[int] = []
    for length in -(-quantiles[::-1] // _MULTIPLE) * _MULTIPLE:  # longest first
        if not buckets or length <= _WORTHWHILE * buckets[-1]:
            buckets.append(int(length))
    return tuple(buckets[::-1])


def smallest_bucket(buckets: Sequence[int], length: int) -> int:
    """Gives the smallest of the increasing `buckets` that holds `length` tokens."""
    return next(bucket for bucket in buckets if bucket >= length)


def pack(lengths: np.ndarray, capacity: int, *, seed: int) -> list[np.ndarray]:
    """Packs examples into rows: longest first, each into the fullest row with enough room.

    Args:
        lengths: Lengths of the examples in tokens, each at most `capacity`, (n,).
        capacity: Capacity of a row in tokens.
        seed: Seed of the order of examples of equal length, and so of which share a row.

    Returns:
        The examples of each row, as indices into `lengths`.
    """
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by their remaining room
    with_room = np.zeros(capacity + 1, bool)
    for index in order:
        length = int(lengths[index])
        room = length + int(np.argmax(with_room[length:]))
        if with_room[room]:
            row = by_room[room].pop()
            with_room[room] = bool(by_room[room])
        else:
            row, room = len(rows), capacity
            rows.append([])
        rows[row].append(int(index))
        by_room[room - length].append(row)
        with_room[room - length] = True
    return [np.asarray(row) for row in rows]
