"""We read the adapters that PEFT writes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from loft_jax.hub import load_peft_adapter, save_peft_adapter
from loft_jax.hub.pretrained import load_pretrained
from loft_jax.lora import merge_lora
from tests.hub.peft_adapters import (
    CPU,
    WEIGHTS,
    assert_same_files,
    our_logits,
    randomized_peft,
    torch_llama,
    torch_logits,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

THEIRS = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "all linear": {"target_modules": "all-linear", "lora_dropout": 0.1},
    "regex": {"target_modules": r".*\.(self_attn\.o|mlp\.gate)_proj"},
    "rslora": {"target_modules": ["k_proj"], "use_rslora": True, "lora_alpha": 3},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"model\.layers\.\d+\.mlp\..*": 5},
        "alpha_pattern": {"^model.layers.[012].self_attn.v_proj": 1},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "up_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "dora": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    # Above the smaller side of the weight, which is 32 to 16.
    "wide": {"target_modules": ["k_proj"], "r": 24},
}


# Logits of such are compared in test_peft_table.py too.
SLOW = ("plain", "all linear", "regex", "excluded", "gaussian")


@pytest.fixture(
    scope="module",
    params=[pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in THEIRS],
)
def written(request, llama_folder, tmp_path_factory):
    """The folder of an adapter by PEFT, and the logits and our model of it."""
    fields = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **THEIRS[request.param]}
    theirs = randomized_peft(torch_llama(llama_folder), LoraConfig(**fields))
    folder = tmp_path_factory.mktemp("adapter")
    theirs.save_pretrained(folder)
    model = load_peft_adapter(folder, load_pretrained(llama_folder))
    return SimpleNamespace(folder=folder, logits=torch_logits(theirs), model=model)


def test_we_compute_the_logits_of_peft(written, llama_folder):
    np.testing.assert_allclose(our_logits(written.model), written.logits, atol=1e-4)
    base = torch_logits(torch_llama(llama_folder))
    assert np.abs(written.logits - base).max() > 0.5


def test_we_write_the_same_tensors_again(written, tmp_path):
    save_peft_adapter(tmp_path / "again", written.model)
    stored = load_file(written.folder / WEIGHTS)
    # PEFT stores the weight of an adapted embedding beside its factors.
    factors = {name: tensor for name, tensor in stored.items() if ".lora_" in name}
    (tmp_path / "factors").mkdir()
    save_file(factors, tmp_path / "factors" / WEIGHTS)
    assert_same_files(tmp_path / "again", tmp_path / "factors")


def test_peft_reads_what_we_write_again(written, llama_folder, tmp_path):
    save_peft_adapter(tmp_path, written.model)
    again = PeftModel.from_pretrained(torch_llama(llama_folder), tmp_path, **CPU)
    np.testing.assert_allclose(torch_logits(again), written.logits, atol=1e-5)


def test_a_merged_model_computes_the_logits_of_peft(written, llama_folder):
    model = load_peft_adapter(written.folder, load_pretrained(llama_folder))
    np.testing.assert_allclose(our_logits(merge_lora(model)), written.logits, atol=1e-3)


LINEAR = ["q_proj", "v_proj", "down_proj"]
WHOLE = {
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "one of each layer": {"modules_to_save": ["o_proj"]},
    "of one layer": {"modules_to_save": ["layers.1.mlp.up_proj"]},
}


@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
def test_what_an_adapter_holds_whole_is_written_again(llama_folder, tmp_path, fields):
    config = LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", **fields)
    theirs = randomized_peft(torch_llama(llama_folder), config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_peft_adapter(tmp_path / "theirs", load_pretrained(llama_folder))
    save_peft_adapter(tmp_path / "ours", model)
    again = PeftModel.from_pretrained(torch_llama(llama_folder), tmp_path / "ours", **CPU)
    np.testing.assert_allclose(torch_logits(again), torch_logits(theirs), atol=1e-5)
    kept, written = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert kept.keys() == written.keys()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_an_adapter_trained_are_written_again(tmp_path, bias):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 400}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).eval()
    base.save_pretrained(tmp_path / "base")
    theirs = randomized_peft(base, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_peft_adapter(tmp_path / "theirs", load_pretrained(tmp_path / "base"))
    save_peft_adapter(tmp_path / "ours", model, task_type=None)
    kept, written = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert kept.keys() == written.keys()
    for name, tensor in kept.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert any(name.endswith("bias") for name in kept)
