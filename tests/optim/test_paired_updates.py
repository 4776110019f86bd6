"""Bases computed once for all links of a chain, and never taken for those of other arrays."""

import concurrent.futures
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import loft_jax
from loft_jax import FactorSpec, loft
from loft_jax.optim import paired_updates
from tests.optim.problems import assert_trees_close, normal, pair, random_grads


def chain(spec):
    """Links that take bases, with no moments between them."""
    return optax.chain(
        loft_jax.project_gradients(spec=spec),
        loft_jax.clip_by_projected_norm(0.5, spec=spec),
        loft_jax.assign_overlap(spec=spec),
    )


def updated(tx, params):
    """The updates of a first step, compiled."""
    return jax.jit(lambda p: tx.update(random_grads(p), tx.init(p), p)[0])(params)


def count_bases(function, *args):
    """How many bases a function computes."""
    names = ("orthonormal_basis", "orthonormal_bases")
    calls = {name: mock.Mock(wraps=getattr(paired_updates, name)) for name in names}
    with mock.patch.multiple(paired_updates, **calls):
        jax.eval_shape(function, *args)
    return sum(len(call.args) for count in calls.values() for call in count.call_args_list)


def test_bases_are_computed_once():
    """One for each factor of each group, where every link by itself needs some."""
    params = {"q": pair(0), "k": pair(2, m=7, n=20), "head": jnp.ones(3)}
    spec = FactorSpec()
    links = optax.chain(
        loft_jax.project_gradients(),
        loft_jax.clip_by_projected_norm(0.5),
        loft_jax.calibrate_moments(),
        loft_jax.project_updates(),
        loft_jax.assign_overlap(),
    )
    state = links.init(params)
    assert count_bases(links.update, params, state, params) >= 4 * 5
    shared = loft_jax.share_bases(links, spec=spec)
    assert count_bases(shared.update, params, state, params) == 4
    assert count_bases(loft(0.1).update, params, loft(0.1).init(params), params) == 4
    outer = loft_jax.share_bases(shared)
    assert count_bases(outer.update, params, state, params) == 4
    muon = loft_jax.loft_muon(0.1)
    assert count_bases(muon.update, params, muon.init(params), params) == 4
    assert paired_updates._shared_bases.get() == {}


def wrapped(name):
    """The shared chain as Optax and Flax hold it, with its parameters."""
    params, spec = {"q": pair(0), "head": jnp.ones(3)}, FactorSpec(scaling=2.0)
    links = chain(spec)
    inner = {
        "masked": lambda: optax.masked(links, {"q": True, "head": False}),
        "partition": lambda: optax.partition(
            {"pairs": links, "others": optax.adam(0.1)}, {"q": "pairs", "head": "others"}
        ),
        "named_chain": lambda: optax.named_chain(("links", links), ("rate", optax.scale(-0.1))),
        "apply_if_finite": lambda: optax.apply_if_finite(links, 3),
        "nnx.State": lambda: links,
    }[name]()
    if name == "nnx.State":
        params = nnx.State({"q": {key: nnx.LoRAParam(x) for key, x in params["q"].items()}})
    return loft_jax.share_bases(inner, spec=spec), inner, params


@pytest.mark.parametrize(
    "name",
    [
        *("partition", "nnx.State"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("masked", "named_chain", "apply_if_finite")  # a partition masks too
        ),
    ],
)
def test_bases_reach_the_links_through(name):
    shared, inner, params = wrapped(name)
    assert count_bases(shared.update, params, shared.init(params), params) == 2
    assert_trees_close(updated(shared, params), updated(inner, params), rtol=1e-5)


def test_parameters_changed_on_the_way_have_bases_of_their_own():
    """A wrapper that gives the links other parameters: the shared bases are not those."""

    def elsewhere(inner):
        def update(updates, state, params=None):
            return inner.update(updates, state, jax.tree.map(lambda x: jnp.roll(x, 1, -1), params))

        return optax.GradientTransformation(inner.init, update)

    links = elsewhere(loft_jax.project_gradients())
    ours = updated(loft_jax.share_bases(links), pair(0))
    assert_trees_close(ours, updated(links, pair(0)), rtol=1e-5)


