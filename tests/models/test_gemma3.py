"""Gemma 3's text models against transformers and PEFT."""

import json

import numpy as np
import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained
from loft_jax.hub.pretrained import load_model_config
from loft_jax.models.gemma3 import FAMILY, Gemma3TextConfig
from loft_jax.models.rope_scaling import LinearScaling
from tests.models.decoder_checks import (
    SIZES,
    TOKENS,
    check_adapters,
    check_gradients,
    check_greedy,
    check_logits,
    check_texts_in_rows,
    loaded_in_torch,
    parameter_count,
    save_decoder,
    torch_logits,
)
from tests.models.family_checks import TOLERANCE, check_mesh, check_plan_works

# Rotary bases far apart, and a window that texts reach.
OWN = {
    **SIZES,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "initializer_range": 0.15,
    "rope_theta": 1e5,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e3,
}
VARIANTS = {
    "final cap, untied, biases": {
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_scaling": None,
    },
    "llama3, every other layer": {
        "layer_types": None,
        "sliding_window_pattern": 2,
        "num_key_value_heads": 1,
        "sliding_window": 1,
        "rope_scaling": None,
        "rope_parameters": {"full_attention": LLAMA3, "sliding_attention": {"rope_theta": 20.0}},
    },
}


def their_config(**changes):
    return transformers.Gemma3TextConfig(**{**OWN, **changes})


def save_gemma3(folder, **changes):
    return save_decoder(folder, their_config(**changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_gemma3(tmp_path_factory.mktemp("gemma3") / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    check_logits(save_gemma3(tmp_path, **VARIANTS[variant]))


def test_padded_and_packed_texts_give_what_they_give_alone(folder):
    check_texts_in_rows(folder)


def test_gradients_are_those_of_torch(folder):
    names = ("self_attn.k_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight")
    check_gradients(folder, names, layer=1)


def test_continuations_beyond_the_window_are_those_of_transformers(folder):
    check_greedy(folder)


def test_adapters_go_to_peft_and_come_from_it(folder, tmp_path):
    check_adapters(folder, tmp_path)


def test_the_text_model_of_a_model_of_images_is_read(folder, tmp_path):
    """As `AutoModel.from_pretrained(...).language_model.save_pretrained(...)` writes it."""
    theirs = loaded_in_torch(folder)
    theirs.model.save_pretrained(tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"] == [
        "Gemma3TextModel"
    ]
    found = load_pretrained(tmp_path / "text")(TOKENS)
    np.testing.assert_allclose(found, torch_logits(theirs), **TOLERANCE)


def test_a_model_of_images_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    with pytest.raises(InputError, match=r"model_type is 'gemma3', only .* 'gemma3_text'"):
        load_model_config(tmp_path)


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, "causal-lm")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_go_to_transformers_and_back(variant):
    theirs = their_config(**VARIANTS[variant])
    config = Gemma3TextConfig.from_hf(theirs.to_dict())
    again = transformers.Gemma3TextConfig(**config.to_hf())
    assert again.rope_parameters == theirs.rope_parameters
    assert Gemma3TextConfig.from_hf(again.to_dict()) == config


def test_absent_fields_have_the_defaults_of_transformers():
    ours = Gemma3TextConfig.from_hf({"model_type": "gemma3_text", "num_hidden_layers": 26})
    assert ours == Gemma3TextConfig.from_hf(transformers.Gemma3TextConfig().to_dict())


def test_known_sizes_are_those_of_the_published_models():
    """From 4b on, without the part for images, and with its rows for 64 further tokens."""
    published = {
        "gemma-3-270m": 268_098_176,
        "gemma-3-1b": 999_885_952,
        "gemma-3-4b": 3_880_263_168,
        "gemma-3-12b": 11_766_034_176,
        "gemma-3-27b": 27_009_346_304,
    }
    found = {name: parameter_count(FAMILY, config) for name, config in FAMILY.sizes.items()}
    assert found == published


def test_older_keys_are_read():
    """As in the config.json that was published with gemma-3-1b."""
    published = {
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    }
    config = Gemma3TextConfig.from_hf(published)
    assert config == Gemma3TextConfig.from_hf(transformers.Gemma3TextConfig(**published).to_dict())
    assert config.kinds.count(0) == 4
    assert config.eos_token_id == (1, 106)
    known = FAMILY.sizes["gemma-3-1b"]
    assert (known.kinds, known.rope_theta) == (config.kinds, config.rope_theta)
    assert FAMILY.sizes["gemma-3-4b"].rope_scaling == LinearScaling(8.0)


def test_a_pattern_of_windows_is_checked_where_it_is_used():
    config = {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 0}
    with pytest.raises(InputError, match="sliding_window_pattern is 0, expected an integer of 1"):
        Gemma3TextConfig.from_hf(config)
    types = ["full_attention"] * 3
    assert Gemma3TextConfig.from_hf({**config, "layer_types": types}).kinds == [0, 0, 0]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0, only None is supported"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("is_causal", False, "is_causal is False"),
        ("rope_local_base_freq", -1.0, "rope_local_base_freq is -1.0, expected a positive number"),
        ("rope_scaling", {"rope_type": "mystery"}, "rope_scaling.rope_type is 'mystery'"),
        ("rope_parameters", {"rope_type": "linear"}, "expected an object for each of 'full_atten"),
        ("rope_parameters", {"full_attention": "linear"}, "expected an object for each of 'full_a"),
        (
            "rope_parameters",
            {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            "rope_parameters.sliding_attention is",
        ),
        ("rope_parameters", {"full_attention": LLAMA3}, "rope_scaling and rope_parameters differ"),
        ("architectures", ["Gemma3ForConditionalGeneration"], "Gemma3ForConditionalGeneration"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        Gemma3TextConfig.from_hf({"model_type": "gemma3_text", **OWN, field: value})
    assert said in str(raised.value)
