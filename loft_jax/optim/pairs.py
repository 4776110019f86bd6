"""Which leaves of a parameter tree are the two factors of one adapter, and their matrix form.

An adapter adds `W = s A B` to a base weight. Its factors are two leaves of the tree with sibling
paths, `A` of shape `(*stack, *in, r)` and `B` of shape `(*stack, r, *out)`. The mathematics sees
both alike, as stacks of tall matrices (`FactorMatrix`): `A` and `Bᵀ` with their feature axes folded
to one.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loft_jax.optim.arguments import Number, check_scaling
from loft_jax.optim.linear_algebra import FactorMatrix

FactorNames = Sequence[tuple[str, str]]
"""Endings of the paths of the two factors of a pair, as `(("lora_a", "lora_b"), ...)`."""

Scaling = Number | Callable[[str], float]
"""The s of `W = s A B`: one number, or a function of the pair's path."""

_DEFAULT_NAMES = (("lora_a", "lora_b"), ("lora_A", "lora_B"))


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """How to read the factor pairs of a parameter tree: what all links have to agree on.

    A spec is hashable, and equal to another one with the same fields, unless its scaling is an
    array.

    Attributes:
      factors: Endings of the paths of A and B, `(("lora_a", "lora_b"),)` for instance; an ending
        starts at a path step, or after an underscore (`kernel_lora_a`). None, the default, means
        `lora_a` with `lora_b` and `lora_A` with `lora_B`; an empty sequence says that there are
        no pairs.
      scaling: The s of `W = s A B` that the forward pass uses (alpha / rank in LoRA), or a function
        from a pair's path (`"layers/q_proj"`) to it.
      stack_axes: Positions, in A and in B alike, of the axes that stack layers: `(1,)` where
        Linen's `nn.scan` and MaxText put them, `A (in, layers, r)`, `B (r, layers, out)`. None, the
        default, means as many leading axes as the shapes allow.

    Raises:
      ValueError: `factors` that are not pairs of endings, a scaling that is zero or not finite, or
        `stack_axes` that are negative or repeated.

    Example:
      >>> spec = FactorSpec(factors=[["down/kernel", "up/kernel"]], scaling=2.0)
      >>> spec == FactorSpec((("down/kernel", "up/kernel"),), 2.0)
      True
    """

    factors: FactorNames | None = None
    scaling: Scaling = 1.0
    stack_axes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for endings in self.names:
            if isinstance(endings, str) or len(endings) != 2:
                raise ValueError(
                    f"factors holds {endings!r}, expected pairs of endings: (('lora_a', 'lora_b'),)"
                )
        if self.factors is not None:
            object.__setattr__(self, "factors", tuple((a, b) for a, b in self.factors))
        if not callable(self.scaling):
            check_scaling(self.scaling)
        if self.stack_axes is not None:
            axes = tuple(sorted(self.stack_axes))
            if len(set(axes)) < len(axes) or any(axis < 0 for axis in axes):
                raise ValueError(
                    f"stack_axes is {self.stack_axes!r}, expected different positions >= 0"
                )
            object.__setattr__(self, "stack_axes", axes)

    @property
    def names(self) -> FactorNames:
        """The endings, or the default ones."""
        return _DEFAULT_NAMES if self.factors is None else self.factors

    def scaling_of(self, pair: "Pair") -> Number:
        """The s of a pair.

        Raises:
          ValueError: It is zero or not finite; the message names the pair.
        """
        scaling = self.scaling(pair.path) if callable(self.scaling) else self.scaling
        check_scaling(scaling, f"scaling of {pair.path!r}")
        return scaling


