"""Adapters as other programs write them: names with additions, dtypes that differ, tied weights."""

import json
import logging

import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from loft_jax.errors import InputError
from loft_jax.hub import (
    load_peft_adapter,
    load_pretrained,
    save_peft_adapter,
    save_pretrained,
)
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora
from tests.hub.peft_adapters import CONFIG, TOKENS, WEIGHTS, our_logits, torch_logits
from tests.tiny import save_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "model"
    return save_tiny_llama(folder, tie_word_embeddings=True, vocab_size=64)


def made_by_peft(base, folder, **options):
    """Writes an adapter, all of whose trained parameters are random, and gives PEFT's logits."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config).eval()
    torch.manual_seed(1)
    changed = set()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.data_ptr() not in changed:
            changed.add(parameter.data_ptr())  # of a tied pair, once
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return torch_logits(model)


@pytest.fixture(scope="module")
def plain(llama_folder, tmp_path_factory):
    """An adapter of PEFT on q_proj, and its logits."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, made_by_peft(llama_folder, folder, target_modules=["q_proj"])


def rewritten(plain, folder, change, **settings):
    """Copies an adapter with other tensors and settings."""
    tensors = dict(change(*item) for item in load_file(plain / WEIGHTS).items())
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    config = {**json.loads((plain / CONFIG).read_text()), **settings}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def named(old, new):
    return lambda name, value: (name.replace(old, new), value)


@pytest.mark.parametrize(
    ("old", "new", "known"),
    [
        (".weight", ".default.weight", True),
        (".weight", ".mine.weight", False),
        (PREFIX, f"_orig_mod.{PREFIX}", False),
        (PREFIX, f"{PREFIX}_orig_mod.", False),
        (PREFIX, f"module._orig_mod.{PREFIX}", False),
        (PREFIX, f"module.module.{PREFIX}", False),
        (PREFIX, "", False),
    ],
)
def test_what_wrappers_add_to_names_is_taken_off(
    plain, llama_folder, tmp_path, caplog, old, new, known
):
    """With a warning, where PEFT reads nothing of such a name."""
    folder, expected = plain
    rewritten(folder, tmp_path, named(old, new))
    with caplog.at_level(logging.WARNING):
        model = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)
    assert ("6 tensors have names that PEFT does not read" in caplog.text) != known
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), tmp_path)
    read = np.allclose(torch_logits(theirs.eval()), expected, atol=1e-5)
    assert read == known


@pytest.mark.parametrize("name", ["module", "module.module", "_orig_mod", "lora_A", ""])
def test_a_name_of_nothing_else_is_refused(plain, base, tmp_path, name):
    rewritten(plain[0], tmp_path, lambda name, value: (name, value))
    save_file({**load_file(tmp_path / WEIGHTS), name: torch.ones(2)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="is no LoRA factor"):
        load_peft_adapter(tmp_path, base)


def test_two_adapters_in_one_file_are_refused(plain, base, tmp_path):
    tensors = load_file(plain[0] / WEIGHTS)
    both = {
        name.replace(".weight", f".{adapter}.weight"): value.clone()
        for name, value in tensors.items()
        for adapter in ("one", "two")
    }
    rewritten(plain[0], tmp_path, lambda name, value: (name, value))
    save_file(both, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"lora_A\.(one|two)\.weight' are both .*one adapter"):
        load_peft_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("dtype", "ours"),
    [
        (lambda name: torch.float16 if "layers.0" in name else torch.float32, "float32"),
        (lambda name: torch.float16 if "layers.0" in name else torch.bfloat16, "float32"),
        (lambda name: torch.float64, "float32"),
        (lambda name: torch.bfloat16, "bfloat16"),
    ],
)
def test_layers_may_differ_in_dtype(plain, llama_folder, tmp_path, dtype, ours):
    rewritten(plain[0], tmp_path, lambda name, value: (name, value.to(dtype(name))))
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), tmp_path)
    model = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    np.testing.assert_allclose(our_logits(model), torch_logits(theirs.eval()), atol=1e-4)
    assert lora_layers(model)["layers.self_attn.q_proj"].lora_a.dtype == ours


def test_an_embedding_of_a_base_in_bfloat16_takes_the_place_of_the_models(llama_folder, tmp_path):
    """PEFT stores the embedding that it adapts as it was loaded, and loads it from there."""
    made_by_peft(llama_folder, tmp_path, target_modules=["embed_tokens", "q_proj"])
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    rewritten(
        tmp_path, tmp_path, lambda key, value: (key, value.bfloat16() if key == name else value)
    )
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama_folder), tmp_path)
    expected = torch_logits(theirs.eval())
    model = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)
    np.testing.assert_allclose(our_logits(merge_lora(model)), expected, atol=1e-4)
    theirs.base_model.model.model.embed_tokens.base_layer.weight.data = (
        LlamaForCausalLM.from_pretrained(llama_folder).model.embed_tokens.weight.data
    )
    assert np.abs(torch_logits(theirs) - expected).max() > 1e-3


