import itertools

import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.data import Example
from loft_jax.data.batches import bucket_lengths, pack, pad_batch, smallest_bucket
from loft_jax.hub.pretrained import load_pretrained
from loft_jax.tasks.causal_lm import CausalLM, predicted
from tests.tiny import save_tiny_llama


def example(tokens, learned):
    mask = np.zeros(len(tokens), bool)
    mask[len(tokens) - learned :] = True
    return Example(np.asarray(tokens, np.int32), mask)


def test_layout_of_packed_and_missing_rows():
    rows = [[example([5, 6, 7], 1), example([8, 9], 1)], [example([4, 3], 1)]]
    batch = pad_batch(rows, batch_size=3, length=6, pad_id=1)
    expected = {
        "tokens": [[5, 6, 7, 8, 9, 1], [4, 3, 1, 1, 1, 1], [1] * 6],
        "positions": [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6],
        "loss_mask": [[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6],
    }
    assert batch.keys() == expected.keys()
    for key, values in expected.items():
        assert batch[key].tolist() == values, key
        assert batch[key].dtype == (np.float32 if key == "loss_mask" else np.int32)


@given(st.lists(st.integers(2, 300), min_size=1, max_size=60), st.integers(1, 32))
def test_buckets_are_few_increasing_and_hold_the_longest(lengths, batch_size):
    buckets = bucket_lengths(np.asarray(lengths), batch_size)
    assert 1 <= len(buckets) <= 4
    assert all(low <= 0.9 * high for low, high in itertools.pairwise(buckets))
    assert max(lengths) <= buckets[-1] < max(lengths) + 8
    assert all(bucket % 8 == 0 for bucket in buckets)


def test_buckets_share_random_batches_evenly():
    rng = np.random.default_rng(0)
    lengths = 10 + rng.exponential(200, 5000).astype(int)
    buckets = bucket_lengths(lengths, batch_size=16)
    longest = rng.choice(lengths, (4000, 16)).max(axis=1)
    counts = np.bincount([buckets.index(smallest_bucket(buckets, n)) for n in longest])
    np.testing.assert_allclose(counts / 4000, 0.25, atol=0.05)


def test_buckets_of_alike_lengths_are_one():
    assert bucket_lengths(np.arange(460, 501), batch_size=4) == (504,)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(40, 64), st.integers(0, 9)
)
def test_packing_holds_every_example_once_within_capacity(lengths, capacity, seed):
    lengths = np.asarray(lengths)
    rows = pack(lengths, capacity, seed=seed)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    sums = [lengths[row].sum() for row in rows]
    assert max(sums) <= capacity
    # First-fit and best-fit leave at most one row half empty.
    assert sum(total * 2 <= capacity for total in sums) <= 1


def test_packing_wastes_little():
    lengths = np.random.default_rng(0).integers(5, 200, 3000)
    rows = pack(lengths, 512, seed=0)
    assert lengths.sum() / (len(rows) * 512) > 0.98


def test_packing_is_the_same_for_a_seed_and_differs_between_seeds():
    lengths = np.full(20, 10)
    first, again, other = (pack(lengths, 25, seed=seed) for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_packed_rows_give_the_loss_of_separate_rows(tmp_path):
    model = load_pretrained(save_tiny_llama(tmp_path / "llama"))
    rng = np.random.default_rng(0)
    examples = [example(rng.integers(5, 400, n), learned=n // 2) for n in (9, 5, 12, 7, 3)]

    @nnx.jit
    def loss(model, batch):
        return CausalLM().loss(model, batch)

    def loss_of(rows, **shape):
        return np.asarray(loss(model, predicted(pad_batch(rows, pad_id=0, **shape))))

    packed = loss_of([examples[:3], examples[3:]], batch_size=2, length=32)
    separate = sum(loss_of([[one]], batch_size=1, length=12) for one in examples)
    np.testing.assert_allclose(packed, separate, rtol=1e-5)
    assert packed[1] == 4 + 2 + 6 + 3 + 1
