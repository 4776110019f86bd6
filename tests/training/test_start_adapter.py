"""Runs that go on from an adapter: what they start as, resume to, and refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tyro
from flax import nnx

from loft_jax import LoRAConfig, add_lora, load_pretrained, lora_layers, save_peft_adapter
from loft_jax.cli import main
from loft_jax.cli.finetune import finetune_default
from loft_jax.cli.source import Source
from loft_jax.errors import InputError
from loft_jax.training.loop import finetune
from loft_jax.training.objects import Objects
from loft_jax.training.start_adapter import check_start
from tests.tiny import tiny_tokenizer
from tests.training.processes import adapter


@pytest.fixture(scope="module")
def start(workspace, tmp_path_factory):
    """An adapter as it is after training: no factor is zero."""
    folder = tmp_path_factory.mktemp("start")
    settings = LoRAConfig(rank=2, alpha=4, target_modules=["q_proj", "down_proj"])
    model = add_lora(load_pretrained(workspace / "model"), settings, rngs=nnx.Rngs(3))
    for layer in lora_layers(model).values():
        layer.lora_b[...] = 0.1 * nnx.Rngs(4).params.normal(layer.lora_b.shape)
    save_peft_adapter(folder / "adapter", model, base_model=str(workspace / "model"))
    return folder / "adapter"


@pytest.fixture
def going_on(make_config, start):
    """The configuration of a run that goes on from it."""

    def build(**changes):
        usual = {"adapter": str(start), "rank": None, "target_modules": ("all-linear",)}
        return make_config(**{**usual, "steps": 4, "save_every": 2, **changes})

    return build


def test_a_run_goes_on_and_resumes(going_on, start, workspace, tmp_path, capsys):
    """It starts as the adapter, which may move; another one in its place is noticed."""
    moved = tmp_path / "moved"
    shutil.copytree(start, moved)
    config = going_on(
        adapter=str(moved), dropout=0.2, eval_path=str(workspace / "test.jsonl"), method="lora"
    )
    result = finetune(config, progress=False)
    test = ["--data.path", str(workspace / "test.jsonl"), "--data.max-length", "64"]
    assert main(["evaluate", "--adapter", str(start), *test]) == 0
    nll = json.loads(capsys.readouterr().out)["nll"]
    assert result.before["loss"] == pytest.approx(nll, abs=1e-5)
    assert result.after["loss"] < result.before["loss"]
    settings = json.loads((result.trained / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4)
    assert set(settings["target_modules"]) == {"q_proj", "down_proj"}

    undisturbed = adapter(config.output)
    shutil.rmtree(Path(config.output, "checkpoints", "4"))
    moved.rename(tmp_path / "again")
    config = going_on(
        adapter=str(tmp_path / "again"),
        dropout=0.2,
        eval_path=str(workspace / "test.jsonl"),
        method="lora",
    )
    finetune(config, resume=True, progress=False)
    for name, tensor in adapter(config.output).items():
        np.testing.assert_array_equal(tensor, undisturbed[name], err_msg=name)

    export = ["export", config.output, "--output", str(tmp_path / "exported")]
    assert main(export) == 0
    for name, tensor in adapter(tmp_path / "exported").items():
        np.testing.assert_array_equal(tensor, undisturbed[name], err_msg=name)
    file = tmp_path / "again" / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    capsys.readouterr()
    assert main(export) == 2
    assert "cannot export with another lora.adapter" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"cannot resume with another lora\.adapter"):
        finetune(config, resume=True, progress=False)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 16}, r"lora\.rank is 16, but .*adapter_config\.json has 2"),
        ({"alpha": 2.0}, r"lora\.alpha is 2\.0, but .* has 4\.0"),
        ({"target_modules": ("q_proj",)}, r"lora\.target_modules is .*q_proj"),
        ({"layers": "0"}, r"lora\.layers is '0', but"),
        ({"rank_pattern": {"q_proj": 4}}, r"lora\.rank_pattern is"),
        ({"method": "dora"}, r"method is dora, but the adapter in .* has no DoRA"),
        ({"method": "rslora"}, r"method is rslora, but the adapter in .* has no rsLoRA"),
        ({"adapter": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_settings_that_say_otherwise_are_refused(going_on, changes, told):
    with pytest.raises(InputError, match=told):
        finetune(going_on(**changes), progress=False)


def test_the_same_settings_are_no_conflict(going_on):
    check_start(going_on(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj")))
    for layers in ("0-1", "-1,0"):  # all that the model has
        check_start(going_on(layers=layers))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "pissa"}, "but method pissa has a start of its own"),
        ({"method": "full"}, "but method full trains no adapter"),
        ({"init": "balanced"}, r"but lora\.init is set too"),
    ],
)
def test_a_run_has_one_start(going_on, changes, told):
    with pytest.raises(InputError, match=told):
        going_on(**changes)


def test_an_adapter_that_holds_more_than_factors(going_on, start, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(start, folder)
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "bias": "all"}))
    with pytest.raises(InputError, match="bias is 'all', and no method trains biases"):
        finetune(going_on(adapter=str(folder)), progress=False)
    file.write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(InputError, match=r"method is lora, but the adapter in .* has DoRA"):
        finetune(going_on(adapter=str(folder)), progress=False)


def test_the_adapter_that_the_run_would_replace(going_on, start, tmp_path):
    shutil.copytree(start, tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match="which this run replaces by its own"):
        finetune(going_on(adapter=str(tmp_path / "run" / "adapter")), progress=False)


def test_the_base_is_by_default_that_of_the_adapter(start, workspace, tmp_path):
    """On the command line and in a file of settings."""
    flags = ["--adapter", str(start)]
    assert finetune_default(flags).run.model.path == str(workspace / "model")
    assert finetune_default([*flags, "--model", "x"]).run.model.path == tyro.MISSING
    file = tmp_path / "config.yaml"
    file.write_text(f"lora: {{adapter: {start}}}")
    found = finetune_default(["--config", str(file)]).run.model.path
    assert found == str(workspace / "model")


def test_the_chat_template_is_that_of_the_adapter(going_on, start, workspace, tmp_path):
    folder = tmp_path / "plain"
    shutil.copytree(start, folder)
    assert Objects().processor(going_on(adapter=str(folder))).chat_template
    tiny_tokenizer(chat_template=None).save_pretrained(folder)
    assert Objects().processor(going_on(adapter=str(folder))).chat_template  # the base's
    assert Source(adapter=str(folder)).processor.chat_template is None
    assert Source(model=str(workspace / "model")).processor.chat_template