def test_a_merged_model_says_the_dtype_that_holds_all_of_it(llama_folder, tmp_path):
    """transformers loads a model in the dtype that its configuration names, whatever is stored."""
    made_by_peft(
        llama_folder, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    base = load_pretrained(llama_folder, param_dtype="bfloat16")
    model = merge_lora(load_peft_adapter(tmp_path / "adapter", base))
    save_pretrained(tmp_path / "merged", model)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.model.norm.weight.dtype == torch.float32
    head = load_file(tmp_path / "adapter" / WEIGHTS)[f"{PREFIX}lm_head.weight"]
    assert torch.equal(merged.lm_head.weight.data, head)


HARMLESS = {
    "ensure_weight_tying": True,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "lorap_emb_lr": 1e-6,
    "lorap_lr_ratio": 16.0,
}


def test_modules_are_saved_by_any_end_of_their_names(llama_folder, tmp_path):
    """PEFT saves the norms in the layers too."""
    expected = made_by_peft(
        llama_folder, tmp_path, target_modules=["q_proj"], modules_to_save=["norm"]
    )
    model = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)


def test_settings_of_training_change_nothing(plain, llama_folder, tmp_path):
    rewritten(plain[0], tmp_path, lambda name, value: (name, value), **HARMLESS)
    model = load_peft_adapter(tmp_path, load_pretrained(llama_folder))
    np.testing.assert_allclose(our_logits(model), plain[1], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": "all-linear"}, r"no factors for 'model\.layers\.0\..*all-linear|names"),
        ({"bias": "mine"}, "bias is 'mine', expected 'none', 'all', 'lora_only'"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"ensure_weight_tying": "x"}, "ensure_weight_tying is 'x', expected true or false"),
    ],
)
def test_settings_that_change_the_result_are_refused(plain, base, tmp_path, settings, message):
    rewritten(plain[0], tmp_path, lambda name, value: (name, value), **settings)
    with pytest.raises(InputError, match=message):
        load_peft_adapter(tmp_path, base)


def test_a_bias_that_is_not_the_models_is_refused_unless_it_was_trained(plain, base, tmp_path):
    """The model has no biases at all."""
    rewritten(plain[0], tmp_path, lambda name, value: (name, value), bias="all")
    tensors = load_file(tmp_path / WEIGHTS)
    name = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"
    save_file({**tensors, name: torch.ones(32)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"q_proj\.base_layer\.bias' is no LoRA factor"):
        load_peft_adapter(tmp_path, base)


TIED = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
TOGETHER = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    "options",
    [*TIED.values(), *({**options, "ensure_weight_tying": True} for options in TOGETHER.values())],
    ids=[*TIED, *(f"{name}, tied" for name in TOGETHER)],
)
def test_of_a_tied_pair_each_computes_what_it_does_in_peft(tied_folder, tmp_path, options):
    expected = made_by_peft(tied_folder, tmp_path / "theirs", **options)
    model = load_peft_adapter(tmp_path / "theirs", load_pretrained(tied_folder))
    np.testing.assert_allclose(our_logits(model), expected, atol=1e-4)
    save_peft_adapter(tmp_path / "ours", model)
    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tied_folder), tmp_path / "ours"
    )
    np.testing.assert_allclose(torch_logits(theirs.eval()), expected, atol=2e-5)
    save_pretrained(tmp_path / "merged", merge_lora(model))
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(torch_logits(merged), expected, atol=2e-5)
    assert not merged.config.tie_word_embeddings


def test_a_tied_head_cannot_be_a_target(tied_folder):
    message = r"'lm_head' has no weight of its own in this model, it is tied to embed_tokens"
    with pytest.raises(InputError, match=message):
        add_lora(
            load_pretrained(tied_folder),
            LoRAConfig(2, target_modules=["lm_head"]),
            rngs=nnx.Rngs(0),
        )


def test_a_head_is_tied_again_if_an_adapter_of_it_cannot_be_read(tied_folder, tmp_path):
    made_by_peft(tied_folder, tmp_path, target_modules=["lm_head"])
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[f"{PREFIX}lm_head.lora_A.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    model = load_pretrained(tied_folder)
    with pytest.raises(InputError, match=r"lm_head\.lora_A\.weight' is missing"):
        load_peft_adapter(tmp_path, model)
    assert model.config.tie_word_embeddings
    assert not hasattr(model, "lm_head")


assert TOKENS.max() < 64  # the vocabulary of `tied_folder`
