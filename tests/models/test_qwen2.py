"""Qwen2 against transformers and PEFT."""

import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.hub.pretrained import load_model_config
from loft_jax.models.qwen2 import FAMILY, Qwen2Config
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

WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
FULL, SLIDING = "full_attention", "sliding_attention"
VARIANTS = {
    "no window": {"use_sliding_window": False, "tie_word_embeddings": True},
    "window in all layers": {"max_window_layers": 0, "num_key_value_heads": 1},
    "window in every other layer": {
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, FULL, SLIDING],
        "rms_norm_eps": 1e-3,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e3,
        },
    },
}


def save_qwen2(folder, **changes):
    return save_decoder(folder, transformers.Qwen2Config(**{**SIZES, **WINDOW, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Its first layer sees everything, its second one has a window."""
    return save_qwen2(tmp_path_factory.mktemp("qwen2") / "model")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    check_logits(save_qwen2(tmp_path, **VARIANTS[variant]))


def test_padded_and_packed_texts_give_what_they_give_alone(folder):
    check_texts_in_rows(folder)


@pytest.mark.slow
def test_gradients_are_those_of_torch(folder):
    check_gradients(folder, ["self_attn.k_proj.weight", "self_attn.q_proj.bias"], layer=1)


@pytest.mark.slow
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
    ("changes", "types"),
    [
        ({}, None),
        (WINDOW, (FULL, SLIDING, SLIDING)),
        (WINDOW | {"layer_types": [SLIDING, FULL, FULL]}, (SLIDING, FULL, FULL)),
        (WINDOW | {"max_window_layers": 3}, None),
        (WINDOW | {"sliding_window": None}, None),
        ({"sliding_window": 5, "max_window_layers": 0}, None),
    ],
)
def test_configurations_go_to_transformers_and_back(changes, types):
    config = Qwen2Config.from_hf(
        {"model_type": "qwen2", **SIZES, "num_hidden_layers": 3, "rope_theta": 1e6, **changes}
    )
    assert config.layer_types == types
    assert config.sliding_window == (None if types is None else 5)
    theirs = transformers.Qwen2Config(**config.to_hf())
    assert tuple(theirs.layer_types) == (types or (FULL,) * 3)
    assert Qwen2Config.from_hf(theirs.to_dict()) == config
    if types == (FULL, SLIDING, SLIDING):  # as releases read it that do not know layer_types
        older = {k: v for k, v in config.to_hf().items() if k != "layer_types"}
        assert tuple(transformers.Qwen2Config(**older).layer_types) == types


def test_absent_fields_have_the_defaults_of_transformers():
    least = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 48}
    least |= {"num_hidden_layers": 30, "num_attention_heads": 32, "use_sliding_window": True}
    config = Qwen2Config.from_hf({"model_type": "qwen2", **least})
    assert config == Qwen2Config.from_hf(transformers.Qwen2Config(**least).to_dict())
    assert config.sliding_window == 4096
    assert config.layer_types == (FULL,) * 28 + (SLIDING,) * 2


def test_known_sizes_are_those_of_the_published_models(folder):
    assert load_model_config(folder)[0] is FAMILY
    published = {
        "0.5b": 494_032_768,
        "1.5b": 1_543_714_304,
        "3b": 3_085_938_688,
        "7b": 7_615_616_512,
        "14b": 14_770_033_664,
        "32b": 32_763_876_352,
        "72b": 72_706_203_648,
    }
    for name, config in FAMILY.sizes.items():
        assert parameter_count(FAMILY, config) == published[name.split("-")[1]], name


def test_a_mixture_of_experts_is_refused_by_name():
    with pytest.raises(InputError, match=r"model_type is 'qwen2_moe', a mixture of experts"):
        family_of("qwen2_moe")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes', expected true or false"),
        ({"sliding_window": 0}, "sliding_window is 0, expected an integer from 1"),
        ({"max_window_layers": -1}, "max_window_layers is -1, expected an integer of 0 or more"),
        ({"layer_types": [FULL]}, "layer_types is ['full_attention'], expected a list of 2"),
        ({"layer_types": FULL}, "layer_types is 'full_attention', expected a list of 2"),
        (
            {"layer_types": [FULL, "chunked_attention"]},
            "layer_types has 'chunked_attention' for layer 1, only 'full_attention' and",
        ),
        (
            {"layer_types": [FULL, SLIDING], "use_sliding_window": False},
            "layer_types has 'sliding_attention', expected use_sliding_window and sliding_window",
        ),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers is 1000000000000000"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassif"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, said):
    with pytest.raises(InputError) as raised:
        Qwen2Config.from_hf({"model_type": "qwen2", **SIZES, **WINDOW, **changes})
    assert said in str(raised.value)


def test_a_window_is_in_both_fields_or_in_neither():
    sizes = Qwen2Config.from_hf({"model_type": "qwen2", **SIZES}).to_hf()
    fields = {k: v for k, v in sizes.items() if k in SIZES or k == "head_dim"}
    with pytest.raises(InputError, match="sliding_window is 4 and layer_types is None, expected"):
        Qwen2Config(**fields, sliding_window=4)
