"""Which leaves of a parameter tree are the two factors of one adapter, and their matrix form.

An adapter adds `W = s A B` to a base weight. Its factors are two leaves of the tree with sibling
paths, `A` of shape `(*stack, *in, r)` and `B` of shape `(*stack, r, *out)`. The mathematics sees
both alike, as stacks of tall matrices (`FactorMatrix`): `A` and `Bᵀ` with their feature axes folded
to one.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loft_jax.optim.arguments import Number, check_scaling
from loft_jax.optim.linear_algebra import FactorMatrix
from loft_jax.optim.stacking import remember_stack, remembered_stack, unstack

FactorNames = Sequence[tuple[str, str]]
"""Endings of the paths of the two factors of a pair, as `(("lora_a", "lora_b"), ...)`."""

Scaling = Number | Callable[[str], float]
"""The s of `W = s A B`: one number, or a function of the pair's path."""

StackAxes = int | Sequence[int] | None
"""Positions of stacked axes in both factors: one, several, `()` for none; None: leading ones."""

StackAxis = StackAxes | Callable[[str], StackAxes]
"""Which axes stack layers: the same ones in all pairs, or a function of the pair's path."""

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)

_DEFAULT_NAMES = (("lora_a", "lora_b"), ("lora_A", "lora_B"))
# In the last two steps of a path: those before are modules.
_NAMED_AS_FACTOR = re.compile(r"(?:^|[/_])lora_[abAB](?![a-zA-Z])[^/]*(?:/[^/]*)?$")


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
      stack_axis: Position, in A and in B alike, of the axis that stacks layers: 1 where MaxText
        puts it, `A (in, layers, r)`, `B (r, layers, out)`. A tuple for several axes, `()` for no
        stack, or a function from a pair's path to any of these. None, the default, means as many
        leading axes as the shapes allow.

    Raises:
      ValueError: `factors` that are not pairs of endings, a scaling that is zero or not finite, or
        a `stack_axis` that is negative or repeated.

    Example:
      >>> spec = FactorSpec(factors=[["down/kernel", "up/kernel"]], scaling=2.0)
      >>> spec == FactorSpec((("down/kernel", "up/kernel"),), 2.0)
      True
    """

    factors: FactorNames | None = None
    scaling: Scaling = 1.0
    stack_axis: StackAxis = None

    def __post_init__(self) -> None:
        if self.factors is not None:
            object.__setattr__(self, "factors", tuple(self.factors))
        for endings in self.names:
            if isinstance(endings, str) or len(endings) != 2:
                raise ValueError(
                    f"factors holds {endings!r}, expected pairs of endings: (('lora_a', 'lora_b'),)"
                )
            if endings[0] == endings[1]:
                raise ValueError(f"factors holds {endings!r}, expected two different endings")
        if self.factors is not None:
            object.__setattr__(self, "factors", tuple((a, b) for a, b in self.factors))
        if not callable(self.scaling):
            check_scaling(self.scaling)
        if self.stack_axis is not None and not callable(self.stack_axis):
            object.__setattr__(self, "stack_axis", _positions(self.stack_axis, "stack_axis"))

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

    def stack_axes_of(self, path: str) -> tuple[int, ...] | None:
        """The positions of the stacked axes of the pair with this path; None for leading ones.

        Raises:
          ValueError: They are negative, repeated or no whole numbers; the message names the pair.
        """
        axes = self.stack_axis(path) if callable(self.stack_axis) else self.stack_axis
        return None if axes is None else _positions(axes, f"stack_axis of {path!r}")


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

    def fold(self, x: ArrayT) -> ArrayT:
        """Folds a leaf to (stack, features, k), for a factor B to (stack, k, features).

        An array of NumPy stays one, and so keeps float64.
        """
        x = _library(x).moveaxis(x, self.stack_axes, range(len(self.stack)))
        k = x.shape[-1 if self.rank_last else len(self.stack)]
        features = math.prod(self.features)
        return x.reshape(
            math.prod(self.stack), *((features, k) if self.rank_last else (k, features))
        )

    def unfold(self, x: ArrayT) -> ArrayT:
        """Undoes `fold`, with any k."""
        k = x.shape[2 if self.rank_last else 1]
        layer = (*self.features, k) if self.rank_last else (k, *self.features)
        x = x.reshape(*self.stack, *layer)
        unfolded: ArrayT = _library(x).moveaxis(x, range(len(self.stack)), self.stack_axes)
        return unfolded

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
        if (known := remembered_stack(self, leaves)) is not None:
            return known  # type: ignore[no-any-return]
        folded = [f.fold(x) for f, x in zip(self.factors, leaves, strict=True)]
        return FactorMatrix(jnp.stack(folded), self.rank_last)

    def unfold(self, x: FactorMatrix) -> list[jax.Array]:
        """Undoes `fold`."""
        leaves = [f.unfold(y) for f, y in zip(self.factors, unstack(x.array), strict=True)]
        remember_stack(self, leaves, x)
        return leaves


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
    """Groups pairs whose paths differ in numbers only, if shapes, stacks and dtypes are the same.

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
        key = (re.sub(r"\d+", "0", pair.path), pair.a.stack_axes, *kind)
        groups.setdefault(key, []).append(pair)
    return [PairGroup(tuple(group)) for group in groups.values()]


