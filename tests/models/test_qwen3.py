"""Qwen3 against transformers and PEFT."""

import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.hub.pretrained import load_model_config
from loft_jax.models.qwen3 import FAMILY, Qwen3Config
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

HEAD_DIM = {"head_dim": 16}  # twice hidden_size / num_attention_heads
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
FULL, SLIDING = "full_attention", "sliding_attention"
VARIANTS = {
    "no window": {"use_sliding_window": False, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "max_window_layers": 0, "rms_norm_eps": 1e-2},
    "head of half the size": {
        "head_dim": 4,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3},
    },
}


def save_qwen3(folder, **changes):
    sizes = {**SIZES, **HEAD_DIM, **WINDOW, "layer_types": None, **changes}
    return save_decoder(folder, transformers.Qwen3Config(**sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its first layer has a window, its second one sees everything."""
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    return save_qwen3(folder, layer_types=[SLIDING, FULL])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    check_logits(save_qwen3(tmp_path, **VARIANTS[variant]))


def test_padded_and_packed_texts_give_what_they_give_alone(folder):
    check_texts_in_rows(folder)


@pytest.mark.slow
def test_gradients_are_those_of_torch(folder):
    names = ["self_attn.q_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    check_gradients(folder, names, layer=0)


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "head_dim": 64},
        WINDOW | {"max_window_layers": 1},
        WINDOW | {"layer_types": [SLIDING, FULL]},
    ],
)
def test_configurations_go_to_transformers_and_back(changes):
    config = Qwen3Config.from_hf({"model_type": "qwen3", **SIZES, "rope_theta": 1e6, **changes})
    theirs = transformers.Qwen3Config(**config.to_hf())
    for name, value in ({**SIZES, "head_dim": 128} | changes).items():
        assert getattr(theirs, name) == value
    assert Qwen3Config.from_hf(theirs.to_dict()) == config


def test_absent_fields_have_the_defaults_of_transformers():
    least = {k: SIZES[k] for k in list(SIZES)[:4]} | {"num_attention_heads": 32}
    config = Qwen3Config.from_hf({"model_type": "qwen3", **least})
    assert config == Qwen3Config.from_hf(transformers.Qwen3Config(**least).to_dict())
    assert (config.head_dim, config.num_key_value_heads, config.layer_types) == (128, 32, None)


def test_known_sizes_are_those_of_the_published_models(folder):
    assert load_model_config(folder)[0] is FAMILY
    published = {
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "qwen3-32b": 32_762_123_264,
    }
    found = {name: parameter_count(FAMILY, config) for name, config in FAMILY.sizes.items()}
    assert found == published


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(InputError, match=r"model_type is 'qwen3_moe', a mixture of experts"):
        family_of("qwen3_moe")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": "no"}, "attention_bias is 'no', expected true or false"),
        ({"head_dim": 7}, "head_dim is 7, expected an even number"),
        ({"layer_types": [FULL, "linear_attention"]}, "layer_types has 'linear_attention'"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, said):
    sizes = {**SIZES, **WINDOW, "max_window_layers": 0}
    with pytest.raises(InputError) as raised:
        Qwen3Config.from_hf({"model_type": "qwen3", **sizes, **changes})
    assert said in str(raised.value)
