import jax
import jax.numpy as jnp
import numpy as np
import optax

import loft_jax
from loft_jax import loft


def test_is_adam_on_the_scaled_gradients_while_the_partner_rests():
    """With B left alone its span does not move, and A takes Adam's steps of `G P (PᵀP)⁻¹`."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(3, 5))
    with jax.enable_x64(True):
        params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}
        chain = optax.chain(
            loft_jax.project_gradients(),
            loft_jax.calibrate_moments(0.8, 0.9, second_moment="diagonal"),
            loft_jax.project_updates(1e-4),
        )
        state, adam = chain.init(params), optax.scale_by_adam(0.8, 0.9, 1e-4)
        adam_state = adam.init(params["lora_a"])
        for _ in range(5):
            grad = rng.normal(size=(7, 5))
            updates, state = chain.update(
                {"lora_a": jnp.asarray(grad @ b.T), "lora_b": jnp.asarray(a.T @ grad)},
                state,
                params,
            )
            scaled = grad @ b.T @ np.linalg.inv(b @ b.T)
            expected, adam_state = adam.update(jnp.asarray(scaled), adam_state)
            np.testing.assert_allclose(updates["lora_a"], expected, rtol=1e-8)


def test_depends_on_the_factorization():
    """What the full and the factored second moment do not: the missing invariance is real."""
    rng = np.random.default_rng(1)
    grad = rng.normal(size=(7, 5))
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(3, 5))
    moves = []
    for t in (np.eye(3), rng.normal(size=(3, 3))):
        params = {"lora_a": jnp.asarray(a @ t), "lora_b": jnp.asarray(np.linalg.solve(t, b))}
        grads = {"lora_a": grad @ params["lora_b"].T, "lora_b": params["lora_a"].T @ grad}
        tx = loft(0.1, second_moment="diagonal")
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        moves.append(params["lora_a"] @ updates["lora_b"])
    assert not np.allclose(*moves, rtol=0.1)
