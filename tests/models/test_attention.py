import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.masking_utils import create_sliding_window_causal_mask

from loft_jax.models.attention import KVCache, attend, positions_from, visibility, windowed


def test_visibility_of_packed_and_padded_rows():
    segment_ids = jnp.array([[1, 1, 2, 2, 0], [0, 0, 1, 1, 1]])
    visible, _ = visibility(2, 5, segment_ids, None)
    expected = np.zeros((2, 5, 5), bool)
    for row, query, key in np.ndindex(expected.shape):
        ids = np.asarray(segment_ids[row])
        expected[row, query, key] = key <= query and ids[query] == ids[key] != 0
    np.testing.assert_array_equal(visible, expected)
    np.testing.assert_array_equal(positions_from(visible), [[0, 1, 0, 1, 0], [0, 0, 0, 1, 2]])


def test_branches_of_a_text_see_it_and_themselves():
    branch_ids = jnp.array([[0, 0, 1, 1, 2, 3, 0]])
    segment_ids = jnp.array([[1, 1, 1, 1, 1, 1, 0]])
    visible, _ = visibility(1, 7, segment_ids, None, branch_ids)
    seen = [np.flatnonzero(row).tolist() for row in np.asarray(visible[0])]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 5], []]
    np.testing.assert_array_equal(positions_from(visible), [[0, 1, 2, 3, 2, 2, 0]])
    unpadded, _ = visibility(1, 6, None, None, branch_ids[:, :6])
    np.testing.assert_array_equal(unpadded, visible[:, :6, :6])


def test_branches_are_not_for_a_cache():
    cache = KVCache.empty(layers=1, batch=1, length=8, kv_heads=1, head_dim=2, dtype=jnp.float32)
    with pytest.raises(ValueError, match="branch_ids are given with a cache"):
        visibility(1, 2, None, cache, jnp.zeros((1, 2), jnp.int32))


def test_visibility_with_a_cache_is_a_window_of_the_whole():
    segment_ids = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])  # padded left; right
    whole, _ = visibility(2, 6, segment_ids, None)
    cache = KVCache.empty(layers=1, batch=2, length=8, kv_heads=1, head_dim=2, dtype=jnp.float32)
    first, cache = visibility(2, 4, segment_ids[:, :4], cache)
    np.testing.assert_array_equal(first[:, :, :6], whole[:, :4])
    cache = KVCache(cache.keys, cache.values, cache.segment_ids, jnp.int32(4))
    second, _ = visibility(2, 2, segment_ids[:, 4:], cache)
    np.testing.assert_array_equal(second[:, :, :6], whole[:, 4:])
    assert not second[:, :, 6:].any()
    np.testing.assert_array_equal(
        np.concatenate([positions_from(first), positions_from(second)], 1),
        [[0, 0, 1, 2, 3, 4], [0, 1, 2, 0, 3, 4]],
    )


def test_a_window_is_that_of_transformers_where_texts_have_no_holes():
    config = transformers.MistralConfig(sliding_window=3, attn_implementation="eager")
    segment_ids = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    expected = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(3, 7, 4),
        attention_mask=torch.tensor(segment_ids),
        cache=None,
        position_ids=None,
    )
    found = windowed(visibility(3, 7, jnp.asarray(segment_ids), None)[0], 3)
    real = segment_ids != 0  # padding as a query is not defined
    np.testing.assert_array_equal(np.asarray(found)[real], (expected[:, 0] == 0).numpy()[real])


@pytest.mark.parametrize("window", [1, 2, 3, 9, 10])
def test_a_window_counts_positions_of_packed_padded_and_branched_rows(window):
    segment_ids = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    branch_ids = jnp.array([[0, 0, 0, 0, 0, 0, 1, 2, 0], [0, 0, 0, 0, 0, 1, 1, 2, 2]])
    visible, _ = visibility(2, 9, segment_ids, None, branch_ids)
    positions = positions_from(visible)
    back = positions[:, :, None] - positions[:, None, :]  # (b, t, t)
    np.testing.assert_array_equal(windowed(visible, window), visible & (back < window))


@pytest.mark.parametrize("window", [2, 3, 8])
def test_a_window_with_a_cache_counts_tokens_not_slots(window):
    segment_ids = jnp.array([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])  # padded left; right
    whole = windowed(visibility(2, 6, segment_ids, None)[0], window)
    cache = KVCache.empty(layers=1, batch=2, length=8, kv_heads=1, head_dim=2, dtype=jnp.float32)
    first, cache = visibility(2, 4, segment_ids[:, :4], cache)
    np.testing.assert_array_equal(windowed(first, window)[:, :, :6], whole[:, :4])
    second, _ = visibility(
        2, 2, segment_ids[:, 4:], dataclasses.replace(cache, length=jnp.int32(4))
    )
    np.testing.assert_array_equal(windowed(second, window)[:, :, :6], whole[:, 4:])


def test_attend_equals_torch():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 5, 6, 8)).astype(np.float32)  # (b, t, heads, head_dim)
    keys, values = rng.normal(size=(2, 2, 2, 7, 8)).astype(np.float32)  # (b, kv_heads, s, head_dim)
    visible = rng.random((2, 5, 7)) > 0.4
    visible[:, :, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        torch.tensor(queries).transpose(1, 2),
        torch.tensor(keys),
        torch.tensor(values),
        attn_mask=torch.tensor(visible)[:, None],
        enable_gqa=True,
    ).transpose(1, 2)
    np.testing.assert_allclose(attend(queries, keys, values, visible), expected, atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    x = jnp.ones((1, 3, 1, 4))
    keys = jnp.ones((1, 1, 3, 4))
    assert jnp.isfinite(attend(x, keys, keys, jnp.zeros((1, 3, 3), bool))).all()
