"""Which leaves of a parameter tree are the two factors of one adapter, and their matrix form.

An adapter adds `W = s A B` to a base weight. Its factors are two leaves of the tree with sibling
paths, `A` of shape `(*stack, *in, r)` and `B` of shape `(*stack, r, *out)`. The mathematics sees
both alike, as stacks of tall matrices (see `loft_jax.optim.tall`): `A` and `Bᵀ` with their axes of
features folded to one.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loft_jax.optim.tall import Tall

FactorNames = Sequence[tuple[str, str]]
"""Endings of the paths of the two factors of a pair, as `(("lora_a", "lora_b"), ...)`."""

Number = float | jax.Array
"""A hyperparameter: known, or traced as `optax.inject_hyperparams` does."""

Scaling = Number | Callable[[str], float]
"""The s of `W = s A B`: one number, or a function of the pair's path."""

DEFAULT_FACTOR_NAMES: FactorNames = (("lora_a", "lora_b"), ("lora_A", "lora_B"))


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a pair: where it stands in the tree, and how it folds to tall matrices.

    Attributes:
      index: Position among the leaves of the tree.
      path: Of the leaf, `"layers/q_proj/lora_a"`.
      stack: Shape of the stacked (scanned) axes, in front; empty for one layer.
      features: Shape of the input axes for A, of the output axes for B.
      rank_last: Whether the rank axis stands behind the features (A) or before them (B).
    """

    index: int
    path: str
    stack: tuple[int, ...]
    features: tuple[int, ...]
    rank_last: bool

    def fold(self, x: jax.Array) -> jax.Array:
        """A leaf of this factor's layout as (stack, features, k), or (stack, k, features) for B."""
        stack, features = math.prod(self.stack), math.prod(self.features)
        if self.rank_last:
            return x.reshape(stack, features, x.shape[-1])
        return x.reshape(stack, x.shape[len(self.stack)], features)

    def unfold(self, x: jax.Array) -> jax.Array:
        """Undoes `fold`, with any k."""
        k = x.shape[2 if self.rank_last else 1]
        return x.reshape(self.shape(k))

    def shape(self, k: int) -> tuple[int, ...]:
        """The shape of a leaf with k in the place of the rank."""
        if self.rank_last:
            return (*self.stack, *self.features, k)
        return (*self.stack, k, *self.features)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two factors of one adapter, or of one stack of adapters.

    Attributes:
      path: What the paths of both factors have in common, `"layers/q_proj"`.
      rank: Size of the axis they share.
      a: The factor of the inputs.
      b: The factor of the outputs.
    """

    path: str
    rank: int
    a: Factor
    b: Factor

    def scaling(self, scaling: Scaling) -> float | jax.Array:
        """The s of this pair."""
        return scaling(self.path) if callable(scaling) else scaling


@dataclasses.dataclass(frozen=True)
class FactorBatch:
    """Factors of one role and one layout, one of each pair of a `PairBatch`."""

    factors: tuple[Factor, ...]

    @property
    def rank_last(self) -> bool:
        """Whether these are factors A."""
        return self.factors[0].rank_last

    @property
    def indices(self) -> list[int]:
        """Positions of the factors among the leaves of the tree."""
        return [factor.index for factor in self.factors]

    def fold(self, leaves: Sequence[jax.Array]) -> Tall:
        """Gathers a leaf of each factor: (batch, stack, features, k)."""
        folded = [f.fold(x) for f, x in zip(self.factors, leaves, strict=True)]
        return Tall(jnp.stack(folded), self.rank_last)

    def unfold(self, x: Tall) -> list[jax.Array]:
        """Undoes `fold`."""
        return [f.unfold(x.array[i]) for i, f in enumerate(self.factors)]


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Pairs of one shape that are computed as one, so that a program has one copy of the work.

    Paths that differ in numbers only are taken for one module of several layers. Others of that
    shape stay apart: they may lie on a mesh in another way, and one array of both would move data
    between devices.
    """

    pairs: tuple[Pair, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """What tells this batch from any other: positions do not, under masks."""
        return tuple(pair.a.path for pair in self.pairs)

    @property
    def rank(self) -> int:
        """The rank of them all."""
        return self.pairs[0].rank

    @property
    def a(self) -> FactorBatch:
        """The factors of the inputs."""
        return FactorBatch(tuple(pair.a for pair in self.pairs))

    @property
    def b(self) -> FactorBatch:
        """The factors of the outputs."""
        return FactorBatch(tuple(pair.b for pair in self.pairs))

    def both(self) -> tuple[tuple[FactorBatch, FactorBatch], tuple[FactorBatch, FactorBatch]]:
        """The factors of each role with their partners: (A, B), (B, A)."""
        return (self.a, self.b), (self.b, self.a)


def batch_pairs(pairs: Sequence[Pair], params: Sequence[Any]) -> list[PairBatch]:
    """Puts pairs together whose paths differ in numbers only, if shapes and dtypes are the same.

    Args:
      pairs: From `find_pairs`.
      params: Leaves of the parameters.

    Returns:
      The batches, in the order of their first pairs.

    Example:
      >>> factors = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}
      >>> params = {"layers": {"0": factors, "1": factors}}
      >>> [len(batch.pairs) for batch in batch_pairs(find_pairs(params), jax.tree.leaves(params))]
      [2]
    """
    batches: dict[Any, list[Pair]] = {}
    for pair in pairs:
        leaves = params[pair.a.index], params[pair.b.index]
        kind = [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]
        batches.setdefault((re.sub(r"\d+", "0", pair.path), *kind), []).append(pair)
    return [PairBatch(tuple(batch)) for batch in batches.values()]


def find_pairs(params: Any, factors: FactorNames | None = None) -> list[Pair]:
    """Finds the factor pairs of a parameter tree by the paths of its leaves.

    The number of stacked axes is the largest for which the shapes fit: both factors begin with the
    same axes, the rank follows them in B, and each factor keeps at least one axis of features.

    Args:
      params: A tree of arrays or of anything with a `shape`: nested dicts, `nnx.State`,
        dataclasses. Steps named `value` (of a Flax variable) are not part of a path.
      factors: Endings of the paths of A and B, `(("lora_a", "lora_b"),)` for instance; an ending
        starts at a path step, or behind an underscore (`kernel_lora_a`). None stands for `lora_a`
        with `lora_b` and `lora_A` with `lora_B`; an empty sequence says that there are no pairs.

    Returns:
      The pairs, in the order of their A leaves.

    Raises:
      ValueError: A factor without its other half, shapes that do not fit, a rank above the smaller
        side of the weight, (unless `factors` is an empty sequence) no pair at all, or `factors`
        that are not pairs of endings, or complex factors.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"q": {"lora_a": jnp.ones((32, 64, 4)), "lora_b": jnp.ones((32, 4, 8, 8))}}
      >>> [pair] = find_pairs(params)
      >>> pair.path, pair.rank, pair.a.stack, pair.a.features, pair.b.features
      ('q', 4, (32,), (64,), (8, 8))
    """
    names = DEFAULT_FACTOR_NAMES if factors is None else _checked_names(factors)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [_path_string(path) for path, _ in leaves]
    halves: dict[tuple[str, tuple[str, str]], dict[str, int]] = {}
    for index, path in enumerate(paths):
        for ending_pair in names:
            for role, ending in zip("ab", ending_pair, strict=True):
                if (prefix := _strip_ending(path, ending)) is not None:
                    halves.setdefault((prefix, ending_pair), {})[role] = index

    pairs = []
    for (prefix, endings), found in halves.items():
        if len(found) == 1:
            [(role, index)] = found.items()
            missing = prefix + endings["ba".index(role)]
            raise ValueError(
                f"half a factor pair: found {paths[index]!r} but not {missing!r}; "
                "a pair must be masked, frozen or trained as a whole"
            )
        path = prefix[:-1] or paths[found["a"]]  # without the separator
        both_leaves = [(i, paths[i], leaves[i][1]) for i in (found["a"], found["b"])]
        for _, name, leaf in both_leaves:
            if jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jnp.complexfloating):
                raise ValueError(f"{name!r} is {leaf.dtype}, expected real factors")
        pairs.append(_pair(path, *((i, name, tuple(leaf.shape)) for i, name, leaf in both_leaves)))

    # An empty tree is no mistake: Optax initializes with one to tell which parts of a state
    # are like parameters (`optax.tree.map_params`).
    if not pairs and names and paths:
        wanted = ", ".join(f"{a}/{b}" for a, b in names)
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(
            f"no factor pair in the parameters: looked for siblings named {wanted}, found {shown}. "
            "Name them with `factors=`, or pass `factors=()` to train without pairs"
        )
    return sorted(pairs, key=lambda pair: pair.a.index)


