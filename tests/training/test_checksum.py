import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loft_jax.training.checksum import tree_checksum


def arrays():
    rng = np.random.default_rng(0)
    return {
        "float32": jnp.asarray(rng.normal(size=(3, 5, 2)), jnp.float32),
        "bfloat16": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        "uint32": jnp.asarray(rng.integers(0, 2**32, 4), jnp.uint32),
        "int32": jnp.asarray(-3, jnp.int32),
        "bool": jnp.asarray([True, False]),
        "uint4": jnp.asarray([3, 14], jnp.uint4),
    }


@pytest.mark.parametrize("name", arrays())
def test_every_bit_counts(name):
    tree = arrays()
    before = tree_checksum(tree)
    place = sorted(tree).index(name)
    content = np.asarray(tree[name]).reshape(-1).copy()
    for element in range(content.size):
        bits = content.view(np.uint8)
        for byte in range(content.itemsize):
            flipped = bits.copy()
            flipped[element * content.itemsize + byte] ^= 1
            changed = flipped.view(content.dtype).reshape(tree[name].shape)
            after = tree_checksum({**tree, name: jnp.asarray(changed)})
            assert [x != y for x, y in zip(before, after, strict=True)] == [
                index == place for index in range(len(tree))
            ]


def test_places_dtypes_shapes_and_paths_count():
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    forms = [
        {"a": x},
        {"a": x[::-1]},
        {"a": x.reshape(2, 2)},
        {"b": x},
        {"a": jax.lax.bitcast_convert_type(x, jnp.int32)},
        {"a": jnp.asarray([2.0, 1.0, 4.0, 3.0])},
    ]
    digests = [tree_checksum(form)[0] for form in forms]
    assert len(set(digests)) == len(forms)


def test_minus_zero_and_nan_are_what_they_are():
    assert tree_checksum([jnp.float32(0.0)]) != tree_checksum([jnp.float32(-0.0)])
    assert tree_checksum([jnp.float32("nan")]) == tree_checksum([jnp.float32("nan")])


def test_changes_that_a_sum_of_products_would_not_see():
    """Signs, and high bits of two elements."""
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    before = tree_checksum([jnp.asarray(x)])
    assert tree_checksum([jnp.asarray(-x)]) != before
    bits = x.view(np.uint32)
    for first, second in ((0, 1), (5, 900), (17, 18)):
        for bit in (29, 30, 31):
            changed = bits.copy().reshape(-1)
            changed[[first, second]] ^= np.uint32(1 << bit)
            assert tree_checksum([jnp.asarray(changed.view(np.float32).reshape(x.shape))]) != before
