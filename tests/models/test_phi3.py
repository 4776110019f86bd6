"""Phi-3 against transformers and PEFT."""

import copy

import numpy as np
import pytest
import torch
import transformers

from loft_jax.errors import InputError
from loft_jax.hub.pretrained import load_model_config, load_pretrained
from loft_jax.models.phi3 import FAMILY, Phi3Config
from loft_jax.models.registry import family_of
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
    parameter_count,
    save_decoder,
    torch_logits,
)
from tests.models.family_checks import TOLERANCE, check_mesh, check_plan_works

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 2.0],
    "long_factor": [1.0, 4.0, 9.5],
}
# A part of 0.75 of 8 dimensions rotates.
LONG = {
    "rope_parameters": LONGROPE | {"rope_theta": 1e3, "partial_rotary_factor": 0.75},
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "no window": {"sliding_window": None, "tie_word_embeddings": True, "num_key_value_heads": 4},
    "partial rotation": {
        "rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.5},
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-3,
    },
    "longrope, long": LONG,
    "longrope, short": LONG | {"original_max_position_embeddings": 17},
}


def save_phi3(folder, **changes):
    changes = copy.deepcopy(changes)  # transformers changes what it is given
    return save_decoder(
        folder, transformers.Phi3Config(**{**SIZES, "sliding_window": 5, **changes})
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_phi3(tmp_path_factory.mktemp("phi3") / "model", **LONG)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    check_logits(save_phi3(tmp_path, **VARIANTS[variant]))


def test_padded_and_packed_texts_give_what_they_give_alone(folder):
    """Short texts and a long one, which rotate by other factors."""
    check_texts_in_rows(folder)


@pytest.mark.slow
def test_gradients_are_those_of_torch(folder):
    names = ["self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight", "input_layernorm.weight"]
    check_gradients(folder, names, layer=1)


@pytest.mark.slow
def test_continuations_beyond_the_window_are_those_of_transformers(tmp_path):
    check_greedy(save_phi3(tmp_path, **LONG | {"original_max_position_embeddings": 32}))


def test_adapters_are_those_of_peft(folder, tmp_path):
    check_adapters(folder, tmp_path)


def test_a_quantized_base_is_that_of_its_kernels(folder):
    check_quantized(folder)


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, "causal-lm")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder)


def test_sizes_are_those_of_the_published_models():
    counts = {name: parameter_count(FAMILY, config) for name, config in FAMILY.sizes.items()}
    assert counts == {"phi-3-mini-4k": 3_821_079_552, "phi-3-medium-4k": 13_960_238_080}


@pytest.mark.parametrize("changes", [{}, LONG, VARIANTS["partial rotation"]])
def test_configurations_go_to_transformers_and_back(changes):
    theirs = transformers.Phi3Config(**copy.deepcopy(SIZES | {"sliding_window": 7} | changes))
    config = Phi3Config.from_hf(theirs.to_dict())
    again = transformers.Phi3Config(**config.to_hf())
    for name in (*SIZES, "sliding_window", "original_max_position_embeddings"):
        assert getattr(again, name) == getattr(theirs, name), name
    for name, value in theirs.rope_parameters.items():
        assert again.rope_parameters[name] == value, name
    assert Phi3Config.from_hf(again.to_dict()) == config


def test_a_family_is_known_and_absent_fields_are_those_of_transformers(folder):
    family, config = load_model_config(folder)
    assert (family, config.sliding_window, config.rotary_dim) == (family_of("phi3"), 5, 6)
    shape = {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    config = Phi3Config.from_hf({"model_type": "phi3", **shape})
    assert config == Phi3Config.from_hf(transformers.Phi3Config().to_dict())


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_names_of_longrope_in_early_releases_are_read(name):
    scaling = {"type": name, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config.from_hf({"model_type": "phi3", **SIZES, "rope_scaling": scaling})
    assert config.rope_scaling.rope_type == "longrope"
    assert config.rope_scaling.original_max_position_embeddings == 4096
    written = config.to_hf()["rope_scaling"]
    assert written == {**scaling, "type": "longrope"}  # other fields are refused there


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "phimoe", "model_type is 'phimoe', expected 'phi3'"),
        ("architectures", ["Phi3ForTokenClassification"], "'Phi3ForTokenClassification'"),
        ("resid_pdrop", 0.1, "resid_pdrop is 0.1, only 0.0 is supported"),
        ("embd_pdrop", 0.1, "embd_pdrop is 0.1"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("attention_bias", True, "attention_bias is True"),
        ("is_causal", False, "is_causal is False"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("sliding_window", 0, "sliding_window is 0, expected an integer"),
        ("original_max_position_embeddings", "x", "original_max_position_embeddings is 'x'"),
        ("partial_rotary_factor", 1.5, "partial_rotary_factor is 1.5, expected a number in (0, 1]"),
        ("partial_rotary_factor", "x", "partial_rotary_factor is 'x'"),
        ("partial_rotary_factor", 0.4, "so that 3 dimensions rotate, expected an even number"),
        (
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
            "rope_type is 'linear', only 'default'",
        ),
        ("rope_scaling", {"type": "su", "factor": 2.0}, "rope_scaling.short_factor is None"),
        ("rope_scaling", {**LONGROPE}, "short_factor has 3 numbers, expected 4"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        Phi3Config.from_hf({"model_type": "phi3", **SIZES, field: value})
    assert said in str(raised.value)


def test_a_text_longer_than_the_original_context_rotates_by_the_long_factors(folder):
    theirs, model = loaded_in_torch(folder), load_pretrained(folder)
    for length in (16, 17):
        tokens = TOKENS[:1, :length]
        np.testing.assert_allclose(model(tokens), torch_logits(theirs, tokens), **TOLERANCE)
    with torch.no_grad():  # the change is one that a test can tell
        short = np.asarray(model(TOKENS[:1, :16]))
        assert np.abs(np.asarray(model(TOKENS[:1]))[:, :16] - short).max() > 0.01
