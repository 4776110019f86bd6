"""Updates with the factor pairs of their parameters, as every link sees them; shared bases."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from loft_jax.optim.linear_algebra import (
    Basis,
    FactorMatrix,
    orthonormal_bases,
    orthonormal_basis,
)
from loft_jax.optim.meshes import explicit_mesh, in_context
from loft_jax.optim.pairs import (
    DEFAULT_SPEC,
    FactorGroup,
    FactorSpec,
    PairGroup,
    find_pairs,
    group_pairs,
    leaf_paths,
)
from loft_jax.optim.stacking import Identity, remember_stacks


class PairedUpdates:
    """The leaves of an update tree, with the pairs of its parameters.

    Attributes:
      leaves: The updates, to be replaced in place.
      groups: Factor pairs by position in `leaves`.
      paired: Positions of the leaves that are factors, ascending.
      plain: Positions of the leaves that belong to no pair, ascending.
    """

    def __init__(
        self,
        updates: Any,
        params: Any,
        spec: FactorSpec = DEFAULT_SPEC,
        is_leaf: Callable[[Any], bool] | None = None,
    ) -> None:
        """Finds the pairs.

        Args:
          updates: A tree of the structure of the parameters.
          params: The parameters.
          spec: How to read their pairs.
          is_leaf: What counts as a leaf of the updates, in addition to arrays.

        Raises:
          ValueError: The parameters are missing, the paths of their leaves differ, or as
            `find_pairs`.
        """
        if params is None:
            raise ValueError(
                "the parameters are missing: call `update(updates, state, params)`, not "
                "`update(updates, state)`"
            )
        self._spec = spec
        self.leaves, self._treedef = jax.tree.flatten(updates, is_leaf=is_leaf)
        self._params = jax.tree.leaves(params)
        both = (leaf_paths(updates, is_leaf), leaf_paths(params))
        if both[0] != both[1]:
            found, expected = next(x for x in itertools.zip_longest(*both) if x[0] != x[1])
            raise ValueError(
                f"updates have {found!r} where the parameters have {expected!r}: expected trees of "
                "one structure"
            )
        pairs = find_pairs(params, spec)
        self.groups = group_pairs(pairs, self._params)
        self.paired = sorted(factor.index for pair in pairs for factor in (pair.a, pair.b))
        self.plain = sorted(set(range(len(self.leaves))) - set(self.paired))

    def folded(self, factor: FactorGroup) -> FactorMatrix:
        """The updates of factors, (group, stack, m, r), in the dtype of the computation."""
        return _fold(factor, [self.leaves[index] for index in factor.indices])

    def param(self, factor: FactorGroup) -> FactorMatrix:
        """The factors themselves, (group, stack, m, r), in the dtype of the computation."""
        return _fold(factor, [self._params[index] for index in factor.indices])

    def reached(self, factor: FactorGroup) -> FactorMatrix:
        """The factors that the updates lead to."""
        now = self.param(factor)
        return now.like(now.array + self.folded(factor).array)

    def basis(self, group: PairGroup, partner: FactorGroup) -> Basis:
        """Bases of what partners span, with q (group, stack, n, r) of `P = s Bᵀ` or `P = s A`."""
        if found := _shared_bases.get().get(self.basis_key(group, partner)):
            return found
        basis: Basis = orthonormal_basis(self._scaled(group, partner))
        return basis

    def bases(self, group: PairGroup) -> dict[tuple[Any, ...], Basis]:
        """The bases of both partners by their keys, made together where they are of one dtype."""
        keys = [self.basis_key(group, partner) for partner in (group.a, group.b)]
        known = _shared_bases.get()
        if all(key in known for key in keys):
            return {key: known[key] for key in keys}
        partners = [self._scaled(group, partner) for partner in (group.a, group.b)]
        if partners[0].array.dtype == partners[1].array.dtype:
            found = orthonormal_bases(*partners)
        else:
            found = tuple(map(orthonormal_basis, partners))
        return dict(zip(keys, found, strict=True))

    def _scaled(self, group: PairGroup, partner: FactorGroup) -> FactorMatrix:
        """What partners are with the scaling, `s Bᵀ` or `s A`."""
        folded = self.param(partner)
        return folded.like(folded.array * self.scalings(group))

    def basis_key(self, group: PairGroup, partner: FactorGroup) -> tuple[Any, ...]:
        """Identifies a basis by these very arrays, how they are read, and this scaling."""
        leaves = [Identity(self._params[index]) for index in partner.indices]
        scalings = [self._spec.scaling_of(pair) for pair in group.pairs]
        return (
            *leaves,
            *((f.rank_last, f.stack_axes) for f in partner.factors),
            *(Identity(s) if isinstance(s, jax.Array) else float(s) for s in scalings),
        )

    def scalings(self, group: PairGroup) -> jax.Array:
        """The s of each pair of a group, (group, 1, 1, 1)."""
        dtype = compute_dtype(self._params[group.pairs[0].a.index])
        given = [in_context(self._spec.scaling_of(pair)) for pair in group.pairs]
        scalings = [jnp.asarray(scaling, dtype) for scaling in given]
        return jnp.stack(scalings)[:, None, None, None]

    def put(self, factor: FactorGroup, x: FactorMatrix) -> None:
        """Replaces the updates of factors by x (group, stack, m, r), in the dtype of x."""
        for index, leaf in zip(factor.indices, factor.unfold(x), strict=True):
            self.leaves[index] = leaf

    def put_gradients(self, factor: FactorGroup, x: FactorMatrix) -> None:
        """Replaces gradients of factors by x (group, stack, m, r), in the dtypes they have."""
        for index, leaf in zip(factor.indices, factor.unfold(x), strict=True):
            self.leaves[index] = leaf.astype(self.leaves[index].dtype)

    def put_updates(self, factor: FactorGroup, x: FactorMatrix) -> None:
        """Replaces the updates of factors by x (group, stack, m, r), as `put_update` does."""
        for index, leaf in zip(factor.indices, factor.unfold(x), strict=True):
            self.put_update(index, leaf)

    def put_update(self, index: int, update: jax.Array) -> None:
        """Replaces a leaf by its update, in its parameter's dtype, as Optax's wrappers expect."""
        self.leaves[index] = update.astype(jnp.result_type(self._params[index]))

    def rebuilt(self) -> Any:
        """The tree of the leaves as they are now."""
        return jax.tree.unflatten(self._treedef, self.leaves)


def share_bases(
    inner: optax.GradientTransformation, *, spec: FactorSpec = DEFAULT_SPEC
) -> optax.GradientTransformationExtraArgs:
    """Computes the bases of an update once for all links of a chain.

    Without it each link computes them for itself, with the same result, and stacks the leaves of
    separate pairs that the link before it has taken apart. A link takes a shared basis only if it
    is given the very arrays that the basis was computed from, and the same scaling: what changes
    the parameters on their way to a link, or traces them anew, makes the link compute its own. On a
    mesh with explicit axes it does so too, unless the chain is `loft` or `loft_muon`.

    Args:
      inner: A chain of this package's links and of others.
      spec: The pairs, with the scaling of the links.

    Returns:
      The same transformation, with the same state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from loft_jax import calibrate_moments, project_gradients, project_updates, share_bases
      >>> chain = optax.chain(project_gradients(), calibrate_moments(), project_updates())
      >>> params = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}
      >>> tx = share_bases(chain)
      >>> once, _ = tx.update(params, tx.init(params), params)
      >>> each, _ = chain.update(params, chain.init(params), params)
      >>> bool(jnp.array_equal(once["lora_b"], each["lora_b"]))
      True
    """
    inner = optax.with_extra_args_support(inner)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        if explicit_mesh((updates, state, params)):  # inner may close over arrays there
            return inner.update(updates, state, params, **extra)
        with remember_stacks():
            tree = PairedUpdates(updates, params, spec)
            shared = dict(_shared_bases.get())
            for group in tree.groups:
                shared |= tree.bases(group)
            token = _shared_bases.set(shared)
            try:
                return inner.update(updates, state, params, **extra)
            finally:
                _shared_bases.reset(token)

    return optax.GradientTransformationExtraArgs(inner.init, update)


# Filled while `share_bases` runs the update of its chain, for the thread that runs it.
_shared_bases: ContextVar[Mapping[tuple[Any, ...], Basis]] = ContextVar(
    "shared_bases", default=MappingProxyType({})
)


def _fold(factor: FactorGroup, leaves: Sequence[jax.Array]) -> FactorMatrix:
    return factor.fold([x.astype(compute_dtype(x)) for x in leaves])


def compute_dtype(leaf: jax.Array) -> Any:
    """The dtype of computations with a leaf: float32 at least, since bases need its precision."""
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def absolute_square(x: jax.Array) -> jax.Array:
    """|x|², real for complex numbers too."""
    return jnp.real(x * jnp.conj(x))
