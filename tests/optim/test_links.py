"""The links of the chain apart: what a clip counts, and in which order they stand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loft_jax
from loft_jax import loft
from tests.optim.problems import assert_trees_close, normal, pair, random_grads, run


def full_gradients(params, full):
    """Raw factor gradients of gradients (m, n) of the full weights."""
    return {
        name: {"lora_a": g @ params[name]["lora_b"].mT, "lora_b": params[name]["lora_a"].mT @ g}
        for name, g in full.items()
    }


@pytest.mark.parametrize("turn", ["a", "b", "both"])
def test_clip_norm_is_the_dense_one(turn):
    """Of a pair, a stack of pairs and a plain leaf."""
    params = {"q": pair(0), "k": pair(2, m=7, n=20, r=5, stack=(2,))}
    full = {"q": normal(7, 12, 9), "k": normal(8, 2, 7, 20)}
    grads = {**full_gradients(params, full), "bias": normal(9, 6)}
    params["bias"] = jnp.zeros(6)

    def projector(x):
        return x @ np.linalg.pinv(x)

    squares = [np.sum(np.square(grads["bias"]))]
    for name, g in full.items():
        rows = projector(np.asarray(params[name]["lora_a"])) @ g
        columns = projector(np.asarray(params[name]["lora_b"]).swapaxes(-1, -2))
        seen = {"a": g @ columns, "b": rows, "both": rows + g @ columns - rows @ columns}
        squares.append(np.sum(np.square(seen[turn])))
    norm = np.sqrt(sum(squares))
    how = {} if turn == "both" else {"move": "alternate", "first": turn}
    for max_norm, factor in ((norm / 3, 1 / 3), (norm * 1.01, 1.0)):
        clip = loft_jax.clip_by_projected_norm(max_norm, **how)
        project = loft_jax.project_gradients()
        projected, _ = project.update(grads, project.init(params), params)
        clipped, _ = clip.update(projected, clip.init(params), params)
        expected = jax.tree.map(lambda x, f=factor: x * f, projected)
        assert_trees_close(clipped, expected, rtol=1e-5)


def test_clip_norm_of_float16_leaves_does_not_overflow():
    params = {"bias": jnp.zeros(4, jnp.float16)}
    clip = loft_jax.clip_by_projected_norm(1.0, spec=loft_jax.FactorSpec(()))
    updates = {"bias": jnp.full(4, 300, jnp.float16)}
    clipped, _ = clip.update(updates, clip.init(params), params)
    np.testing.assert_allclose(clipped["bias"], 0.5, rtol=1e-3)


@pytest.mark.parametrize("first", ["a", "b"])
@pytest.mark.parametrize("size", [0.1, 10, 1e6])
def test_the_product_of_both_updates_is_no_longer_than_the_rest(first, size):
    """Beside a direction of W that is smaller than a step."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype("float64"), pair(0))
        params["lora_b"] = params["lora_b"].at[1].multiply(1e-3)
        given = jax.tree.map(lambda x: size * x, pair(9))
        tx = loft_jax.assign_overlap(first)
        updates, _ = tx.update(given, tx.init(params), params)
    a, b, da, db = (np.asarray(x) for t in (params, updates) for x in jax.tree.leaves(t))
    ratio = np.linalg.norm(da @ db) / np.linalg.norm(da @ b + a @ db)
    # As much is taken off as has to be, and no more.
    assert ratio < 0.5 if size < 1 else ratio == pytest.approx(1, rel=1e-9)


def test_learning_rates_have_gradients_where_b_is_zero():
    def loss(learning_rate):
        tx = loft(learning_rate, eps=1e-3)
        params = pair(0) | {"lora_b": jnp.zeros((3, 9))}
        updates, _ = tx.update(pair(1), tx.init(params), params)
        params = optax.apply_updates(params, updates)
        return jnp.sum(jnp.sin(params["lora_a"] @ params["lora_b"]))

    with jax.enable_x64(True):
        found, h = jax.grad(loss)(1e-2), 1e-6
        expected = float(loss(1e-2 + h) - loss(1e-2 - h)) / (2 * h)
        assert float(found) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("first", ["a", "b"])
def test_clip_of_the_update(first):
    """Behind loft, the clip bounds how far W moves, in the Frobenius norm, whoever's turn it is."""
    params = {"q": pair(0)}
    tx = optax.chain(loft(10.0, first=first), loft_jax.clip_by_projected_norm(0.01))
    path, _ = run(tx, params, random_grads, 6)
    weights = [p["q"]["lora_a"] @ p["q"]["lora_b"] for p in [params, *path]]
    moves = [float(jnp.linalg.norm(y - x)) for x, y in itertools.pairwise(weights)]
    np.testing.assert_allclose(moves, 0.01, rtol=1e-3)


def test_gradients_whose_norm_overflows_move_nothing():
    params = {"q": pair(0), "bias": jnp.zeros(3)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e20), params)
    tx = loft(1e-3, max_grad_norm=1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves(updates))


def test_links_out_of_order():
    params = {"q": pair(0)}
    tx = loft_jax.project_updates()
    with pytest.raises(ValueError, match="expected the Moments that calibrate_moments makes"):
        tx.update(params, tx.init(params), params)
