"""Gemma 2 against transformers and PEFT."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained
from loft_jax.models import llama
from loft_jax.models.gemma2 import FAMILY, Gemma2Config, RMSNorm
from tests.models.decoder_checks import (
    SIZES,
    TOKENS,
    check_adapters,
    check_gradients,
    check_greedy,
    check_logits,
    check_quantized,
    check_texts_in_rows,
    loaded_in_torch,
    our_logits,
    parameter_count,
    save_decoder,
    torch_logits,
)
from tests.models.family_checks import TOLERANCE, check_adapter_in, check_mesh, check_plan_works

# Caps that scores and logits reach, and a window that texts do.
OWN = {
    **SIZES,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
    "initializer_range": 0.15,
}
VARIANTS = {
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
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e3},
    },
    "windows longer than the text": {
        "layer_types": ["sliding_attention"] * 3,
        "sliding_window": 17,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-2,
    },
}


def save_gemma2(folder, **changes):
    return save_decoder(folder, transformers.Gemma2Config(**{**OWN, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gemma2(tmp_path_factory.mktemp("gemma2") / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    check_logits(save_gemma2(tmp_path, **VARIANTS[variant]))


def test_padded_and_packed_texts_give_what_they_give_alone(folder):
    check_texts_in_rows(folder)


def test_branches_of_a_text_give_what_each_gives_after_it(folder):
    """The window counts positions: branches stand farther from the text than they are."""
    ids = np.repeat([0, 1, 2, 3], [7, 3, 1, 4])[None]  # 0: the text
    tokens = TOKENS[:1, : ids.size]
    model, theirs = load_pretrained(folder), loaded_in_torch(folder)
    hidden, _ = model.hidden_states(tokens, branch_ids=jnp.asarray(ids))
    logits = np.asarray(model.logits(hidden))
    for branch in (1, 2, 3):
        alone = torch_logits(theirs, tokens[(ids == 0) | (ids == branch)][None])
        np.testing.assert_allclose(logits[ids == branch], alone[0, 7:], **TOLERANCE)


@pytest.mark.slow
def test_gradients_are_those_of_torch(folder):
    names = ("self_attn.q_proj.weight", "mlp.gate_proj.weight", "post_feedforward_layernorm.weight")
    check_gradients(folder, names, layer=1)


@pytest.mark.slow
def test_continuations_beyond_the_window_are_those_of_transformers(folder):
    check_greedy(folder)


@pytest.mark.slow
def test_adapters_go_to_peft_and_come_from_it(folder, tmp_path):
    check_adapters(folder, tmp_path)


def test_an_adapter_of_scaled_embeddings_is_read(folder, tmp_path):
    """PEFT scales what it adds to the embeddings as they are scaled."""
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForCausalLM,
        ours=our_logits,
        theirs=torch_logits,
        head="causal-lm",
        task_type="CAUSAL_LM",
        target_modules=["embed_tokens", "v_proj"],
    )


@pytest.mark.slow
def test_a_quantized_model_is_that_of_its_dequantized_kernels(folder):
    check_quantized(folder)


def test_embeddings_are_scaled_in_the_dtype_of_the_computation(folder, monkeypatch):
    given = []

    def stop(layers, x, *shared, cache, remat):
        given.append(x)
        return x, cache

    monkeypatch.setattr(llama, "run_layers", stop)
    load_pretrained(folder, dtype=jnp.bfloat16).hidden_states(TOKENS)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    expected = theirs.model.embed_tokens(torch.tensor(TOKENS)).float().detach()
    assert given[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(given[0].astype(jnp.float32), expected)


def test_a_norm_rounds_once():
    x, scale = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    norm = RMSNorm(64, epsilon=1e-6, param_dtype=jnp.bfloat16)
    assert not norm.scale[...].any()
    norm.scale.set_value(jnp.asarray(scale, jnp.bfloat16))
    theirs = transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(64, eps=1e-6)
    theirs.weight = torch.nn.Parameter(torch.tensor(scale).bfloat16())
    expected = theirs(torch.tensor(x).bfloat16())
    found = norm(jnp.asarray(x, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.float().detach())


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, "causal-lm")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_go_to_transformers_and_back(variant):
    theirs = transformers.Gemma2Config(**{**OWN, **VARIANTS[variant]})
    config = Gemma2Config.from_hf(theirs.to_dict())
    again = transformers.Gemma2Config(**config.to_hf())
    assert again.rope_parameters == theirs.rope_parameters
    assert again.layer_types == theirs.layer_types
    assert Gemma2Config.from_hf(again.to_dict()) == config


def test_absent_fields_have_the_defaults_of_transformers():
    ours = Gemma2Config.from_hf({"model_type": "gemma2", "num_hidden_layers": 26})
    assert ours == Gemma2Config.from_hf(transformers.Gemma2Config().to_dict())


def test_known_sizes_are_those_of_the_published_models():
    published = {
        "gemma-2-2b": 2_614_341_888,
        "gemma-2-9b": 9_241_705_984,
        "gemma-2-27b": 27_227_128_320,
    }
    found = {name: parameter_count(FAMILY, config) for name, config in FAMILY.sizes.items()}
    assert found == published


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_activation", "gelu", "hidden_activation is 'gelu', only 'gelu_pytorch_tanh'"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("is_causal", False, "is_causal is False"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3, expected a divisor"),
        ("head_dim", 15, "head_dim is 15, expected an even number"),
        (
            "layer_types",
            ["full_attention"],
            "layer_types is ['full_attention'], expected a list of 3",
        ),
        ("layer_types", "full_attention", "layer_types is 'full_attention', expected a list"),
        ("layer_types", ["chunked_attention"] * 3, "layer_types has 'chunked_attention' for layer"),
        ("layer_types", [["full_attention"]] * 3, "layer_types has ['full_attention'] for layer 0"),
        ("sliding_window", 0, "sliding_window is 0, expected an integer from 1"),
        ("attn_logit_softcapping", 0.0, "attn_logit_softcapping is 0.0, expected a positive"),
        ("num_hidden_layers", 10**12, "num_hidden_layers is 1000000000000, expected an integer"),
        ("architectures", ["Gemma2ForSequenceClassification"], "Gemma2ForSequenceClassification"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        Gemma2Config.from_hf({"model_type": "gemma2", **OWN, field: value})
    assert said in str(raised.value)
