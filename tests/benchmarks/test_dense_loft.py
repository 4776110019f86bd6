"""Dense LoFT, which `loft` is measured against, is LoFT: it goes the way of the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.optimizer.dense_loft import dense_loft
from loft_jax import loft
from tests.oracle import DenseLoFT

SHAPES = ((9, 6), (5, 8))
RANK, STEPS = 3, 12


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def problem():
    rng = np.random.default_rng(0)
    return {
        f"layer_{i}": {
            "lora_a": rng.normal(size=(m, RANK)),
            "lora_b": rng.normal(size=(RANK, n)),
            "target": rng.normal(size=(m, n)),
        }
        for i, (m, n) in enumerate(SHAPES)
    }


def path_of_w(tx):
    """Both W after every step, of factors that follow tx on least squares."""
    pairs = problem()
    targets = {name: pair.pop("target") for name, pair in pairs.items()}
    params = jax.tree.map(jnp.asarray, pairs)

    def weights(params):
        return {name: pair["lora_a"] @ pair["lora_b"] for name, pair in params.items()}

    def loss(params):
        return sum(jnp.sum((w - targets[name]) ** 2) / 2 for name, w in weights(params).items())

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, path = tx.init(params), []
    for _ in range(STEPS):
        params, state = step(params, state)
        path.append(weights(params))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("from_the_left", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e6], ids=["clipped", "unclipped"])
def test_dense_loft_goes_the_way_of_loft(float64, max_grad_norm, from_the_left):
    numbers = {"learning_rate": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-6}
    dense = dense_loft(**numbers, max_grad_norm=max_grad_norm, from_the_left=from_the_left)
    ours = path_of_w(dense)
    exact = path_of_w(
        loft(**numbers, max_grad_norm=max_grad_norm, second_moment="full", move="alternate")
    )
    start = {name: pair["lora_a"] @ pair["lora_b"] for name, pair in problem().items()}
    for name in ours[0]:
        moved = np.linalg.norm(exact[-1][name] - start[name])
        assert moved > 0.1
        for x, y in zip(ours, exact, strict=True):
            assert np.linalg.norm(x[name] - y[name]) <= 1e-5 * moved


@pytest.mark.slow
def test_dense_loft_goes_the_way_of_the_oracle(float64):
    numbers = {"b1": 0.8, "b2": 0.95, "eps": 1e-6, "max_grad_norm": 0.5}
    pair = problem()["layer_0"]
    judge = DenseLoFT(pair["lora_a"], pair["lora_b"], 0.05, move="alternate", **numbers)
    params = {"q": {name: jnp.asarray(pair[name]) for name in ("lora_a", "lora_b")}}
    tx = dense_loft(0.05, **numbers)
    state = tx.init(params)
    for _ in range(STEPS):
        full = judge.w - pair["target"]
        grads = {
            "lora_a": full @ params["q"]["lora_b"].T,
            "lora_b": params["q"]["lora_a"].T @ full,
        }
        updates, state = tx.update({"q": grads}, state, params)
        params = optax.apply_updates(params, updates)
        judge.step(full)
        w = params["q"]["lora_a"] @ params["q"]["lora_b"]
        np.testing.assert_allclose(w, judge.w, rtol=0, atol=1e-5 * np.abs(judge.w).max())