DEFAULT_SPEC = FactorSpec()
"""Pairs `lora_a` with `lora_b` and `lora_A` with `lora_B`, a scaling of 1, leading stack axes."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a pair: where it is in the tree, and how it folds to tall matrices.

    Attributes:
      index: Position among the leaves of the tree.
      path: Of the leaf, `"layers/q_proj/lora_a"`.
      stack: Sizes of the stacked (scanned) axes; empty for one layer.
      stack_axes: Positions of these axes, ascending.
      features: Sizes of the input axes for A, of the output axes for B.
      rank_last: Whether the rank axis follows the features (A) or precedes them (B).
    """

    index: int
    path: str
    stack: tuple[int, ...]
    stack_axes: tuple[int, ...]
    features: tuple[int, ...]
    rank_last: bool

    def fold(self, x: jax.Array | np.ndarray) -> Any:
        """Folds a leaf to (stack, features, k), for a factor B to (stack, k, features).

        An array of NumPy stays one, and so keeps float64.
        """
        x = _library(x).moveaxis(x, self.stack_axes, range(len(self.stack)))
        k = x.shape[-1 if self.rank_last else len(self.stack)]
        features = math.prod(self.features)
        return x.reshape(
            math.prod(self.stack), *((features, k) if self.rank_last else (k, features))
        )

    def unfold(self, x: jax.Array | np.ndarray) -> Any:
        """Undoes `fold`, with any k."""
        k = x.shape[2 if self.rank_last else 1]
        layer = (*self.features, k) if self.rank_last else (k, *self.features)
        x = x.reshape(*self.stack, *layer)
        return _library(x).moveaxis(x, range(len(self.stack)), self.stack_axes)

    def shape(self, k: int) -> tuple[int, ...]:
        """The shape of a leaf with k in the place of the rank."""
        shape = [*self.features, k] if self.rank_last else [k, *self.features]
        for axis, size in zip(self.stack_axes, self.stack, strict=True):
            shape.insert(axis, size)
        return tuple(shape)


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


@dataclasses.dataclass(frozen=True)
class FactorGroup:
    """Factors of one role, one of each pair of a `PairGroup`, computed as one array."""

    factors: tuple[Factor, ...]

    @property
    def rank_last(self) -> bool:
        """Whether these are factors A."""
        return self.factors[0].rank_last

    @property
    def indices(self) -> list[int]:
        """Positions of the factors among the leaves of the tree."""
        return [factor.index for factor in self.factors]

    def fold(self, leaves: Sequence[jax.Array]) -> FactorMatrix:
        """Stacks one leaf of each factor: (group, stack, features, k)."""
        folded = [f.fold(x) for f, x in zip(self.factors, leaves, strict=True)]
        return FactorMatrix(jnp.stack(folded), self.rank_last)

    def unfold(self, x: FactorMatrix) -> list[jax.Array]:
        """Undoes `fold`."""
        return [f.unfold(x.array[i]) for i, f in enumerate(self.factors)]


@dataclasses.dataclass(frozen=True)
class PairGroup:
    """Pairs of one shape that are computed as one, so that a program has one copy of the work.

    Pairs whose paths differ in numbers only are taken for one module in several layers. Other pairs
    of that shape stay apart: a mesh may split them in another way, and one array of both would move
    data between devices.
    """

    pairs: tuple[Pair, ...]

    @property
    def rank(self) -> int:
        """The rank of every pair."""
        return self.pairs[0].rank

    @property
    def a(self) -> FactorGroup:
        """The factors of the inputs."""
        return FactorGroup(tuple(pair.a for pair in self.pairs))

    @property
    def b(self) -> FactorGroup:
        """The factors of the outputs."""
        return FactorGroup(tuple(pair.b for pair in self.pairs))

    def sides(self) -> tuple[tuple[FactorGroup, FactorGroup], tuple[FactorGroup, FactorGroup]]:
        """Each factor with its partner: (A, B) and (B, A)."""
        return (self.a, self.b), (self.b, self.a)


def group_pairs(pairs: Sequence[Pair], params: Sequence[Any]) -> list[PairGroup]:
    """Groups pairs whose paths differ in numbers only, if shapes and dtypes are the same.

    Args:
      pairs: From `find_pairs`.
      params: Leaves of the parameters.

    Returns:
      The groups, in the order of their first pairs.

    Example:
      >>> factors = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 3))}
      >>> params = {"layers": {"0": factors, "1": factors}}
      >>> [len(group.pairs) for group in group_pairs(find_pairs(params), jax.tree.leaves(params))]
      [2]
    """
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        leaves = params[pair.a.index], params[pair.b.index]
        kind = [(tuple(leaf.shape), jnp.dtype(leaf.dtype)) for leaf in leaves]
        groups.setdefault((re.sub(r"\d+", "0", pair.path), *kind), []).append(pair)
    return [PairGroup(tuple(group)) for group in groups.values()]