def find_pairs(params: optax.Params, spec: FactorSpec = DEFAULT_SPEC) -> list[Pair]:
    """Finds the factor pairs of a parameter tree by the paths of its leaves.

    Both factors share their stacked axes; without them A is `(*in, r)` and B `(r, *out)`, each with
    at least one feature axis. Where the spec does not name the stacked axes, they are the longest
    sequence of leading axes for which the shapes fit. Shapes that fit as well with as many stacked
    axes or more in other places are refused: `(8, 3, 4)` with `(4, 3, 12)` are three layers on axis
    1, or one weight with the axes (8, 3, 3, 12).

    Factors as torch has them, A `(r, in)` and B `(out, r)`, do not fit and are refused, but for
    square ones, r = in = out, which no shape tells apart.

    Args:
      params: A tree of arrays or of anything with a `shape`: nested dicts, `nnx.State`,
        dataclasses. A last step `value` that stands alone (of a Flax variable) is not part of a
        path.
      spec: Names of the factors and their stacked axes.

    Returns:
      The pairs, in the order of their A leaves.

    Raises:
      ValueError: A factor without its other half, complex factors, shapes that fit in no way or in
        several, a rank above the smaller side of the weight, or no pair at all where the spec has
        names; or, unless the spec names the factors, a matrix outside of all pairs whose name, or
        that of its module, has `lora_a` or the like in it.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"q": {"lora_a": jnp.ones((32, 64, 4)), "lora_b": jnp.ones((32, 4, 8, 8))}}
      >>> [pair] = find_pairs(params)
      >>> pair.path, pair.rank, pair.a.stack, pair.a.features, pair.b.features
      ('q', 4, (32,), (64,), (8, 8))
    """
    names = spec.names
    leaves = jax.tree.leaves(params)
    paths = leaf_paths(params)
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
        both_leaves = [(i, paths[i], leaves[i]) for i in (found["a"], found["b"])]
        for _, name, leaf in both_leaves:
            if jnp.issubdtype(getattr(leaf, "dtype", jnp.float32), jnp.complexfloating):
                raise ValueError(f"{name!r} is {leaf.dtype}, expected real factors")
        a, b = ((i, name, tuple(leaf.shape)) for i, name, leaf in both_leaves)
        pairs.append(_pair(path, a, b, spec.stack_axes_of(path)))

    owners: dict[int, Pair] = {}
    for pair in pairs:
        for factor in (pair.a, pair.b):
            if (other := owners.setdefault(factor.index, pair)) is not pair:
                both = " and ".join(f"{p.a.path} with {p.b.path}" for p in (other, pair))
                raise ValueError(
                    f"{factor.path!r} is a factor of two pairs, {both}; expected one: `factors` "
                    "names it twice"
                )

    # An empty tree is no mistake: Optax initializes with one to find out which parts of a state
    # are like parameters (`optax.tree.map_params`).
    if not pairs and names and paths:
        wanted = ", ".join(f"{a}/{b}" for a, b in names)
        shown = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(
            f"no factor pair in the parameters: looked for siblings named {wanted}, found "
            f"{shown or 'a single array'}. Name them with `factors=`, or pass `factors=()` to "
            "train without pairs"
        )
    if spec.factors is None:
        _refuse_lost_factors(
            path
            for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True))
            if index not in owners and len(getattr(leaf, "shape", ())) > 1
        )
    return sorted(pairs, key=lambda pair: pair.a.index)


