"""Batches for training, endless and resumable, and for evaluation, each example once."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import grain
import numpy as np

from loft_jax.data.arrays import ArrayData
from loft_jax.data.batches import (
    Batch,
    bucket_lengths,
    check_batch_size,
    pack,
    pad_batch,
    smallest_bucket,
)
from loft_jax.data.config import DataConfig
from loft_jax.data.encode import TokenizedData
from loft_jax.data.images import ImageData
from loft_jax.errors import InputError

_THREADS = 2
_PREFETCH = 8  # batches made ahead
_ENDLESS = 2**48  # rows; grain's own endless repetition overflows in batches of one


class TrainStream(Iterator[Batch]):
    """An endless iterator of batches whose position can be saved; see `train_stream`.

    Attributes:
        rows_per_epoch: Number of rows that hold every example once: examples, or packed rows.
        buckets: Lengths of the batches; none for images.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        *,
        rows_per_epoch: int,
        buckets: tuple[int, ...],
        fingerprint: str,
    ) -> None:
        self.rows_per_epoch = rows_per_epoch
        self.buckets = buckets
        self._fingerprint = fingerprint
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_PREFETCH)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Gives the position in the stream, as values that JSON can hold."""
        return {**self._iterator.get_state(), "fingerprint": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position from `get_state`, of this or of another process.

        Raises:
            InputError: The position is from a stream of other data or settings.
        """
        place = dict(state)
        if place.pop("fingerprint", None) != self._fingerprint:
            raise InputError(
                "the saved position is from another data stream; expected the same examples, "
                "tokenizer, max_length, packing, buckets, batch size and seed as when it was saved"
            )
        self._iterator.set_state(place)

    def close(self) -> None:
        """Stops the threads that prefetch batches."""
        self._iterator.close()


def train_stream(
    data: TokenizedData | ImageData | ArrayData, config: DataConfig, *, batch_size: int, seed: int
) -> TrainStream:
    """Makes an endless stream of shuffled batches, the same on every machine.

    Every epoch is shuffled anew and holds every row exactly once. A batch may span two epochs, so
    that all batches are full. With `config.packing`, examples are packed into rows once, at the
    start. Batches are global: a process that needs its part of a batch slices its rows. Images are
    augmented by random numbers that depend on the seed and on the place in the stream alone.

    Args:
        data: From the `tokenize` of a task.
        config: Its `packing`, `max_length` and `buckets` are used.
        batch_size: Number of rows of a batch, over all processes.
        seed: Seed of the order, 0 to 2^32 - 1.

    Returns:
        An iterator of batches (see `pad_batch`, `ImageData.batch` for images, and
        `ArrayData.batch`). The length of a batch of tokens is the smallest bucket that holds its
        longest row.

    Raises:
        InputError: The batch size or the seed is out of range, or an example is too long.

    Example:
        >>> data = TokenizedData(
        ...     tokens=np.arange(1, 7),
        ...     loss_mask=np.asarray([False, True] * 3),
        ...     offsets=np.asarray([0, 2, 4, 6]),
        ...     pad_id=0,
        ... )
        >>> stream = train_stream(data, DataConfig("rows.jsonl"), batch_size=4, seed=0)
        >>> next(stream)["tokens"].shape, stream.rows_per_epoch
        ((4, 8), 3)
    """
    _check(data, config, batch_size)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; expected 0 to 2^32 - 1")
    rows: Sequence[np.ndarray] | np.ndarray
    if isinstance(data, ImageData):
        return _image_stream(data, batch_size=batch_size, seed=seed)
    if isinstance(data, ArrayData):
        return TrainStream(
            _endless(np.arange(len(data)), seed).batch(
                batch_size, batch_fn=lambda rows: data.batch(rows, batch_size)
            ),
            rows_per_epoch=len(data),
            buckets=(),
            fingerprint=f"{data.fingerprint}-{batch_size}-{seed}",
        )
    if config.packing:
        rows = pack(data.lengths, config.max_length, seed=seed)
        lengths = np.asarray([data.lengths[row].sum() for row in rows])
        buckets = config.buckets or bucket_lengths(lengths, batch_size)[-1:]
    else:
        rows = np.arange(len(data))[:, None]
        lengths = data.lengths
        buckets = config.buckets or bucket_lengths(lengths, batch_size)

    def batch(members: Sequence[np.ndarray]) -> Batch:
        return _batch(data, members, batch_size=batch_size, buckets=buckets)

    return TrainStream(
        _endless(rows, seed).batch(batch_size, batch_fn=batch),
        rows_per_epoch=len(rows),
        buckets=buckets,
        fingerprint=_fingerprint(data, [*buckets, config.packing, batch_size, seed]),
    )