def find_pairs(params: Any, spec: FactorSpec = DEFAULT_SPEC) -> list[Pair]:
    """Finds the factor pairs of a parameter tree by the paths of its leaves.

    Both factors share their stacked axes; without them A is `(*in, r)` and B `(r, *out)`, each with
    at least one feature axis. Where the spec does not name the stacked axes, they are the longest
    sequence of leading axes for which the shapes fit.

    Args:
      params: A tree of arrays or of anything with a `shape`: nested dicts, `nnx.State`,
        dataclasses. Steps named `value` (of a Flax variable) are not part of a path.
      spec: Names of the factors and their stacked axes.

    Returns:
      The pairs, in the order of their A leaves.

    Raises:
      ValueError: A factor without its other half, complex factors, shapes that do not fit, a rank
        above the smaller side of the weight, or no pair at all where the spec has names.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"q": {"lora_a": jnp.ones((32, 64, 4)), "lora_b": jnp.ones((32, 4, 8, 8))}}
      >>> [pair] = find_pairs(params)
      >>> pair.path, pair.rank, pair.a.stack, pair.a.features, pair.b.features
      ('q', 4, (32,), (64,), (8, 8))
    """
    names = spec.names
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
        a, b = ((i, name, tuple(leaf.shape)) for i, name, leaf in both_leaves)
        pairs.append(_pair(path, a, b, spec.stack_axes))

    # An empty tree is no mistake: Optax initializes with one to find out which parts of a state
    # are like parameters (`optax.tree.map_params`).
    if not pairs and names and paths:
        wanted = ", ".join(f"{a}/{b}" for a, b in names)
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(
            f"no factor pair in the parameters: looked for siblings named {wanted}, found {shown}. "
            "Name them with `factors=`, or pass `factors=()` to train without pairs"
        )
    return sorted(pairs, key=lambda pair: pair.a.index)


def paired_leaves(params: Any, spec: FactorSpec = DEFAULT_SPEC) -> Any:
    """Marks the leaves that belong to a pair: a tree of booleans, as masks are.

    Args:
      params: As for `find_pairs`.
      spec: As for `find_pairs`.

    Returns:
      The structure of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 3)), "bias": jnp.ones(3)}
      >>> paired_leaves(params)
      {'bias': False, 'lora_a': True, 'lora_b': True}
    """
    leaves, treedef = jax.tree.flatten(params)
    paired = {f.index for pair in find_pairs(params, spec) for f in (pair.a, pair.b)}
    return jax.tree.unflatten(treedef, [i in paired for i in range(len(leaves))])


def _pair(
    path: str,
    a_leaf: tuple[int, str, tuple[int, ...]],
    b_leaf: tuple[int, str, tuple[int, ...]],
    stack_axes: Sequence[int] | None,
) -> Pair:
    (a_index, a_path, a), (b_index, b_path, b) = a_leaf, b_leaf
    if stack_axes is None:  # the most leading axes first
        candidates = [tuple(range(k)) for k in reversed(range(min(len(a), len(b))))]
    else:
        candidates = [tuple(stack_axes)]
    axes = next((axes for axes in candidates if _fit(a, b, axes)), None)
    if axes is None:
        where = "" if stack_axes is None else f", with the stack at axes {tuple(stack_axes)}"
        raise ValueError(
            f"factors of {path!r} do not fit: A has shape {a} and B {b}, expected "
            f"A (*stack, *in, rank) and B (*stack, rank, *out){where}"
        )
    stack = tuple(a[axis] for axis in axes)
    (*ins, rank), (_, *outs) = _without(a, axes), _without(b, axes)
    pair = Pair(
        path,
        rank,
        a=Factor(a_index, a_path, stack, axes, tuple(ins), rank_last=True),
        b=Factor(b_index, b_path, stack, axes, tuple(outs), rank_last=False),
    )
    m, n = math.prod(ins), math.prod(outs)
    if rank > min(m, n):
        raise ValueError(
            f"rank of {path!r} is {rank}, above min(in, out) = {min(m, n)} of a weight "
            f"of shape ({m}, {n})"
        )
    return pair


def _fit(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...]) -> bool:
    """Whether shapes of A and B are those of a pair with these stacked axes."""
    if any(axis >= min(len(a), len(b)) or a[axis] != b[axis] for axis in stack_axes):
        return False
    a, b = _without(a, stack_axes), _without(b, stack_axes)
    return len(a) > 1 and len(b) > 1 and a[-1] == b[0] > 0


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


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


def _library(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp
