"""Every transform in one table, and paths of parameters under each: what the tests below share.

After the manner of Optax's own common tests: each test runs over all of the table. Values are
compared without compilation (`op_by_op`): an update is then a sequence of small operations that all
transforms share, and a combinator has to give the very same numbers.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loft_jax
from loft_jax.optim import paired_updates

LR = 0.1


def projected(scaling):
    return loft_jax.project_gradients(spec=loft_jax.FactorSpec(scaling=scaling))


def clipped(max_norm, first):
    clip = loft_jax.clip_by_projected_norm(max_norm, first=first)
    return optax.chain(loft_jax.project_gradients(), clip)


def calibrated(b1, b2, eps, second_moment):
    return optax.chain(
        loft_jax.project_gradients(),
        loft_jax.calibrate_moments(b1, b2, second_moment=second_moment),
        loft_jax.project_updates(eps),
    )


def balanced(learning_rate):
    return optax.chain(
        loft_jax.project_gradients(),
        loft_jax.calibrate_moments(),
        loft_jax.project_updates(1e-3),
        optax.scale_by_learning_rate(learning_rate),
        loft_jax.balance_factors(),
    )


# How to make each transform: a factory, its numbers, its other arguments. A link of a chain comes
# alone, or in the least chain that it can work in.
MOMENTS = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
ADAMW = {"learning_rate": LR, **MOMENTS, "weight_decay": 0.1}
MUON = {"learning_rate": LR, "beta": 0.9, "weight_decay": 0.1}
AT_ONCE = {"warmup_steps": 0}
TRANSFORMS = {
    "project_gradients": (projected, {"scaling": 2.0}, {}),
    "clip_by_projected_norm": (clipped, {"max_norm": 0.5}, {"first": "a"}),
    "full moments": (calibrated, MOMENTS, {"second_moment": "full"}),
    "factored moments": (calibrated, MOMENTS, {"second_moment": "factored"}),
    "diagonal moments": (calibrated, MOMENTS, {"second_moment": "diagonal"}),
    "alternate_factors": (loft_jax.alternate_factors, {}, {}),
    "assign_overlap": (loft_jax.assign_overlap, {}, {}),
    "balance_factors": (balanced, {"learning_rate": LR}, {}),
    "loft": (loft_jax.loft, ADAMW, {}),
    "loft, full": (loft_jax.loft, ADAMW, {"second_moment": "full"}),
    "loft, diagonal": (loft_jax.loft, ADAMW, {"second_moment": "diagonal"}),
    "loft, bfloat16": (loft_jax.loft, ADAMW, {"state_dtype": "bfloat16", "mu_dtype": "bfloat16"}),
    "loft, clipped": (
        loft_jax.loft,
        {**ADAMW, "max_grad_norm": 0.5, "scaling": 2.0},
        {"second_moment": "full"},
    ),
    "loft, alternate": (loft_jax.loft, ADAMW, {"move": "alternate"}),
    "loft, a first": (loft_jax.loft, ADAMW, {"first": "a"}),
    "loft, balanced": (loft_jax.loft, ADAMW, {"balance": True}),
    "loft_muon": (loft_jax.loft_muon, MUON, {}),
    "precondition_by_reflora": (loft_jax.precondition_by_reflora, {}, {**AT_ONCE, "interval": 2}),
    "reflora": (loft_jax.reflora, ADAMW, AT_ONCE),
    "reflora_s": (loft_jax.reflora_s, ADAMW, AT_ONCE),
    "lora_plus": (loft_jax.lora_plus, {**ADAMW, "ratio": 4.0}, {}),
    "lora_fa": (loft_jax.lora_fa, {**ADAMW, "scaling": 2.0}, {}),
    "riemannian_lora": (loft_jax.riemannian_lora, {**ADAMW, "damping": 1e-2}, {}),
    "alt_lora_plus": (loft_jax.alt_lora_plus, {**ADAMW, "scaling": 2.0}, {}),
}
# Where Optax's Adam has its state in the dtype of the parameters.
ADAM_OF_OPTAX = ("reflora", "reflora_s", "lora_plus", "lora_fa", "riemannian_lora")
ALIASES = [
    name
    for name in TRANSFORMS
    if name.startswith("loft") or name in (*ADAM_OF_OPTAX, "alt_lora_plus")
]
# Where the state is in bfloat16, other rounding of a number may move it by a unit of that.
ROUNDING = {"loft, bfloat16": (2e-2, 2e-2)}
# Links whose results go on to the moments, in no less than float32.
PROJECTED_GRADIENTS = ("project_gradients", "clip_by_projected_norm")
# Links that are part of others here, and daily only where nothing is computed.
LINKS = ("project_gradients", "clip_by_projected_norm", "assign_overlap", "balance_factors")
# What is part of others here: in "loft, clipped" the full moments, say.
SLOW = (
    *LINKS,
    "full moments",
    "factored moments",
    "diagonal moments",
    "loft, bfloat16",
    "loft, balanced",
    "loft, full",
    "loft, diagonal",
    "loft, alternate",
    "loft, a first",
    "precondition_by_reflora",
    "lora_fa",
    "alt_lora_plus",
)


DAILY = tuple(name for name in TRANSFORMS if name not in SLOW)


def each_of(names, daily=DAILY):
    marked = [
        name if name in daily else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]
    return pytest.mark.parametrize("name", marked)


every_transform, every_alias = each_of(TRANSFORMS), each_of(ALIASES)
# For tests that compute nothing: of shapes, dtypes and messages.
every_form = each_of(TRANSFORMS, (*DAILY, *LINKS))


def make(name):
    factory, numbers, others = TRANSFORMS[name]
    return factory(**numbers, **others)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def pair(seed, m=5, n=4, r=2, stack=()):
    return {"lora_a": normal(seed, *stack, m, r), "lora_b": normal(seed + 1, *stack, r, n)}


PARAMS = {"head": normal(5, 3), "q": pair(0)}


def gradients(params):
    return jax.tree.map(lambda p: jnp.sin(3 * p) + 0.3, params)


@contextlib.contextmanager
def op_by_op():
    """Without compilation, but for bases: half of all operations, on the factors alone."""

    def compiled(function):
        def call(*args):
            with jax.disable_jit(False):
                return function(*args)

        return call

    names = ("orthonormal_basis", "orthonormal_bases")
    bases = {name: compiled(getattr(paired_updates, name)) for name in names}
    with jax.disable_jit(), mock.patch.multiple(paired_updates, **bases):
        yield


def follow(tx, params, steps, **extra):
    """Parameters after each update, computed operation by operation."""
    with op_by_op():
        state, path = tx.init(params), []
        for _ in range(steps):
            updates, state = tx.update(gradients(params), state, params, **extra)
            params = optax.apply_updates(params, updates)
            path.append(params)
    return path


@functools.cache
def path_of(name):
    """Where a transform goes by itself: each factor has moved once."""
    return follow(make(name), PARAMS, 2)


def assert_close(x, y, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), x, y)


def kinds(tree):
    """Structure, shapes, dtypes and weak types."""
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: tree))
    return treedef, [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves]


def assert_stable(tx, params):
    """A traced update keeps the form of its state, and gives updates of the form of parameters."""
    state = tx.init(params)
    updates, new_state = jax.eval_shape(tx.update, gradients(params), state, params)
    assert [x.dtype for x in jax.tree.leaves(updates)] == [x.dtype for x in jax.tree.leaves(params)]
    treedef, leaves = jax.tree.flatten(new_state)[::-1]
    assert kinds(state) == (treedef, [(x.shape, x.dtype, x.weak_type) for x in leaves])
