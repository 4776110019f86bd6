import io
import logging
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from loft_jax.training import monitor
from loft_jax.training.flops import ModelFlops
from loft_jax.training.monitor import Compilations, Speedometer, largest_condition, memory_in_use

FLOPS = ModelFlops(weights=10_000, width=64)


def test_time_is_split_and_adds_up(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(monitor, "peak_flops", lambda device: 1e6)
    speed = Speedometer(FLOPS, full=False, devices=2)
    parts = ((1.0, "data"), (9.0, "compile"), (5.0, "eval"), (2.0, "save"), (1.0, "data"))
    for seconds, part in parts:
        with speed.spent_on(part):
            now[0] += seconds
    speed.count(30, 16)
    speed.count(10, 16)
    now[0] += 4.0
    values = speed.read()
    assert values["tokens_per_second"] == 10.0
    assert values["seconds_per_step"] == 2.0
    assert [values[f"seconds_{part}"] for part in ("data", "eval", "save")] == [2.0, 5.0, 2.0]
    assert values["seconds_compile"] == 9.0
    assert values["mfu"] == pytest.approx(10 * FLOPS.per_token(16, full=False) / 2e6)
    speed.count(1, 16)
    now[0] += 1.0
    assert speed.read()["seconds_data"] == 0.0


def test_a_compilation_is_told_once_for_each_shape(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed, seen, news = Speedometer(FLOPS, full=False, devices=1), io.StringIO(), []
    with (
        caplog.at_level(logging.INFO, logger="loft_jax"),
        tqdm(total=4, desc="loft", file=seen, mininterval=0) as bar,
    ):
        compilations = Compilations(bar, "loft", speed)
        for length in (64, 64, 32, 64):
            tokens = jnp.zeros((4, length))
            batch = {"tokens": tokens, "positions": tokens, "places": jnp.zeros((4, 8))}
            with compilations.of(batch) as new:
                now[0] += 3.0
            news.append(new)
            assert bar.desc == "loft: "
    assert news == [True, False, True, False]
    assert caplog.messages == [
        f"compiled the step for batches of tokens 4 x {length}, places 4 x 8 in 3.0 s"
        for length in (64, 32)
    ]
    assert "loft: compiling for batches of tokens 4 x 32, places 4 x 8 ..." in seen.getvalue()
    values = speed.read()
    assert values["seconds_compile"] == 6.0
    assert "tokens_per_second" not in values  # no step was timed


def test_no_share_of_a_peak_that_is_not_known():
    speed = Speedometer(FLOPS, full=True, devices=1)
    speed.count(1, 16)
    assert "mfu" not in speed.read()


def test_flops_are_those_that_xla_counts():
    """Of the products of a forward pass without embedding lookups, masks and norms."""
    import jax
    from flax import nnx

    from loft_jax.models.llama import Llama, LlamaConfig

    config = LlamaConfig(512, 256, 512, 4, 4, 4, 64)
    model = Llama(config, rngs=nnx.Rngs(0))
    rows, length = 2, 128
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    lowered = forward.lower(state, jnp.zeros((rows, length), jnp.int32))
    unrolled = lowered.compile().cost_analysis()["flops"]
    # XLA counts the body of the scan once.
    full = ModelFlops.of(model).per_token(length, full=True) / 3 * rows * length
    head = 2 * 256 * 512 * rows * length
    body = (full - head) / 4
    assert unrolled == pytest.approx(head + body, rel=0.1)


def test_memory():
    held = memory_in_use()
    assert 1e8 < held["host_bytes"] < 1e12


def test_condition_is_the_worst_of_all_factors():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(16, 4)))
    a = np.stack([u * [1, 2, 3, 30], u])  # (stack, in, r), condition 900 of the Gram matrix
    b = rng.normal(size=(2, 4, 16))
    params = {"q": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}
    expected = max(np.linalg.cond(m) ** 2 for m in (*a, *b))
    assert largest_condition(params) == pytest.approx(expected, rel=1e-3)


def test_condition_of_factors_without_rank():
    a = jnp.ones((4, 2))
    assert largest_condition({"lora_a": a, "lora_b": jnp.zeros((2, 3))}) > 1e6
    zeros = {"lora_a": jnp.eye(4, 2), "lora_b": jnp.zeros((2, 3))}
    assert largest_condition(zeros) == 1.0
    broken = {"lora_a": a * jnp.nan, "lora_b": jnp.zeros((2, 3))}
    assert largest_condition(broken) == np.inf
