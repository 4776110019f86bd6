"""Whole runs on a tiny model: learning, stopping, killing, resuming, exporting."""

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, load_pretrained, load_tokenizer
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.training.config_io import config_from_dict, load_config, save_config
from loft_jax.training.loop import finetune
from loft_jax.training.metrics import read_metrics
from loft_jax.training.model import base_fingerprint, load_base
from loft_jax.training.run import Run
from tests.tiny import save_tiny_llama, tiny_tokenizer
from tests.training.conftest import short_run
from tests.training.processes import adapter, losses

CHOICES = (" negative", " positive")


@pytest.fixture(scope="module")
def finished(workspace, tmp_path_factory):
    """The configuration of a run that has ended, with all of its checkpoints."""
    config = short_run(
        workspace,
        tmp_path_factory.mktemp("finished"),
        steps=6,
        save_every=2,
        keep_last=9,
        profile_steps=(2, 3),
    )
    finetune(config, progress=False)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """The same of a copy, to go on from."""
    shutil.copytree(finished.output, tmp_path / "copy")
    return dataclasses.replace(finished, output=str(tmp_path / "copy"))


@pytest.mark.parametrize(
    "method", ["loft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "full"))]
)
def test_a_run_learns_and_leaves_everything(make_config, workspace, method):
    config = make_config(
        method=method,
        steps=30,
        target_modules=("all-linear",) if method == "lora" else ("q_proj", "o_proj"),
        learning_rate=1e-2 if method != "full" else 2e-3,
        eval_path=str(workspace / "test.jsonl"),
        choices=CHOICES,
    )
    result = finetune(config, progress=False)
    assert result.steps == 30
    assert result.after["loss"] < 0.5 * result.before["loss"]
    assert set(result.after) == {"loss", "accuracy"}
    folder = Path(config.output)
    names = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "loss.png", ".lock"}
    names.add("model" if method == "full" else "adapter")
    assert {entry.name for entry in folder.iterdir()} == names
    compiled, row = read_metrics(folder / "metrics.jsonl")[1:3]
    logged = {"step", "train_loss", "grad_norm", "update_norm", "learning_rate", "skipped_steps"}
    logged |= {"tokens_per_second", "seconds_per_step", "seconds_data", "seconds_eval"}
    logged |= {"seconds_compile", "seconds_save", "host_bytes"}
    assert set(row) - {"gram_condition"} == logged
    assert logged - set(compiled) == {"tokens_per_second", "seconds_per_step"}
    if method != "full":
        settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == config.model.path
        load_peft_adapter(folder / "adapter", load_pretrained(config.model.path))
    else:
        load_pretrained(folder / "model")
        load_tokenizer(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *("dora", "loft-muon", "lora-plus", "rslora", "lora-fa", "pissa", "riemannian"),
        *("altlora-plus", "reflora", "reflora-s"),
    ],
)
def test_every_method_resumes_and_exports(make_config, method):
    """A run that stopped half way leaves what an undisturbed one does, to the bit."""
    short = {"reflora_warmup_steps": 2} if method.startswith("reflora") else {}
    config = make_config(method=method, steps=6, save_every=3, **short)
    result = finetune(config, progress=False)
    undisturbed = adapter(config.output), losses(config.output)
    shutil.rmtree(Path(config.output, "checkpoints", "6"))
    shutil.rmtree(result.trained)
    finetune(config, resume=True, progress=False)
    again = adapter(config.output), losses(config.output)
    assert again[1] == undisturbed[1]
    for name, tensor in undisturbed[0].items():
        np.testing.assert_array_equal(again[0][name], tensor, err_msg=name)
    for name, tensor in undisturbed[0].items():
        if "lora_B" in name:  # behind PiSSA's own start, what has been added to it
            assert np.abs(tensor[:, -config.lora.rank :]).max() > 0, name
    load_peft_adapter(result.trained, load_pretrained(config.model.path))


def test_the_state_is_told_before_training(make_config, monkeypatch, caplog):
    """With all that LoFT can be set to, since these settings reach the optimizer here only."""
    config = make_config(
        method="loft",
        steps=2,
        rank=2,
        second_moment="factored",
        state_dtype="bfloat16",
        balance=True,
    )
    monkeypatch.setattr(Run, "placed", Mock(side_effect=KeyboardInterrupt))  # before it compiles
    with caplog.at_level(logging.INFO, logger="loft_jax"), pytest.raises(KeyboardInterrupt):
        finetune(config, progress=False)
    told = re.search(
        r"loft: ([\d,]+) trained parameters, optimizer state of ([\d,]+) bytes", caplog.text
    )
    trained, held = (int(number.replace(",", "")) for number in told.groups())
    rows = trained // 2
    assert 0 < held - rows * (2 + 2 * 4 + 2 * 4) < 2000  # weights in bfloat16, mu, basis; grams


@pytest.mark.parametrize("known", [15, 16])
def test_rows_beyond_the_known_positions_are_told(
    known, workspace, make_config, tmp_path, monkeypatch, caplog
):
    """The longest of the prompts with their completions has 16 tokens."""
    shutil.copytree(workspace / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    sizes = json.loads(file.read_text()) | {"max_position_embeddings": known}
    file.write_text(json.dumps(sizes))
    monkeypatch.setattr(Run, "placed", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finetune(make_config(model=str(tmp_path / "model")), progress=False)
    assert ("max_position_embeddings of the model is 15" in caplog.text) == (known == 15)


def test_checkpoints_hold_no_base_weights(finished):
    folder = Path(finished.output, "checkpoints", "4")
    sizes = [f.stat().st_size for f in folder.rglob("*") if f.is_file()]
    model = load_pretrained(finished.model.path)
    base = sum(x.nbytes for x in jax.tree.leaves(model.embed_tokens.embedding[...]))
    state = json.loads((folder / "params" / "_METADATA").read_text())
    assert "embed_tokens" not in json.dumps(state)
    assert "kernel" not in json.dumps(state)
    assert sum(sizes) < 40 * base


def test_a_run_that_ends_before_reflora_begins_is_refused(make_config):
    with pytest.raises(InputError, match="warmup_steps is 100, and the run has 4 steps"):
        finetune(make_config(method="reflora", steps=4), progress=False)


def test_lora_fa_refuses_embeddings(make_config):
    config = make_config(method="lora-fa", steps=4, target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(InputError, match="embed_tokens is an embedding, whose A starts at zero"):
        finetune(config, progress=False)


def test_resume_refuses_another_run(copied):
    schedule = dataclasses.replace(copied.schedule, learning_rate=0.5)
    with pytest.raises(InputError, match=r"another schedule\.learning_rate: .*0\.003, now "):
        finetune(dataclasses.replace(copied, schedule=schedule), resume=True, progress=False)
    with pytest.raises(InputError, match="holds a run at step 6 already; resume it"):
        finetune(copied, progress=False)
    assert finetune(copied, resume=True, progress=False).steps == 6


def test_a_resumed_run_may_compute_its_batches_in_other_parts(copied):
    folder = Path(copied.output)
    expected = losses(folder)
    shutil.rmtree(folder / "checkpoints" / "6")
    schedule = dataclasses.replace(copied.schedule, accumulation_steps=2)
    finetune(dataclasses.replace(copied, schedule=schedule), resume=True, progress=False)
    assert losses(folder) == pytest.approx(expected, rel=1e-5)
    assert "accumulation_steps: 2" in (folder / "config.yaml").read_text()


def test_a_run_goes_on_from_where_its_files_have_moved_to(make_config, workspace, tmp_path, caplog):
    """To the bit, if they hold the same; and not with others in their place."""
    files = {name: tmp_path / "first" / name for name in ("model", "train.jsonl", "test.jsonl")}
    shutil.copytree(workspace, tmp_path / "first")
    common = {"steps": 4, "save_every": 2, "keep_last": 9}

    def config(place):
        data = dataclasses.replace(make_config().data, path=str(place / "train.jsonl"))
        held_out = str(place / "test.jsonl")
        return make_config(model=str(place / "model"), data=data, eval_path=held_out, **common)

    finetune(config(tmp_path / "first"), progress=False)
    folder = Path(make_config().output)
    expected = losses(folder), adapter(folder)
    shutil.rmtree(folder / "checkpoints" / "4")
    shutil.rmtree(folder / "adapter")
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = config(tmp_path / "moved")
    files = {name: tmp_path / "moved" / name for name in files}
    for field, name in (("data.path", "train.jsonl"), ("evaluation.path", "test.jsonl")):
        content = files[name].read_text()
        files[name].write_text(content.replace("joy", "fun"))
        with pytest.raises(InputError, match=f"cannot resume with another {field}: "):
            finetune(moved, resume=True, progress=False)
        files[name].write_text(content)
    files["model"].rename(tmp_path / "kept")
    save_tiny_llama(files["model"], seed=1)
    tiny_tokenizer().save_pretrained(files["model"])
    with pytest.raises(InputError, match=r"cannot resume with another model: .*its weights"):
        finetune(moved, resume=True, progress=False)
    shutil.rmtree(files["model"])
    (tmp_path / "kept").rename(files["model"])
    assert not (folder / "adapter").exists()
    finetune(moved, resume=True, progress=False)
    assert losses(folder) == expected[0]
    for name, tensor in adapter(folder).items():
        np.testing.assert_array_equal(tensor, expected[1][name], err_msg=name)


def test_a_base_is_told_from_others_by_its_weights_and_constants(make_config, workspace, tmp_path):
    def fingerprint(folder):
        return base_fingerprint(load_base(make_config(model=str(folder)), CausalLM()))

    shutil.copytree(workspace / "model", tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    assert fingerprint(tmp_path / "model") == (known := fingerprint(workspace / "model"))
    changed = json.loads(settings.read_text())
    settings.write_text(json.dumps({**changed, "rms_norm_eps": 1e-3}))
    assert fingerprint(tmp_path / "model") != known
    settings.write_text(json.dumps(changed))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] *= -1
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert fingerprint(tmp_path / "model") != known


def test_resume_without_a_checkpoint(make_config):
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        finetune(make_config(), resume=True, progress=False)


def test_killed_before_the_first_checkpoint(finished, tmp_path, caplog):
    config = dataclasses.replace(finished, output=str(tmp_path / "killed"))
    folder = Path(config.output)
    (folder / "checkpoints" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 9.0}\n{"step": 2, "tr')
    other = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=2))
    with pytest.raises(InputError, match=r"another lora\.rank"):
        finetune(other, resume=True, progress=False)
    finetune(config, resume=True, progress=False)
    assert "stopped before its first checkpoint; starting again" in caplog.text
    assert losses(config.output) == losses(finished.output)


def test_a_finished_run_of_constant_rates_goes_on(make_config, tmp_path, caplog):
    """To the bit as if it had been started with that many steps; each run compiles a step once."""
    whole = make_config(output=str(tmp_path / "whole"), steps=6, schedule="constant")
    short = {"output": str(tmp_path / "extended"), "schedule": "constant"}
    with jax.log_compiles():
        finetune(whole, progress=False)
        finetune(make_config(**short, steps=4), progress=False)
        assert finetune(make_config(**short, steps=6), resume=True, progress=False).steps == 6
    for program in ("mean_gradients", "updated"):
        made = f"Compiling jit({program})"
        assert sum(made in line for line in caplog.messages) == 3
    assert losses(short["output"]) == losses(whole.output)
    weights = adapter(whole.output)
    for name, tensor in adapter(short["output"]).items():
        np.testing.assert_array_equal(tensor, weights[name], err_msg=name)
    with pytest.raises(InputError, match="steps is 5, but the run is at step 6 already"):
        finetune(make_config(**short, steps=5), resume=True, progress=False)


def test_what_more_steps_would_have_been_otherwise_is_refused(make_config):
    longer = SimpleNamespace(config=make_config(steps=4, warmup_steps=3), steps=4)
    Run._check_steps(longer, 2, {"steps": 3})
    with pytest.raises(InputError, match="was started with 2, fewer than its warmup_steps 3"):
        Run._check_steps(longer, 2, {"steps": 2})


def test_resume_from_a_damaged_checkpoint(copied, caplog):
    folder = Path(copied.output)
    expected, weights = losses(folder), adapter(folder)
    for file in (folder / "checkpoints" / "6" / "optimizer").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    assert finetune(copied, resume=True, progress=False).steps == 6
    assert "falling back to the checkpoint of step 4" in caplog.text
    assert losses(folder) == expected
    for name, tensor in adapter(folder).items():
        np.testing.assert_array_equal(tensor, weights[name], err_msg=name)


@pytest.mark.parametrize(
    ("method", "name", "lost"),
    [
        ("full", "model", False),
        ("lora", "adapter_model", True),
        pytest.param("lora", "adapter_model", False, marks=pytest.mark.slow),
        pytest.param("full", "model", True, marks=pytest.mark.slow),
    ],
)
def test_an_extended_run_sets_aside_what_it_had_written(make_config, method, name, lost):
    """Also one that starts again, since its checkpoints are gone; one that had ended does not."""
    settings = {"method": method, "schedule": "constant"}
    first = finetune(make_config(**settings, steps=1), progress=False).trained
    weights = load_file(first / f"{name}.safetensors")
    if lost:
        shutil.rmtree(first.parent / "checkpoints")
    elif method == "full":  # an adapter is small, and is written again
        before = (first / f"{name}.safetensors").stat().st_mtime_ns
        ended = finetune(make_config(**settings, steps=1), resume=True, progress=False)
        assert ended.trained == first
        assert (first / f"{name}.safetensors").stat().st_mtime_ns == before
    finetune(make_config(**settings, steps=2), resume=True, progress=False)
    (aside,) = first.parent.glob(f"{first.name}-*")
    kept, new = (load_file(folder / f"{name}.safetensors") for folder in (aside, first))
    assert all(np.array_equal(kept[name], weights[name]) for name in weights)
    assert any(not np.array_equal(new[name], weights[name]) for name in weights)


def test_a_model_in_the_output_is_refused_before_any_work(make_config):
    config = make_config(method="full")
    Path(config.output, "model").mkdir(parents=True)
    with pytest.raises(InputError, match="model: exists already; choose another output"):
        finetune(config, progress=False)


def test_a_tokenizer_of_another_model_is_refused(make_config, tmp_path):
    save_tiny_llama(tmp_path / "model", vocab_size=100)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()  # told before the weights are read
    with pytest.raises(InputError, match="have 100 rows; expected a tokenizer and weights"):
        finetune(make_config(model=str(tmp_path / "model")), progress=False)


def test_a_loss_that_is_not_finite_stops_the_run(make_config):
    config = make_config(
        target_modules=("all-linear",),
        learning_rate=1e30,
        max_grad_norm=0.0,
        schedule="constant",
    )
    with pytest.raises(InputError, match=r"not finite in 10 steps in a row|not finite at step"):
        finetune(config, progress=False)
    assert not list(Path(config.output, "checkpoints").glob("[0-9]*"))


def test_a_run_of_skipped_steps_alone_leaves_nothing(make_config, workspace, tmp_path):
    """Fewer of them than it takes to give up: an adapter of them would be one of zeros."""
    shutil.copytree(workspace / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"][0] = np.nan
    save_file(weights, tmp_path / "model" / "model.safetensors")
    config = make_config(model=str(tmp_path / "model"), steps=3)
    with pytest.raises(InputError, match="not finite in 3 steps in a row, up to step 3 of 3"):
        finetune(config, progress=False)
    assert not Path(config.output, "adapter").exists()
    assert not list(Path(config.output, "checkpoints").glob("[0-9]*"))


def test_a_loss_that_rose_is_told_at_the_end(make_config, caplog):
    finetune(
        make_config(method="full", learning_rate=10.0, schedule="constant", steps=3), progress=False
    )
    told = (
        "the training loss was .* at the end: expected it to fall; a smaller learning_rate than 10"
    )
    assert re.search(told, caplog.text)


def test_config_survives_in_the_run(finished):
    saved = config_from_dict(load_config(Path(finished.output) / "config.yaml"))
    model = dataclasses.replace(finished.model, dtype="float32", param_dtype="float32")
    assert saved == dataclasses.replace(finished, model=model)


def test_a_trace_of_some_steps(finished):
    traces = list(Path(finished.output, "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


@pytest.mark.slow
def test_a_run_on_a_quantized_base(make_config, workspace):
    """With evaluations that no regular checkpoint coincides with: the best is kept all the same."""
    held_out = {"eval_path": str(workspace / "test.jsonl"), "eval_every": 7, "save_every": 100}
    config = make_config(quantization="nf4", method="loft", steps=30, keep_last=1, **held_out)
    result = finetune(config, progress=False)
    evaluated = {
        row["step"]: row["eval_loss"]
        for row in read_metrics(Path(config.output) / "metrics.jsonl")
        if row["step"] and "eval_loss" in row
    }
    assert sorted(evaluated) == [7, 14, 21, 28, 30]
    best = min(evaluated, key=evaluated.get)
    kept = {int(f.name) for f in Path(config.output, "checkpoints").iterdir() if f.name.isdigit()}
    assert kept == {best, 30}
    assert result.after["loss"] < 0.7 * result.before["loss"]
    load_peft_adapter(result.trained, load_pretrained(config.model.path))


def test_a_step_with_a_loss_that_is_no_number_is_skipped_and_told(make_config, monkeypatch, caplog):
    """One batch of it; the run goes on, and its log counts."""
    placed = Run.placed

    def broken(self, batch):
        arrays = placed(self, batch)
        broken.calls += 1
        if broken.calls == 3:
            arrays["weights"] = arrays["weights"] * jax.numpy.nan
        return arrays

    broken.calls = 0
    monkeypatch.setattr(Run, "placed", broken)
    config = make_config(steps=6, save_every=3, keep_last=9)
    assert finetune(config, progress=False).steps == 6
    rows = read_metrics(Path(config.output) / "metrics.jsonl")
    rows = [row for row in rows if "skipped_steps" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert "train_loss" not in rows[2]
    assert "step 3: 1 steps skipped so far" in caplog.text
    saved = [f.name for f in Path(config.output, "checkpoints").iterdir() if f.name.isdigit()]
    assert saved == ["6"]  # not at step 3: its parameters may be why the loss was none


@pytest.mark.slow
def test_the_optimizers_state_in_the_memory_of_the_host_changes_nothing(make_config, tmp_path):
    plain = make_config(output=str(tmp_path / "plain"), steps=6)
    config = make_config(output=str(tmp_path / "offloaded"), steps=6, offload_optimizer=True)
    finetune(plain, progress=False)
    finetune(config, progress=False)
    assert losses(config.output) == losses(plain.output)
    saved = Path(config.output, "checkpoints", "6")
    shutil.rmtree(saved)
    finetune(config, resume=True, progress=False)
    assert losses(config.output) == losses(plain.output)
