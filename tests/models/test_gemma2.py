"""Gemma 2 against transformers and PEFT."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers import AutoModelForCausalLM

from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained
from loft_jax.models import gemma2
from loft_jax.models.gemma2 import FAMILY, Gemma2, Gemma2Config
from tests.models.family_checks import (
    TOLERANCE,
    check_adapter_in,
    check_adapter_out,
    check_branches,
    check_gradients,
    check_greedy,
    check_mesh,
    check_padding,
    check_plan_works,
    save_filled,
    torch_causal_lm,
    torch_logits,
)

# Caps that scores and logits reach, and a window that texts do.
SIZES = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
    "initializer_range": 0.15,
}
VARIANTS = {
    "published": {},
    "no caps, untied, biases": {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
    "layers of other types": {
        "layer_types": ["full_attention", "sliding_attention"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "sliding_window": 1,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3},
    },
    "windows longer than the text": {
        "layer_types": ["sliding_attention"] * 3,
        "sliding_window": 17,
        "num_key_value_heads": 4,
    },
}
TOKENS = np.random.default_rng(0).integers(0, 400, (3, 17))


def save_gemma2(folder, **changes):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**{**SIZES, **changes})
    return save_filled(folder, transformers.Gemma2ForCausalLM(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gemma2(tmp_path_factory.mktemp("gemma2") / "model")


def our_logits(model):
    return np.asarray(model(TOKENS))


def their_logits(model):
    return torch_logits(model, TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    folder = save_gemma2(tmp_path / "model", **VARIANTS[variant])
    expected = their_logits(torch_causal_lm(folder))
    np.testing.assert_allclose(load_pretrained(folder)(TOKENS), expected, **TOLERANCE)


def test_padding_changes_nothing(folder):
    check_padding(folder, TOKENS)


def test_a_window_follows_the_branches_of_a_text(folder):
    check_branches(folder, TOKENS[:1, :15], sizes=(7, 3, 1, 4))


def test_gradients_are_those_of_torch(folder):
    def pairs(grads, theirs):
        ours, layer = grads["layers"], theirs.model.layers[1]
        return [
            (grads["embed_tokens"]["embedding"][...], theirs.model.embed_tokens.weight),
            (ours["self_attn"]["q_proj"]["kernel"][...][1].T, layer.self_attn.q_proj.weight),
            (ours["mlp"]["gate_proj"]["kernel"][...][1].T, layer.mlp.gate_proj.weight),
            (
                ours["post_feedforward_layernorm"]["scale"][...][1],
                layer.post_feedforward_layernorm.weight,
            ),
        ]

    check_gradients(folder, TOKENS, pairs)


def test_greedy_continuations_past_the_window_are_those_of_transformers(folder):
    check_greedy(folder, [TOKENS[0, :3].tolist(), TOKENS[1, :9].tolist()], new=12)


def test_embeddings_are_scaled_in_the_dtype_of_the_computation(folder, monkeypatch):
    given = []

    def stop(layers, x, *shared, cache, remat):
        given.append(x)
        return x, cache

    monkeypatch.setattr(gemma2, "run_layers", stop)
    load_pretrained(folder, dtype=jnp.bfloat16).hidden_states(TOKENS)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = theirs.model.embed_tokens(torch.tensor(TOKENS)).float().detach()
    assert given[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(given[0].astype(jnp.float32), expected)


def test_an_adapter_goes_to_peft_and_merges_for_transformers(folder, tmp_path):
    check_adapter_out(
        folder,
        tmp_path,
        auto=AutoModelForCausalLM,
        ours=our_logits,
        theirs=their_logits,
        head="causal-lm",
        task_type="CAUSAL_LM",
    )


def test_an_adapter_of_peft_is_read(folder, tmp_path):
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForCausalLM,
        ours=our_logits,
        theirs=their_logits,
        head="causal-lm",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
    )


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, "causal-lm")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder)


def test_parameters_start_as_transformers_starts_them():
    config = Gemma2Config.from_hf({"model_type": "gemma2", **SIZES})
    model = nnx.jit(lambda: Gemma2(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))()
    kernel = model.layers.mlp.gate_proj.kernel[...]
    assert float(jnp.std(kernel.astype(jnp.float32))) == pytest.approx(0.15, rel=0.05)
    assert not model.norm.scale[...].any()
    assert model.norm.scale.dtype == model.layers.input_layernorm.scale.dtype == jnp.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_go_to_transformers_and_back(variant):
    theirs = transformers.Gemma2Config(**{**SIZES, **VARIANTS[variant]})
    config = Gemma2Config.from_hf(theirs.to_dict())
    again = transformers.Gemma2Config(**config.to_hf())
    assert again.rope_parameters == theirs.rope_parameters
    assert Gemma2Config.from_hf(again.to_dict()) == config


def test_absent_fields_are_those_of_transformers():
    ours = Gemma2Config.from_hf({"model_type": "gemma2", "num_hidden_layers": 26})
    assert ours == Gemma2Config.from_hf(transformers.Gemma2Config().to_dict())
    assert ours == FAMILY.sizes["gemma-2-2b"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_activation", "gelu", "hidden_activation is 'gelu', only 'gelu_pytorch_tanh'"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3, expected a divisor"),
        ("head_dim", 15, "head_dim is 15, expected an even number"),
        ("layer_types", ["full_attention"], "layer_types has 1 entries, expected num_hidden_lay"),
        ("layer_types", "full_attention", "layer_types is 'full_attention', expected a list"),
        ("layer_types", ["chunked_attention"] * 3, "layer_types has 'chunked_attention', expected"),
        ("layer_types", [["full_attention"]] * 3, "layer_types has ['full_attention'], expected"),
        ("sliding_window", 0, "sliding_window is 0, expected an integer from 1"),
        ("attn_logit_softcapping", 0.0, "attn_logit_softcapping is 0.0, expected a positive"),
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000, expected an integer"),
        ("architectures", ["Gemma2ForSequenceClassification"], "Gemma2ForSequenceClassification"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        Gemma2Config.from_hf({"model_type": "gemma2", **SIZES, field: value})
    assert said in str(raised.value)
