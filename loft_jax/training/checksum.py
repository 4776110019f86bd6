"""Checksums of arrays, independent of how they are split over devices, and of plain values."""

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_LANES = (0x9E3779B9, 0x85EBCA6B)  # seeds; a change that one lane misses is found by the other


def tree_checksum(tree: Any) -> list[str]:
    """Computes a checksum of every array of a tree, from its bits, dtype, shape and path.

    The checksum is `sum_i h(x_i ^ h(i)) mod 2^32` over the bits x of the elements, with two seeds;
    h is a bijection that mixes bits. Integer sums do not depend on the order, so the checksum is
    the same on any mesh, and no array leaves its devices. Damage to one element always changes it;
    other damage changes it except by chance.

    Args:
        tree: Arrays. If they are split over several processes, every process calls this and gets
            the same result.

    Returns:
        16 hexadecimal digits for each array, in the order of the leaves.

    Example:
        >>> tree_checksum({"a": jnp.zeros(3), "b": jnp.zeros((3, 1))})
        ['36712c913ab69641', '12d7f4601e104eb0']
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    replicated = next(
        (
            NamedSharding(leaf.sharding.mesh, PartitionSpec())
            for _, leaf in leaves
            if isinstance(getattr(leaf, "sharding", None), NamedSharding)
        ),
        None,
    )
    sums = jax.jit(_sums, out_shardings=replicated)([_on_device(leaf) for _, leaf in leaves])
    checksums = []
    for (path, leaf), lanes in zip(leaves, np.asarray(sums), strict=True):
        named = f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode()
        checksums.append("".join(f"{int(lane) ^ zlib.crc32(named):08x}" for lane in lanes))
    return checksums


def json_checksum(values: Any) -> str:
    """Computes a checksum of what JSON can hold, in any order of keys: 32 hexadecimal digits."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _on_device(leaf: Any) -> Any:
    """Moves an array to its devices if it is in host memory."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or sharding.memory_kind in (None, "device"):
        return leaf
    return jax.device_put(leaf, sharding.with_memory_kind("device"))


def _sums(leaves: list[jax.Array]) -> jax.Array:
    """Computes the sums of all leaves, (leaves, lanes) uint32."""
    return jnp.stack([jnp.stack(_mixed_sums(leaf)) for leaf in leaves])


def _mixed_sums(leaf: jax.Array) -> Sequence[jax.Array]:
    """Computes the sums of one leaf, one for each lane."""
    if leaf.dtype in (jnp.bool_, jnp.int4, jnp.uint4):  # less than a byte
        leaf = leaf.astype(jnp.uint8)
    bits = leaf.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{min(bits, 32)}"))
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    words = words.astype(jnp.uint32)
    mixed = [_mixed(words ^ _mixed(place + jnp.uint32(seed))) for seed in _LANES]
    # One reduction, so that XLA does not materialize the array that is summed.
    zeros = [jnp.uint32(0)] * len(mixed)
    return jax.lax.reduce(mixed, zeros, _added, tuple(range(words.ndim)))


def _added(x: Sequence[jax.Array], y: Sequence[jax.Array]) -> list[jax.Array]:
    return [one + other for one, other in zip(x, y, strict=True)]


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of x reaches every bit of the result."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