def paired_leaves(params: Any, factors: FactorNames | None = None) -> Any:
    """Which leaves belong to a pair: a tree of booleans, as masks are.

    Args:
      params: As for `find_pairs`.
      factors: As for `find_pairs`.

    Returns:
      The structure of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 3)), "bias": jnp.ones(3)}
      >>> paired_leaves(params)
      {'bias': False, 'lora_a': True, 'lora_b': True}
    """
    leaves, treedef = jax.tree.flatten(params)
    paired = {f.index for pair in find_pairs(params, factors) for f in (pair.a, pair.b)}
    return jax.tree.unflatten(treedef, [i in paired for i in range(len(leaves))])


def _checked_names(factors: FactorNames) -> FactorNames:
    for endings in factors:
        if isinstance(endings, str) or len(endings) != 2:
            raise ValueError(
                f"factors holds {endings!r}, expected pairs of endings: (('lora_a', 'lora_b'),)"
            )
    return [(a, b) for a, b in factors]


def _pair(
    path: str, a_leaf: tuple[int, str, tuple[int, ...]], b_leaf: tuple[int, str, tuple[int, ...]]
) -> Pair:
    (a_index, a_path, a), (b_index, b_path, b) = a_leaf, b_leaf
    rank = a[-1] if a else 0
    stacks = [
        k for k in range(min(len(a), len(b)) - 1) if a[:k] == b[:k] and b[k] == rank and rank > 0
    ]
    if not stacks:
        raise ValueError(
            f"factors of {path!r} do not fit: A has shape {a} and B {b}, expected "
            "A (*stack, *in, rank) and B (*stack, rank, *out)"
        )
    k = stacks[-1]
    pair = Pair(
        path,
        rank,
        a=Factor(a_index, a_path, a[:k], a[k:-1], rank_last=True),
        b=Factor(b_index, b_path, b[:k], b[k + 1 :], rank_last=False),
    )
    m, n = math.prod(pair.a.features), math.prod(pair.b.features)
    if rank > min(m, n):
        raise ValueError(
            f"rank of {path!r} is {rank}, above min(in, out) = {min(m, n)} of a weight "
            f"of shape ({m}, {n})"
        )
    return pair


def _path_string(path: tuple[Any, ...]) -> str:
    steps = []
    for key in path:
        # DictKey and FlattenedIndexKey have a key, GetAttrKey a name, SequenceKey an idx.
        step = next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))
        steps.append(str(step))
    if len(steps) > 1 and steps[-1] in ("value", "raw_value"):
        steps.pop()
    return "/".join(steps)


@functools.lru_cache(maxsize=65536)
def _strip_ending(path: str, ending: str) -> str | None:
    if path == ending:
        return ""
    if path.endswith(("/" + ending, "_" + ending)):
        return path[: -len(ending)]
    return None
