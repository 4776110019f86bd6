"""Each method by its name: the run it is, and what its optimizer moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.log import Cell
from experiments.methods import METHODS, configured, optimizer_of
from experiments.tasks import WITHOUT_RANK
from tests.experiments.configs import config


def test_every_method_has_a_run_of_its_own():
    cell = Cell("tiny", "lora", 4, 1e-3, 1, 1e-6, 8.0)
    task = config(steps=60, max_grad_norm=1.0, eps=1e-8)
    runs = {m: configured(task, dataclasses.replace(cell, method=m)) for m in METHODS}
    for name, one in runs.items():
        assert (one.schedule.learning_rate, one.seed, one.optimizer.eps) == (1e-3, 1, 1e-6)
        assert one.optimizer.max_grad_norm == (not name.endswith("-unclipped"))
        assert name in WITHOUT_RANK or (one.lora.rank, one.lora.alpha) == (4, 8.0), name
    assert runs["reflora"].method.warmup("kaiming_uniform") == 10
    assert runs["reflora-balanced"].method.warmup("balanced") == 0
    kinds = {
        (c.method, c.lora.init, c.optimizer.max_grad_norm, optimizer_of(name))
        for name, c in runs.items()
    }
    assert len(kinds) == len(METHODS)


def test_full_linear_moves_what_adapters_stand_on():
    leaf = jnp.linspace(1, 2, 6).reshape(2, 3)
    params = {"q_proj": {"kernel": leaf}, "embed": {"embedding": leaf}, "norm": {"scale": leaf}}
    make = optimizer_of("full-linear")
    tx = make(config(method="full", max_grad_norm=1.0), optax.constant_schedule(0.1), 1.0)
    updates, _ = tx.update(params, tx.init(params), params)
    alone = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1, eps=1e-3))
    expected, _ = alone.update(leaf, alone.init(leaf), leaf)
    np.testing.assert_allclose(updates.pop("q_proj")["kernel"], expected, rtol=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
