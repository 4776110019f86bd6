"""Mistral against transformers and PEFT."""

import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.hub.pretrained import load_model_config
from loft_jax.models.mistral import FAMILY, MistralConfig
from loft_jax.models.registry import family_of
from tests.models.decoder_checks import (
    SIZES,
    check_adapters,
    check_gradients,
    check_greedy,
    check_logits,
    check_quantized,
    check_texts_in_rows,
    parameter_count,
    save_decoder,
)
from tests.models.family_checks import check_mesh, check_plan_works

VARIANTS = {
    "no window": {"sliding_window": None, "tie_word_embeddings": True},
    "window of one": {"sliding_window": 1, "head_dim": 16, "num_hidden_layers": 3},
    "window longer than the text": {"sliding_window": 18, "num_key_value_heads": 4},
    "scaled rotation": {
        "sliding_window": 16,
        "rms_norm_eps": 1e-3,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
    },
}


def save_mistral(folder, **changes):
    return save_decoder(
        folder, transformers.MistralConfig(**{**SIZES, "sliding_window": 5, **changes})
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("mistral") / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    check_logits(save_mistral(tmp_path, **VARIANTS[variant]))


def test_padded_and_packed_texts_give_what_they_give_alone(folder):
    check_texts_in_rows(folder)


@pytest.mark.slow
def test_gradients_are_those_of_torch(folder):
    check_gradients(folder, ["self_attn.q_proj.weight", "input_layernorm.weight"], layer=1)


def test_continuations_beyond_the_window_are_those_of_transformers(folder):
    check_greedy(folder)


@pytest.mark.slow
def test_adapters_go_to_peft_and_come_from_it(folder, tmp_path):
    check_adapters(folder, tmp_path)


@pytest.mark.slow
def test_a_quantized_model_is_that_of_its_dequantized_kernels(folder):
    check_quantized(folder)


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, "causal-lm")


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder)


@pytest.mark.parametrize("window", [None, 7])
def test_configurations_go_to_transformers_and_back(window):
    config = MistralConfig.from_hf(
        {"model_type": "mistral", **SIZES, "sliding_window": window, "rope_theta": 1e6}
    )
    theirs = transformers.MistralConfig(**config.to_hf())
    assert theirs.sliding_window == window
    assert MistralConfig.from_hf(theirs.to_dict()) == config


def test_absent_fields_have_the_defaults_of_transformers():
    least = {k: SIZES[k] for k in list(SIZES)[:4]} | {"num_attention_heads": 16}
    theirs = transformers.MistralConfig(**least).to_dict()
    config = MistralConfig.from_hf({"model_type": "mistral", **least})
    assert config == MistralConfig.from_hf(theirs)
    assert config.sliding_window == 4096


def test_known_sizes_are_those_of_the_published_models(folder):
    assert load_model_config(folder)[0] is FAMILY
    published = {"mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552}
    found = {name: parameter_count(FAMILY, config) for name, config in FAMILY.sizes.items()}
    assert found == published


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(InputError, match=r"model_type is 'mixtral', a mixture of experts, which"):
        family_of("mixtral")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("sliding_window", 0, "sliding_window is 0, expected an integer from 1"),
        ("sliding_window", True, "sliding_window is True, expected an integer from 1"),
        ("layer_types", ["full_attention"] * 2, "layer_types is ['full_attention'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("architectures", ["MistralForSequenceClassification"], "MistralForSequenceClassif"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3"),
        ("model_type", "ministral", "model_type is 'ministral', expected 'mistral'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        MistralConfig.from_hf({"model_type": "mistral", **SIZES, field: value})
    assert said in str(raised.value)
