"""GPT-2 against transformers and PEFT."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from loft_jax.errors import InputError
from loft_jax.generation import generate
from loft_jax.hub import load_pretrained
from loft_jax.hub.pretrained import load_model_config
from loft_jax.models.gpt2 import GPT2, GPT2Config
from loft_jax.tasks.causal_lm import CausalLM, predicted
from tests.models.family_checks import (
    check_adapter_in,
    check_adapter_out,
    check_mesh,
    check_plan_works,
)

SIZES = {
    "vocab_size": 400,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False, "n_layer": 3},
    "exact gelu": {"activation_function": "gelu", "n_inner": 48, "layer_norm_epsilon": 1e-3},
    "one head": {"n_head": 1, "n_embd": 24},
}
TOKENS = np.random.default_rng(0).integers(0, 400, (3, 17))


def save_gpt2(folder, **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**SIZES, **changes})
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gpt2(tmp_path_factory.mktemp("gpt2") / "model")


def torch_logits(model, tokens=TOKENS, **more):
    with torch.no_grad():
        return model(torch.tensor(tokens), **more).logits.numpy()


def our_logits(model):
    return np.asarray(model(TOKENS))


# The plain one is read in other tests too.
@pytest.mark.parametrize(
    "variant",
    [pytest.param(x, marks=pytest.mark.slow) if x == "plain" else x for x in VARIANTS],
)
def test_logits_are_those_of_transformers(tmp_path, variant):
    folder = save_gpt2(tmp_path / "model", **VARIANTS[variant])
    model = load_pretrained(folder)
    model.eval()
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(folder, side):
    model = load_pretrained(folder)
    model.eval()
    lengths = (17, 9, 1)
    columns = [slice(17 - n, 17) if side == "left" else slice(0, n) for n in lengths]
    mask = np.zeros((3, 17), np.int32)
    for row, where in enumerate(columns):
        mask[row, where] = 1
    found = np.asarray(model(np.where(mask, TOKENS, 0), segment_ids=mask))
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, where in enumerate(columns):
        alone = torch_logits(theirs, TOKENS[row : row + 1, where])
        np.testing.assert_allclose(found[row, where], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_gradients_are_those_of_torch(folder):
    model = load_pretrained(folder)
    model.eval()
    batch = {
        "tokens": TOKENS.astype(np.int32),
        "positions": np.tile(np.arange(17, dtype=np.int32), (3, 1)),
        "segment_ids": np.ones((3, 17), np.int32),
        "loss_mask": np.ones((3, 17), np.float32),
    }
    inputs = predicted(batch)
    grads = nnx.grad(lambda model: CausalLM().loss(model, inputs)[0])(model)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor(TOKENS)
    logits = theirs(tokens).logits[:, :-1].transpose(1, 2)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="sum").backward()
    block = theirs.transformer.h[1]
    for found, expected in (
        (grads["h"]["attn"]["c_attn"]["kernel"], block.attn.c_attn.weight),
        (grads["h"]["mlp"]["c_proj"]["bias"], block.mlp.c_proj.bias),
        (grads["h"]["ln_2"]["scale"], block.ln_2.weight),
    ):
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(found[...][1], expected.grad, atol=1e-4 * scale)


def test_greedy_continuations_are_those_of_transformers(folder):
    model = load_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    new = generate(model, [TOKENS[0, :5].tolist()], max_new_tokens=12, eos_token_ids=())
    expected = theirs.generate(
        torch.tensor(TOKENS[:1, :5]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert new[0] == expected[0, 5:].tolist()


def test_a_text_beyond_the_positions_is_refused(folder):
    with pytest.raises(InputError, match="tokens has rows of 65, and the model has 64 positions"):
        load_pretrained(folder)(np.ones((1, 65), np.int32))


def test_a_continuation_beyond_the_positions_is_refused(folder):
    with pytest.raises(InputError, match="has 60 tokens and max_new_tokens is 5, expected 64 tog"):
        generate(load_pretrained(folder), [[1] * 60], max_new_tokens=5)


def test_an_adapter_goes_to_peft_and_merges_for_transformers(folder, tmp_path):
    check_adapter_out(
        folder,
        tmp_path,
        auto=AutoModelForCausalLM,
        ours=our_logits,
        theirs=torch_logits,
        head="causal-lm",
        task_type="CAUSAL_LM",
    )
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]


def test_an_adapter_of_peft_is_read(folder, tmp_path):
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForCausalLM,
        ours=our_logits,
        theirs=torch_logits,
        head="causal-lm",
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )


def test_names_of_older_checkpoints_are_read(folder, tmp_path):
    """The hub's GPT-2 has no prefix, and carries masks."""
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    older["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(older, tmp_path / "model.safetensors")
    again, model = load_pretrained(tmp_path), load_pretrained(folder)
    again.eval()
    model.eval()
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))


def test_dropout_is_that_of_the_configuration(folder):
    model = load_pretrained(folder)
    model.train()
    assert float(jnp.abs(model(TOKENS) - model(TOKENS)).max()) > 0.01
    quiet = dataclasses.replace(model.config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    still = GPT2(quiet, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(still, nnx.RngState))


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, "causal-lm")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder)


def test_configurations_go_to_transformers_and_back():
    config = GPT2Config(n_embd=48, n_inner=100, n_head=3, tie_word_embeddings=False)
    theirs = transformers.GPT2Config(**config.to_hf())
    assert GPT2Config.from_hf(theirs.to_dict()) == config


def test_names_of_other_families_are_those_of_transformers():
    named = {"hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 40}
    for more in ({}, {"n_embd": 24, "n_positions": 20}):
        hf = {"num_attention_heads": 3, **named, **more}
        theirs = GPT2Config.from_hf(transformers.GPT2Config(**hf).to_dict())
        assert GPT2Config.from_hf({"model_type": "gpt2", **hf}) == theirs


def test_a_family_and_its_positions_are_known(folder):
    family, config = load_model_config(folder)
    assert (family.model_type, config.max_length) == ("gpt2", 64)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("activation_function", "swish", "activation_function is 'swish', expected one of"),
        ("n_head", 5, "n_embd is 32, expected a multiple of n_head"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True"),
        ("resid_pdrop", 1.0, "resid_pdrop is 1.0"),
        ("is_causal", False, "is_causal is False"),
        ("num_attention_heads", 5, "n_embd is 32, expected a multiple of n_head (5)"),
        ("architectures", ["GPT2DoubleHeadsModel"], "GPT2DoubleHeadsModel"),
        ("n_layer", 0, "n_layer is 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        GPT2Config.from_hf({"model_type": "gpt2", **SIZES, field: value})
    assert said in str(raised.value)