def _endless(rows: Sequence[np.ndarray] | np.ndarray, seed: int) -> grain.MapDataset:
    """Rows in an order that is another one in every epoch."""
    return grain.MapDataset.source(rows).seed(seed).shuffle().repeat(_ENDLESS // len(rows))


def _image_stream(data: ImageData, *, batch_size: int, seed: int) -> TrainStream:
    examples = _endless(np.arange(len(data)), seed).random_map(data.augmented)
    digest = hashlib.blake2b(data.fingerprint.encode(), digest_size=16)
    augmentations = (data.config.random_resized_crop, data.config.random_horizontal_flip)
    digest.update(np.asarray([*augmentations, batch_size, seed], np.int64).tobytes())
    return TrainStream(
        examples.batch(batch_size, batch_fn=lambda some: data.batch(some, batch_size)),
        rows_per_epoch=len(data),
        buckets=(),
        fingerprint=digest.hexdigest(),
    )


class EvalBatches(Sequence[Batch]):
    """A sequence of batches that hold every example once, made on access; see `eval_batches`.

    Attributes:
        order: Indices of the examples in the order of the batches, (n,).
    """

    def __init__(
        self, order: np.ndarray, make: Callable[[np.ndarray], Batch], *, batch_size: int
    ) -> None:
        self.order = order
        self._make = make
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.order) // self._batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        starts = range(0, len(self.order), self._batch_size)[index]
        if isinstance(starts, range):
            return [self._make(self.order[i : i + self._batch_size]) for i in starts]
        return self._make(self.order[starts : starts + self._batch_size])


def eval_batches(
    data: TokenizedData | ImageData | ArrayData, config: DataConfig, *, batch_size: int
) -> EvalBatches:
    """Makes batches that hold every example once, shortest first, one example in each row.

    The last batch is padded with rows without weight, so that all have the same number of rows.

    Args:
        data: From the `tokenize` of a task.
        config: Its `buckets` are used.
        batch_size: Number of rows of a batch.

    Returns:
        A sequence of batches (see `pad_batch`, and the `batch` of `ImageData` and `ArrayData`).

    Raises:
        InputError: The batch size is out of range, or an example is too long.

    Example:
        >>> data = TokenizedData(
        ...     tokens=np.arange(1, 7),
        ...     loss_mask=np.asarray([False, True] * 3),
        ...     offsets=np.asarray([0, 2, 4, 6]),
        ...     pad_id=0,
        ... )
        >>> batches = eval_batches(data, DataConfig("rows.jsonl"), batch_size=2)
        >>> [batch["tokens"][:, 0].tolist() for batch in batches]
        [[1, 3], [5, 0]]
    """
    _check(data, config, batch_size)
    order = np.arange(len(data))
    if isinstance(data, ImageData):

        def make(some: np.ndarray) -> Batch:
            return data.batch([data.example(index) for index in some], batch_size)

    elif isinstance(data, ArrayData):

        def make(some: np.ndarray) -> Batch:
            return data.batch(some, batch_size)

    else:
        order = np.argsort(data.lengths, kind="stable")  # similar lengths together
        starts = range(0, len(order), batch_size)
        longest = [int(data.lengths[order[i : i + batch_size]].max()) for i in starts]
        buckets = config.buckets or bucket_lengths(np.asarray(longest), batch_size=1)

        def make(some: np.ndarray) -> Batch:
            return _batch(data, list(some[:, None]), batch_size=batch_size, buckets=buckets)

    return EvalBatches(order, make, batch_size=batch_size)


def _batch(
    data: TokenizedData,
    rows: Sequence[np.ndarray],
    *,
    batch_size: int,
    buckets: Sequence[int],
) -> Batch:
    examples = [[data[index] for index in members] for members in rows]
    longest = max(sum(len(example.tokens) for example in row) for row in examples)
    length = smallest_bucket(buckets, longest)
    batch = pad_batch(examples, batch_size=batch_size, length=length, pad_id=data.pad_id)
    if data.labelled is not None:  # each row is one example
        types, labels = data.labelled
        batch["token_types"] = np.zeros((batch_size, length), np.int32)
        batch["labels"] = np.zeros(batch_size, labels.dtype)
        for row, (index,) in enumerate(rows):
            start, end = data.offsets[index : index + 2]
            batch["token_types"][row, : end - start] = types[start:end]
            batch["labels"][row] = labels[index]
    return batch


def _check(
    data: TokenizedData | ImageData | ArrayData, config: DataConfig, batch_size: int
) -> None:
    check_batch_size(batch_size)
    if isinstance(data, ImageData):
        return
    for name in ("random_resized_crop", "random_horizontal_flip"):
        if getattr(config, name):
            raise InputError(f"{name} is set, but rows have no images")
    if isinstance(data, ArrayData):
        if config.packing:
            raise InputError("packing is true, but rows of arrays are not packed")
        return
    if data.labelled is not None and config.packing:
        raise InputError("packing is true, but rows with a label each are not packed")
    if (longest := int(data.lengths.max())) > config.max_length:
        raise InputError(
            f"an example has {longest} tokens and max_length is {config.max_length}; "
            "expected data tokenized with the same max_length"
        )


def _fingerprint(data: TokenizedData, settings: Sequence[int]) -> str:
    """Computes a checksum of the data and settings that a position in the stream depends on."""
    digest = hashlib.blake2b(digest_size=16)
    labelled = data.labelled or ()
    kept = (data.tokens, data.loss_mask, data.offsets, *labelled, np.asarray(settings, np.int64))
    for array in kept:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
