import itertools
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.dense_loft import dense_loft
from benchmarks.optimizer import (
    Contestant,
    Turn,
    base_bytes,
    llama_shapes,
    main,
    make_optimizer,
    pair_shapes,
    random_like,
    take_turns,
    timing,
)
from loft_jax import loft
from loft_jax.errors import InputError
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


def test_turns_alternate_and_ratios_are_within_a_round():
    order = []

    class Fake(Turn):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def __call__(self, repeats):
            order.append((self.name, repeats))
            return next(self.seconds) * repeats

    # A machine that slows down by four: every ratio is 3 all the same.
    slow = [1.0, 1.0, 1.0, 1.0, 2.0, 4.0]
    turns = {"adamw": Fake("adamw", slow), "loft": Fake("loft", [3 * x for x in slow])}
    times = take_turns(turns, rounds=3, seconds=0.0)
    assert times == {"adamw": [1.0, 2.0, 4.0], "loft": [3.0, 6.0, 12.0]}
    assert [name for name, _ in order[6:]] == ["adamw", "loft", "loft", "adamw", "adamw", "loft"]
    assert all(repeats % 2 == 0 for _, repeats in order[6:])
    row = timing(times, "loft")
    assert (row["seconds"], row["rounds"], row["to_adamw"]) == (6.0, 3, 3.0)
    assert "to_dense" not in row


def test_shapes_are_those_of_llama():
    separate, stacked = (llama_shapes(4096, 11008, 32, 16, stacked=s) for s in (False, True))
    assert len(jax.tree.leaves(separate)) == 2 * 224
    assert len(jax.tree.leaves(stacked)) == 2 * 7
    assert separate["layers"]["31"]["mlp"]["down_proj"]["lora_a"].shape == (11008, 16)
    assert stacked["layers"]["self_attn"]["q_proj"]["lora_b"].shape == (32, 16, 4096)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # the 6.7e9 of Llama-2-7B but its embeddings
    assert base_bytes(separate) == base_bytes(stacked) == 2 * linear


@pytest.mark.slow
def test_measures_and_reports_everything(tmp_path, capsys):
    names = ["adamw", "loft-diagonal", "dense"]  # of each kind one: all would take minutes
    assert main(["--quick", "--optimizers", *names, "--output", str(tmp_path)]) == 0
    rows = {
        group: [json.loads(line) for line in (tmp_path / f"{group}.jsonl").open(encoding="utf-8")]
        for group in ("update", "compile", "train")
    }
    assert [row["optimizer"] for row in rows["update"]] == names
    assert [row["optimizer"] for row in rows["train"]] == names[:-1]
    assert [row["optimizer"] for row in rows["compile"]] == [*names, *names, *names[:-1]]
    for row in itertools.chain(*rows.values()):
        assert row["jax"] == jax.__version__
        assert row["backend"] == jax.default_backend()
        assert row["trace_seconds"] > 0
        assert row["compile_seconds"] > 0
        assert row["state_bytes"] > 0
        if row["group"] != "compile":
            assert row["seconds"] > 0
            assert row["to_adamw"] > 0
    [adamw] = [row for row in rows["update"] if row["optimizer"] == "adamw"]
    assert adamw["state_bytes"] == 2 * (2 * (48 + 32) * 2) * 4 + 4  # m and v in float32, a count
    assert adamw["to_adamw"] == 1.0
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert table.count("\n| 48x32 x 2, r 2 |") == len(names)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Contestant))
def test_every_contestant_moves_factors(name):
    shapes = pair_shapes(6, 5, 2, 1)
    tx = make_optimizer(name)
    params, gradients = random_like(shapes, 0), random_like(shapes, 1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(updates))


@pytest.mark.slow
def test_a_contestant_that_needs_too_much_is_skipped_with_a_reason(tmp_path):
    folder = str(tmp_path)
    flags = ["--cases", "update", "--optimizers", "adamw", "dense", "--memory-gib", "0.0001"]
    assert main([*flags, "--shapes", "64x64", "--ranks", "8", "--output", folder]) == 0
    adamw, dense = map(json.loads, (tmp_path / "update.jsonl").open(encoding="utf-8"))
    assert dense["skipped"].endswith("over the 0.0001 GiB that are allowed")
    assert "seconds" not in dense
    assert "to_dense" not in adamw
    assert "skipped: needs" in (tmp_path / "results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", ["1024", "0x8", "8x8x8x8", "axb"])
def test_refuses_a_shape_that_is_none(shape, tmp_path, capsys):
    assert main(["--shapes", shape, "--output", str(tmp_path / "none")]) == 2
    assert shape in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_nothing_measured_is_silent_about_nan():
    turn = Turn(lambda state: ({"q": jnp.array([1.0, state])}, jnp.nan), 0.0)
    turn(1)
    turn.check("loft")
    turn(1)
    with pytest.raises(InputError, match="loft came to values"):
        turn.check("loft")