def _refuse_lost_factors(paths: Iterable[str]) -> None:
    """Refuses matrices outside of all pairs that are named like factors: `lora_a/kernel`."""
    if lost := next(filter(_NAMED_AS_FACTOR.search, paths), None):
        raise ValueError(
            f"{lost!r} is named like a factor, but belongs to no pair: name the endings of all "
            "factors with `factors=`, and what else there is passes"
        )


def leaf_paths(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Gives the path of each leaf, `"layers/q_proj/lora_a"`, without steps of Flax's variables."""

    def counts(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode) or (is_leaf is not None and is_leaf(x))

    # The box of a variable holds one array; a step `value` beside others is the name of a module,
    # and it stays one where a mask hides the others.
    known = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=counts)]
    below = collections.Counter(path[:i] for path in known for i in range(len(path)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]
    return [_path_string(path, boxed=below[path[:-1]] == 1) for path in paths]


def paired_leaves(params: optax.Params, spec: FactorSpec = DEFAULT_SPEC) -> optax.Params:
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
    marks: optax.Params = jax.tree.unflatten(treedef, [i in paired for i in range(len(leaves))])
    return marks


def _pair(
    path: str,
    a_leaf: tuple[int, str, tuple[int, ...]],
    b_leaf: tuple[int, str, tuple[int, ...]],
    stack_axes: tuple[int, ...] | None,
) -> Pair:
    (a_index, a_path, a), (b_index, b_path, b) = a_leaf, b_leaf
    axes = _leading_stack(path, a, b) if stack_axes is None else stack_axes
    if axes is None or not _fits(a, b, axes):
        where = "" if stack_axes is None else f", with the stack at axes {stack_axes}"
        raise ValueError(
            f"factors of {path!r} do not fit: A has shape {a} and B {b}, expected "
            f"A (*stack, *in, rank) and B (*stack, rank, *out){where}{_hint(a, b, stack_axes)}"
        )
    stack = tuple(a[axis] for axis in axes)
    (*ins, rank), (_, *outs) = _without(a, axes), _without(b, axes)
    pair = Pair(
        path,
        rank,
        a=Factor(a_index, a_path, stack, axes, tuple(ins), rank_last=True),
        b=Factor(b_index, b_path, stack, axes, tuple(outs), rank_last=False),
    )
    m, n = _sides(a, b, axes)
    if rank > min(m, n):
        raise ValueError(
            f"rank of {path!r} is {rank}, above min(in, out) = {min(m, n)} of a weight "
            f"of shape ({m}, {n}){_hint(a, b, stack_axes)}"
        )
    return pair


def _positions(axes: int | Sequence[int], name: str) -> tuple[int, ...]:
    if isinstance(axes, jax.Array):
        raise ValueError(
            f"{name} is an array, expected positions: with optax.inject_hyperparams, name "
            "stack_axis in static_args"
        )
    several = axes if isinstance(axes, Sequence) else (axes,)
    whole = all(isinstance(x, Integral) and not isinstance(x, bool) and x >= 0 for x in several)
    if not whole or len(set(several)) < len(several):
        raise ValueError(f"{name} is {axes!r}, expected different positions >= 0")
    return tuple(sorted(map(int, several)))


class _Readings(NamedTuple):
    """The stacked axes with which shapes of A and B are those of a pair.

    Attributes:
      leading: Those that are leading axes, the most axes first.
      others: Those that are not, with a rank that the weight can have.
      torch: Those with which the shapes are torch's, (*stack, rank, in) and (*stack, out, rank).
    """

    leading: list[tuple[int, ...]]
    others: list[tuple[int, ...]]
    torch: list[tuple[int, ...]]


@functools.lru_cache(maxsize=65536)
def _readings(a: tuple[int, ...], b: tuple[int, ...]) -> _Readings:
    shared = [axis for axis, sizes in enumerate(zip(a, b, strict=False)) if len(set(sizes)) == 1]
    found = _Readings([], [], [])
    for k in reversed(range(len(shared) + 1)):
        for axes in itertools.combinations(shared, k):
            if _fits(a, b, axes):
                if axes == tuple(range(k)):
                    found.leading.append(axes)
                elif _without(a, axes)[-1] <= min(_sides(a, b, axes)):
                    found.others.append(axes)
            if _fits_torch(a, b, axes):
                found.torch.append(axes)
    return found


def _leading_stack(path: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The most leading axes that can be a stack, or None; refuses shapes that may mean others."""
    found = _readings(a, b)
    if not found.leading:
        return None
    # A stacked axis is the reason for a size that both factors have. A reading with fewer such axes
    # takes the same shapes for a coincidence of more sizes, and is not what someone has.
    axes = found.leading[0]
    others = [
        other
        for other in found.others
        if len(other) >= len(axes) and (not axes or _is_axis_1(other))
    ]
    torch = any(len(other) > len(axes) for other in found.torch)
    if others or torch:
        ways = ", or ".join(_described(a, b, way) for way in (*others, *found.leading))
        raise ValueError(
            f"factors of {path!r} can be read in several ways: A has shape {a} and B {b}; pass "
            f"{ways}{_TRANSPOSE if torch else ''}"
        )
    return axes


def _is_axis_1(axes: tuple[int, ...]) -> bool:
    """Whether, after the leading ones, axis 1 of a layer and those that follow it are stacked."""
    k = sum(axis == i for i, axis in enumerate(axes))
    return axes[k:] == tuple(range(k + 1, len(axes) + 1))


_TRANSPOSE = (
    "; or transpose both, if they are torch's: A (*stack, rank, in) and B (*stack, out, rank)"
)


def _described(a: tuple[int, ...], b: tuple[int, ...], axes: tuple[int, ...]) -> str:
    """What to pass for a reading, and what it means: `stack_axis=1 for 3 weights (8, 12)`."""
    argument = axes[0] if len(axes) == 1 else axes
    weight = (*_without(a, axes)[:-1], *_without(b, axes)[1:])
    count = math.prod(a[axis] for axis in axes) if axes else "one"
    return f"stack_axis={argument} for {count} weight{'s' if axes else ''} of shape {weight}"


def _hint(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...] | None) -> str:
    """The end of a message about shapes that do not fit: what they may be."""
    found = _readings(a, b)
    if any(stack_axes in (None, axes) for axes in found.torch):
        return _TRANSPOSE
    if stack_axes is None and found.others:
        return f"; pass {_described(a, b, found.others[0])}"
    return ""


def _fits(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...]) -> bool:
    """Whether shapes of A and B are those of a pair with these stacked axes."""
    if any(axis >= min(len(a), len(b)) or a[axis] != b[axis] for axis in stack_axes):
        return False
    a, b = _without(a, stack_axes), _without(b, stack_axes)
    return len(a) > 1 and len(b) > 1 and a[-1] == b[0] > 0


def _fits_torch(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...]) -> bool:
    """Whether they are A (rank, in) and B (out, rank), the stack before these or between them."""
    if len(a) != len(stack_axes) + 2 or len(a) != len(b) or len(a) - 1 in stack_axes:
        return False
    (rank, m), (n, other) = _without(a, stack_axes), _without(b, stack_axes)
    return 0 < rank == other <= min(m, n)


def _sides(a: tuple[int, ...], b: tuple[int, ...], stack_axes: tuple[int, ...]) -> tuple[int, int]:
    """The sizes (in, out) of the weight as a matrix."""
    return math.prod(_without(a, stack_axes)[:-1]), math.prod(_without(b, stack_axes)[1:])


def _without(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _path_string(path: tuple[Any, ...], *, boxed: bool) -> str:
    steps = []
    for key in path:
        # DictKey and FlattenedIndexKey have a key, GetAttrKey a name, SequenceKey an idx. A node
        # may have keys of its own, which JAX writes as they are.
        names = (getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))
        steps.append(str(next(names, key)))
    if boxed and len(steps) > 1 and steps[-1] in ("value", "raw_value"):
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
