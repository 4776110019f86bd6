"""The command that measures optimizers, from its flags to its page."""

import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import pytest

from benchmarks.history import History
from benchmarks.optimizer.__main__ import main
from benchmarks.optimizer.contestants import Contestant, make_optimizer
from benchmarks.optimizer.report import latest
from benchmarks.optimizer.shapes import base_bytes, llama_shapes, pair_shapes, random_like


@pytest.mark.slow
def test_measures_and_reports_everything(tmp_path, capsys):
    names = ["adamw", "loft-diagonal", "dense"]  # of each kind one: all would take minutes
    assert main(["--quick", "--optimizers", *names, "--results", str(tmp_path)]) == 0
    rows = {group: [] for group in ("update", "compile", "train")}
    for row in latest(History(tmp_path, "optimizer").read()):
        rows[row["group"]].append(row)
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
    table = (tmp_path / "optimizer.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert table.count("\n| 48x32 x 2, r 2 |") == len(names)
    assert (tmp_path / "optimizer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_contestant_that_needs_too_much_is_skipped_with_a_reason(tmp_path):
    folder = str(tmp_path)
    flags = ["--cases", "update", "--optimizers", "adamw", "dense", "--memory-gib", "0.0001"]
    assert main([*flags, "--shapes", "64x64", "--ranks", "8", "--results", folder]) == 0
    adamw, dense = latest(History(tmp_path, "optimizer").read())
    assert dense["skipped"].endswith("over the 0.0001 GiB that are allowed")
    assert "seconds" not in dense
    assert "to_dense" not in adamw
    assert "skipped: needs" in (tmp_path / "optimizer.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", ["1024", "0x8", "8x8x8x8", "axb"])
def test_refuses_a_shape_that_is_none(shape, tmp_path, capsys):
    assert main(["--shapes", shape, "--results", str(tmp_path / "none")]) == 2
    assert shape in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Contestant))
def test_every_contestant_moves_factors(name):
    shapes = pair_shapes(6, 5, 2, 1)
    tx = make_optimizer(name)
    params, gradients = random_like(shapes, 0), random_like(shapes, 1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(updates))


def test_shapes_are_those_of_llama():
    separate, stacked = (llama_shapes(4096, 11008, 32, 16, stacked=s) for s in (False, True))
    assert len(jax.tree.leaves(separate)) == 2 * 224
    assert len(jax.tree.leaves(stacked)) == 2 * 7
    assert separate["layers"]["31"]["mlp"]["down_proj"]["lora_a"].shape == (11008, 16)
    assert stacked["layers"]["self_attn"]["q_proj"]["lora_b"].shape == (32, 16, 4096)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # the 6.7e9 of Llama-2-7B but its embeddings
    assert base_bytes(separate) == base_bytes(stacked) == 2 * linear
