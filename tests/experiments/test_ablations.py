"""LoFT without one of its parts is the paper without that part, in dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.ablations import ABLATIONS, loft_with
from experiments.methods import optimizer_of
from loft_jax import loft
from tests.experiments.configs import config

STEPS, M, N, R = 6, 7, 5, 2
OVERLAPS = ("twice", "halved", "longer")


def gradients():
    """Full gradients and a start, the same for NumPy and for JAX."""
    rng = np.random.default_rng(3)
    full = rng.normal(size=(STEPS, M, N))
    return full, rng.normal(size=(M, R)), rng.normal(size=(R, N))


def run(tx, lr=0.1):
    """The product of the factors after each step, their gradients being those of fixed G."""
    full, a, b = gradients()
    params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}

    @jax.jit
    def step(carry, g):
        params, state = carry
        grads = {"lora_a": g @ params["lora_b"].T, "lora_b": params["lora_a"].T @ g}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["lora_a"] @ params["lora_b"]

    return np.asarray(jax.lax.scan(step, (params, tx.init(params)), jnp.asarray(full))[1])


def dense_loft(part, lr=0.1, b1=0.9, b2=0.999, eps=1e-3):
    """LoFT in dense matrices, in coordinates of the factors, as the paper writes it."""
    full, a, b = gradients()
    factors, products = {"a": a, "b": b.T}, []
    m = {k: np.zeros((x.shape[0], R)) for k, x in factors.items()}
    p = {k: np.zeros((x.shape[0], R, R)) for k, x in factors.items()}
    old = {k: np.zeros_like(x) for k, x in factors.items()}  # partners at the last step
    for t, g in enumerate(full, 1):
        direction = {}
        for k, other, grad in (("a", "b", g), ("b", "a", g.T)):
            partner = factors[other]
            inverse = np.linalg.inv(partner.T @ partner)
            x = grad @ partner @ (np.eye(R) if part == "scaling" else inverse)
            c = old[other].T @ partner @ inverse
            first, second = (np.eye(R) if part == kept else c for kept in ("first", "second"))
            m[k] = b1 * m[k] @ first + (1 - b1) * x
            p[k] = b2 * second.T @ p[k] @ second + (1 - b2) * x[:, :, None] * x[:, None, :]
            v = np.einsum("jr,irs,js->ij", partner, p[k], partner)
            d = (m[k] @ partner.T / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
            direction[k] = d @ partner @ inverse
        old = {k: x.copy() for k, x in factors.items()}
        keeper = "a" if part == "longer" or t % 2 == 0 else "b"  # M is the longer side
        kept = {"twice": (1, 1), "halved": (0.5, 0.5)}.get(part, (keeper == "a", keeper == "b"))
        for k, share in zip("ab", kept, strict=True):
            overlap = old[k] @ np.linalg.pinv(old[k]) @ direction[k]
            direction[k] = direction[k] - (1 - share) * overlap
        factors = {k: x - lr * direction[k] for k, x in factors.items()}
        if part == "retraction":
            linear = old["a"] @ factors["b"].T - lr * direction["a"] @ old["b"].T
            u, sigma, v = np.linalg.svd(linear)
            roots = np.sqrt(sigma[:R])
            factors = {"a": u[:, :R] * roots, "b": v[:R].T * roots}
        products.append(factors["a"] @ factors["b"].T)
    return np.stack(products)


@pytest.mark.parametrize(
    "part",
    [
        *("scaling", "twice"),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("none", "first", "second", "bound")),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("retraction", "halved", "longer")),
    ],
)
def test_a_chain_without_a_part_is_the_paper_without_it(part, float64):
    if part == "none":
        tx = loft(0.1, eps=1e-3, second_moment="full")
    else:
        tx = loft_with(part, config(), optax.constant_schedule(0.1), 1.0)
    np.testing.assert_allclose(run(tx), dense_loft(part), rtol=1e-9)


def test_every_part_matters(float64):
    whole = dense_loft("none")
    for part in ("scaling", "first", "second", "retraction", *OVERLAPS):
        assert np.abs(dense_loft(part) - whole)[-1].max() > 1e-3, part


@pytest.mark.slow
def test_the_plain_clip_is_of_the_factors_own_gradients(float64):
    # After a clip to a norm, Adam with an epsilon above it makes steps in proportion to that norm.
    schedule = optax.constant_schedule(0.1)
    small, smaller, projected = (
        run(loft_with(part, config(max_grad_norm=norm, eps=1e3), schedule, 1.0))[0]
        for part, norm in (("clip", 1e-2), ("clip", 1e-3), ("none", 1e-2))
    )
    _, a, b = gradients()
    np.testing.assert_allclose(small - a @ b, 10 * (smaller - a @ b), rtol=1e-4)
    assert not np.allclose(small - a @ b, projected - a @ b, rtol=0.1)


def test_ablations_have_the_optimizer_of_their_name():
    assert {optimizer_of(name) for name in ABLATIONS} == set(ABLATIONS.values())