def test_links_of_another_scaling_have_bases_of_their_own():
    links = loft_jax.project_gradients(spec=FactorSpec(scaling=3.0))
    expected = updated(links, pair(0))
    for scaling in (1.0, jnp.float32(2.0)):
        shared = loft_jax.share_bases(links, spec=FactorSpec(scaling=scaling))
        assert_trees_close(updated(shared, pair(0)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "transform",
    ["vmap", "cond", *(pytest.param(x, marks=pytest.mark.slow) for x in ("grad", "nested jit"))],
)
def test_bases_leave_no_transformation(transform):
    """Bases of traced parameters are used where they were traced, and nowhere else."""
    project, clip = loft_jax.project_gradients(), loft_jax.clip_by_projected_norm(0.5)
    shared = loft_jax.share_bases(optax.chain(loft_jax.share_bases(project), clip))
    apart = optax.chain(project, clip)

    def run(tx):
        def update(params):
            return tx.update(random_grads(params), tx.init(params), params)[0]

        def loss(params):
            return sum(jnp.sum(x) for x in jax.tree.leaves(update(params)))

        if transform == "vmap":
            return jax.jit(jax.vmap(update))(pair(0, stack=(2,)))
        if transform == "grad":
            return jax.jit(jax.grad(loss))(pair(0))
        if transform == "nested jit":
            return jax.jit(lambda params: jax.jit(update)(params))(pair(0))
        return jax.jit(lambda p: jax.lax.cond(p["lora_a"][0, 0] < 9, update, lambda p: p, p))(
            pair(0)
        )

    assert_trees_close(run(shared), run(apart), rtol=1e-3, atol=1e-5)
    assert paired_updates._shared_bases.get() == {}


def test_an_update_that_fails_leaves_no_bases():
    def fail(updates, state, params=None):
        raise RuntimeError("on purpose")

    tx = loft_jax.share_bases(optax.GradientTransformation(lambda _: None, fail))
    with pytest.raises(RuntimeError, match="on purpose"):
        tx.update(pair(0), None, pair(0))
    assert paired_updates._shared_bases.get() == {}


def test_threads_do_not_share():
    """Several at once, each with parameters of its own, give what each gives by itself."""
    tx = loft_jax.share_bases(loft_jax.project_gradients())
    expected = [updated(tx, pair(seed)) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: updated(tx, pair(seed)), range(4)))
    for x, y in zip(found, expected, strict=True):
        assert_trees_close(x, y, rtol=0)


def test_adapters_of_one_module_do_not_share_bases():
    """PEFT's names: several adapters, whose pairs have one path in common."""
    names = (("lora_A/x", "lora_B/x"), ("lora_A/y", "lora_B/y"))
    one, other = pair(1), pair(2, r=2)
    params = {
        "q": {
            "lora_A": {"x": one["lora_a"], "y": other["lora_a"]},
            "lora_B": {"x": one["lora_b"], "y": other["lora_b"]},
        }
    }
    spec = FactorSpec(names)
    updates = updated(loft_jax.share_bases(chain(spec), spec=spec), params)
    # The norm that clips is that of both.
    alone = updated(loft_jax.share_bases(chain(FactorSpec())), {"x": one, "y": other})
    for key, expected in alone.items():
        np.testing.assert_allclose(updates["q"]["lora_B"][key], expected["lora_b"], rtol=1e-5)


def test_one_array_in_two_roles_has_two_bases():
    x = normal(0, 4, 4)
    tied = {
        "encoder": {"lora_a": x, "lora_b": normal(1, 4, 6)},
        "decoder": {"lora_a": normal(2, 7, 4), "lora_b": x},
        "square": {"lora_a": x, "lora_b": x},
    }
    tx = loft_jax.share_bases(chain(FactorSpec()))
    apart = jax.tree.map(jnp.copy, tied)
    found, expected = (tx.update(random_grads(p), tx.init(p), p)[0] for p in (tied, apart))
    assert_trees_close(found, expected, rtol=1e-6)


@pytest.mark.slow
def test_bases_are_shared_around_a_chain_that_shares_its_own():
    params, grads = pair(0), pair(1)
    links = loft(0.1), loft_jax.clip_by_projected_norm(1e-2)
    apart, around = optax.chain(*links), loft_jax.share_bases(optax.chain(*links))
    expected, _ = jax.jit(apart.update)(grads, apart.init(params), params)
    updates, _ = jax.jit(around.update)(grads, around.init(params), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), updates, expected)
