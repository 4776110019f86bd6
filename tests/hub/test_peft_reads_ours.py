"""PEFT reads the adapters that we write, and so do we."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from peft import PeftModel
from safetensors import safe_open
from safetensors.numpy import load_file

from loft_jax.hub import load_peft_adapter, save_peft_adapter
from loft_jax.hub.pretrained import load_pretrained
from tests.hub.peft_adapters import (
    CONFIG,
    CPU,
    WEIGHTS,
    adapted_llama,
    assert_same_files,
    our_logits,
    torch_llama,
    torch_logits,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

WIDE = 12  # k_proj is 32 to 16

OURS = {
    "all linear": {},
    "alpha": {"alpha": 12.0, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "mlp.up_proj": 6},
        "alpha_pattern": {"down_proj": 2.5},
    },
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "dropout": {"dropout": 0.1},
    "rslora": {"use_rslora": True, "alpha": 5.0, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True, "alpha": 6.0},
    "pissa": {"init": "pissa", "alpha": 3.0, "target_modules": ["q_proj", "up_proj"]},
    "balanced": {"init": "balanced", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "balanced dora": {"init": "balanced", "use_dora": True, "target_modules": ["q_proj", "o_proj"]},
    # Written at twice the rank, which is above the smaller side of the weight.
    "wide": {"init": "pissa", "rank": WIDE, "target_modules": ["k_proj"]},
}


# What differs little from another one.
SLOW = ("all linear", "alpha", "dropout", "balanced dora")


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in OURS],
)
def written(request, llama_folder, tmp_path_factory):
    """One of our models with an adapter, and the folder that the adapter was written to."""
    fields = OURS[request.param]
    model = adapted_llama(llama_folder, **fields)
    model.eval()
    folder = tmp_path_factory.mktemp("adapter")
    save_peft_adapter(folder, model, base_model=str(llama_folder))
    return SimpleNamespace(fields=fields, model=model, folder=folder)


@pytest.fixture(scope="module")
def peft_model(written, llama_folder):
    """The same model, as PEFT opens it."""
    return PeftModel.from_pretrained(torch_llama(llama_folder), written.folder, **CPU)


def test_peft_computes_our_logits(written, peft_model, llama_folder):
    logits = torch_logits(peft_model)
    np.testing.assert_allclose(our_logits(written.model), logits, atol=1e-4)
    assert np.abs(logits - torch_logits(torch_llama(llama_folder))).max() > 1.0


def test_peft_adapts_our_layers_and_no_others(written, peft_model):
    # PEFT adds factors of zeros to a layer that is targeted and not in the file, without a warning.
    modules = peft_model.base_model.model.named_modules()
    adapted = {name for name, module in modules if hasattr(module, "lora_A")}
    with safe_open(written.folder / WEIGHTS, "np") as file:
        names = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118
    assert adapted == {name.split(".lora_")[0] for name in names}


def test_weights_are_marked_as_of_pytorch(written):
    with safe_open(written.folder / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_configuration_says_what_was_trained(written, llama_folder):
    config, fields = json.loads((written.folder / CONFIG).read_text()), written.fields
    assert config["base_model_name_or_path"] == str(llama_folder)
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)
    assert config["use_rslora"] == fields.get("use_rslora", False)
    assert config["use_dora"] == fields.get("use_dora", False)


def test_a_start_that_is_not_zero_doubles_the_rank(written):
    rank = json.loads((written.folder / CONFIG).read_text())["r"]
    assert rank == written.fields.get("rank", 4) * (2 if "init" in written.fields else 1)


def test_nothing_else_is_written(written):
    assert sorted(path.name for path in written.folder.iterdir()) == [CONFIG, WEIGHTS]


def test_we_read_it_and_write_it_again_bit_for_bit(written, llama_folder, tmp_path):
    again = load_peft_adapter(written.folder, load_pretrained(llama_folder))
    np.testing.assert_array_equal(our_logits(again), our_logits(written.model))
    save_peft_adapter(tmp_path, again, base_model=str(llama_folder))
    assert_same_files(tmp_path, written.folder)
    config = json.loads((written.folder / CONFIG).read_text())
    assert json.loads((tmp_path / CONFIG).read_text()) == {**config, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def written_bfloat16(llama_folder, tmp_path_factory):
    model = adapted_llama(llama_folder, dtype=jnp.bfloat16, target_modules="q_proj")
    folder = tmp_path_factory.mktemp("bfloat16")
    save_peft_adapter(folder, model)
    return SimpleNamespace(model=model, folder=folder)


def test_bfloat16_factors_are_written_as_bfloat16(written_bfloat16):
    stored = load_file(written_bfloat16.folder / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_bfloat16_factors_are_read_as_bfloat16(written_bfloat16, llama_folder, tmp_path):
    again = load_peft_adapter(written_bfloat16.folder, load_pretrained(llama_folder))
    save_peft_adapter(tmp_path, again)
    assert_same_files(tmp_path, written_bfloat16.folder)


def test_bfloat16_factors_may_be_read_as_float32(written_bfloat16, llama_folder):
    base = load_pretrained(llama_folder)
    wide = load_peft_adapter(written_bfloat16.folder, base, dtype=jnp.float32)
    factor = wide.layers.self_attn.q_proj.lora_a
    assert factor.dtype == jnp.float32
    stored = written_bfloat16.model.layers.self_attn.q_proj.lora_a
    np.testing.assert_array_equal(factor[...], stored[...])
