import json
import subprocess
import sys
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.data import DataConfig, TokenizedData, eval_batches, train_stream
from loft_jax.errors import InputError


def make_data(count=23, *, seed=0, longest=30):
    """Examples that can be told apart: each begins with its own token."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    tokens = [np.r_[100 + i, np.full(n - 1, 7)] for i, n in enumerate(lengths)]
    masks = [np.arange(n) > 0 for n in lengths]
    return TokenizedData(
        tokens=np.concatenate(tokens).astype(np.int32),
        loss_mask=np.concatenate(masks),
        offsets=np.r_[0, np.cumsum(lengths)],
        pad_id=0,
    )


def make_stream(data=None, *, batch_size=4, seed=0, **options):
    config = DataConfig("rows", **{"max_length": 32, **options})
    return train_stream(data or make_data(), config, batch_size=batch_size, seed=seed)


def names(batch):
    """Which examples a batch holds, by their first tokens."""
    return batch["tokens"][batch["tokens"] >= 100].tolist()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_full_and_as_long_as_a_bucket(packing):
    stream = make_stream(packing=packing)
    for batch in islice(stream, 20):
        rows, length = batch["tokens"].shape
        assert rows == 4
        assert length in stream.buckets
        assert (batch["segment_ids"].max(axis=1) >= 1).all()
        longest = (batch["segment_ids"] > 0).sum(axis=1).max()
        assert length == min(bucket for bucket in stream.buckets if bucket >= longest)
    assert len(stream.buckets) == (1 if packing else len(set(stream.buckets)))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 7), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_epoch_holds_every_example_once(count, batch_size, packing, seed):
    data = make_data(count)
    stream = make_stream(data, batch_size=batch_size, seed=seed, packing=packing)
    epochs = 3
    steps = -(-epochs * stream.rows_per_epoch // batch_size)
    rows = [row for batch in islice(stream, steps) for row in batch["tokens"]]
    for epoch in range(epochs):
        first = epoch * stream.rows_per_epoch
        found = [n for row in rows[first : first + stream.rows_per_epoch] for n in row if n >= 100]
        assert sorted(found) == list(range(100, 100 + count))
    stream.close()


def test_packed_batches_hold_more():
    seen = {}
    for packing in (False, True):
        seen[packing] = Counter(
            n for b in islice(make_stream(packing=packing), 3) for n in names(b)
        )
    assert sum(seen[True].values()) > 1.3 * sum(seen[False].values())


def test_epochs_are_shuffled_differently():
    stream = make_stream(make_data(24))
    first, second = ([n for b in islice(stream, 6) for n in names(b)] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != sorted(first)
    assert first != second


@pytest.mark.parametrize("packing", [False, True])
def test_same_seed_same_batches_other_seed_others(packing):
    first, again, other = (
        list(islice(make_stream(seed=seed, packing=packing), 20)) for seed in (3, 3, 4)
    )
    assert_same(first, again)
    assert [names(batch) for batch in first] != [names(batch) for batch in other]


def test_next_seed_is_not_the_next_epoch():
    first, other = (make_stream(make_data(24), seed=seed) for seed in (0, 1))
    orders = [[n for b in islice(first, 6) for n in names(b)] for _ in range(4)]
    assert [n for b in islice(other, 6) for n in names(b)] not in orders


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("place", [0, 17])
def test_restored_stream_continues_to_the_bit(packing, place):
    stream = make_stream(packing=packing)
    list(islice(stream, place))
    state = json.loads(json.dumps(stream.get_state()))
    expected = list(islice(stream, 15))
    restored = make_stream(packing=packing)
    list(islice(restored, 3))  # whatever it did before
    restored.set_state(state)
    assert_same(list(islice(restored, 15)), expected)


def test_state_is_of_what_was_taken_not_of_what_was_made_ahead():
    stream = make_stream()
    next(stream)
    before = stream.get_state()
    expected = next(stream)
    assert stream.get_state() != before
    stream.set_state(before)
    assert_same([next(stream)], [expected])


def test_restored_in_another_process_continues_to_the_bit(tmp_path):
    streams = [make_stream(packing=packing) for packing in (False, True)]
    for stream in streams:
        list(islice(stream, 9))
    states = [stream.get_state() for stream in streams]
    (tmp_path / "states.json").write_text(json.dumps(states))
    program = (
        "import json, sys, numpy as np; from itertools import islice\n"
        "from tests.data.test_stream import make_stream\n"
        "for packing, state in enumerate(json.load(open(sys.argv[1] + '/states.json'))):\n"
        "    stream = make_stream(packing=bool(packing))\n"
        "    stream.set_state(state)\n"
        "    for i, batch in enumerate(islice(stream, 10)):\n"
        "        np.savez(f'{sys.argv[1]}/{packing}-{i}.npz', **batch)\n"
    )
    root = __file__.split("/tests/")[0]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=root)
    for packing, stream in enumerate(streams):
        restored = [dict(np.load(tmp_path / f"{packing}-{i}.npz")) for i in range(10)]
        assert_same(restored, list(islice(stream, 10)))


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"batch_size": 5},
        {"packing": True},
        {"buckets": (32,)},
        {"data": make_data(24)},
        {"data": make_data(23, seed=1)},
    ],
)
def test_state_of_another_stream_is_refused(other):
    state = make_stream().get_state()
    stream = make_stream(**other)
    with pytest.raises(InputError, match="from another data stream; expected the same examples"):
        stream.set_state(state)


def test_given_buckets_are_used():
    stream = make_stream(buckets=(16, 32))
    assert {batch["tokens"].shape[1] for batch in islice(stream, 30)} <= {16, 32}
    assert stream.buckets == (16, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_length": 8}, r"an example has \d+ tokens and max_length is 8"),
        ({"max_length": 8, "packing": True}, r"an example has \d+ tokens and max_length is 8"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        make_stream(**options)


def test_evaluation_holds_every_example_once_in_batches_of_one_size():
    batches = eval_batches(make_data(), DataConfig("rows", max_length=32), batch_size=4)
    assert len(batches) == 6
    assert {batch["tokens"].shape[0] for batch in batches} == {4}
    assert [batch["tokens"].shape[1] for batch in batches] == [24, 24, 24, 24, 32, 32]
    assert sorted(n for batch in batches for n in names(batch)) == list(range(100, 123))
    last = batches[-1]
    assert (last["segment_ids"][3] == 0).all()
    assert (last["loss_mask"][3] == 0).all()
    assert sum(batch["loss_mask"].sum() for batch in batches) == make_data().loss_mask.sum()
    assert_same(batches[1:3], [batches[1], batches[2]])


def test_evaluation_batch_larger_than_the_data():
    (batch,) = eval_batches(make_data(3), DataConfig("rows", max_length=32), batch_size=8)
    assert batch["tokens"].shape[0] == 8
    assert len(names(batch)) == 3
