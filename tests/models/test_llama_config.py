import copy

import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.models.llama import LlamaConfig
from loft_jax.models.rope_scaling import LinearScaling, Llama3Scaling

SIZES = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

YARN = {
    "original_max_position_embeddings": 512,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.1,
    "truncate": False,
}
LONGROPE = {
    "original_max_position_embeddings": 512,
    "short_factor": [1.0, 1.0, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 4.0, 8.5],
    "factor": 4.0,
}


def test_llama_1_has_one_key_head_per_head_and_the_default_base():
    config = LlamaConfig.from_hf(SIZES | {"architectures": ["LLaMAForCausalLM"]})
    assert config.num_key_value_heads == 4
    assert config.head_dim == 8
    assert config.rope_theta == 10_000.0
    assert config.rope_scaling is None
    assert not config.tie_word_embeddings


def test_older_and_newer_rope_keys_say_the_same():
    older = LlamaConfig.from_hf(
        SIZES | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    )
    newer = LlamaConfig.from_hf(
        SIZES | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}
    )
    assert older == newer
    assert older.rope_theta == 5e5
    assert older.rope_scaling == Llama3Scaling(**LLAMA3)


def test_oldest_spelling_of_linear_scaling():
    config = LlamaConfig.from_hf(SIZES | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == LinearScaling(2.0)


def test_the_original_context_is_that_of_the_model_before_that_of_the_scaling():
    """As in transformers, whose Phi-3 has the field beside the scaling."""
    extra = {
        "original_max_position_embeddings": 256,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, **YARN},
    }
    scaling = LlamaConfig.from_hf(SIZES | extra).rope_scaling
    theirs = transformers.LlamaConfig(**copy.deepcopy(SIZES | extra))
    theirs.standardize_rope_params()
    original = theirs.rope_parameters["original_max_position_embeddings"]
    assert scaling.original_max_position_embeddings == original == 256


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        ("yarn", "factor", "x", "rope_scaling.factor is 'x'"),
        ("yarn", "factor", None, "rope_scaling.factor is None"),
        ("yarn", "original_max_position_embeddings", 0, "original_max_position_embeddings is 0"),
        ("yarn", "beta_fast", 1.0, "beta_slow is 2.0, expected at most beta_fast, 1.0"),
        ("yarn", "mscale", -1, "rope_scaling.mscale is -1"),
        ("yarn", "truncate", 1, "rope_scaling.truncate is 1, expected true or false"),
        ("yarn", "rope_theta", 1.0, "rope_type is 'yarn' and rope_theta is 1.0"),
        ("longrope", "short_factor", None, "rope_scaling.short_factor is None, expected a list"),
        ("longrope", "short_factor", 2.0, "rope_scaling.short_factor is 2.0"),
        ("longrope", "long_factor", [1.0, 2.0, "x", 3.0], "long_factor is [1.0, 2.0, 'x'"),
        ("longrope", "long_factor", [1.0, 2.0, 0.0, 3.0], "rope_scaling.long_factor is"),
        ("longrope", "long_factor", [1.0, 2.0], "long_factor has 2 numbers, expected 4"),
        ("longrope", "original_max_position_embeddings", 1, "_embeddings is 1, expected more"),
        ("longrope", "attention_factor", 0, "rope_scaling.attention_factor is 0"),
        ("llama3", "high_freq_factor", 0.5, "low_freq_factor is 1.0, expected less than high"),
        ("linear", "factor", True, "rope_scaling.factor is True"),
    ],
)
def test_a_wrong_value_of_a_scaling_is_refused_by_name(kind, field, value, said):
    fields = {"llama3": LLAMA3, "yarn": YARN, "longrope": LONGROPE}.get(kind, {})
    with pytest.raises(InputError) as raised:
        LlamaConfig.from_hf(
            SIZES | {"rope_scaling": {"rope_type": kind, "factor": 4.0, **fields, field: value}}
        )
    assert said in str(raised.value)


def test_dynamic_scaling_of_two_dimensions_is_refused():
    with pytest.raises(InputError, match="'dynamic' and 2 dimensions of a head rotate"):
        LlamaConfig.from_hf(
            SIZES | {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
        )


def test_several_ending_tokens_stay_several():
    config = LlamaConfig.from_hf(SIZES | {"eos_token_id": [7, 8]})
    assert config.eos_token_id == (7, 8)
    assert config.to_hf()["eos_token_id"] == [7, 8]


@pytest.mark.parametrize(
    "extra",
    [
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "head_dim": 16},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "eos_token_id": [1, 2]},
        {"attention_bias": True, "mlp_bias": True, "pad_token_id": 3, "bos_token_id": 5},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 512},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **YARN}},
        {"rope_scaling": {"rope_type": "longrope", **LONGROPE}},
        {"rope_scaling": {"rope_type": "longrope", "attention_factor": 1.1, **LONGROPE}},
    ],
)
def test_transformers_reads_what_we_write_as_it_read_the_original(extra):
    config = LlamaConfig.from_hf(SIZES | extra)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    theirs = transformers.LlamaConfig(**copy.deepcopy(SIZES | extra)).to_dict()
    ours = transformers.LlamaConfig(**config.to_hf()).to_dict()
    for name in [*SIZES, "num_key_value_heads", "head_dim", "rope_parameters", *extra]:
        assert ours.get(name) == theirs.get(name), name
    assert LlamaConfig.from_hf(ours) == config


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "qwen2", "model_type is 'qwen2'"),
        ("model_type", "mistral", "model_type is 'mistral'"),
        ("architectures", ["LlamaForSequenceClassification"], "'LlamaForSequenceClassification'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("pretraining_tp", 2, "pretraining_tp is 2"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("is_causal", False, "is_causal is False, only True is supported"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("rope_scaling", {"rope_type": "su", "factor": 2.0}, "rope_scaling.rope_type is 'su'"),
        ("rope_scaling", {"rope_type": "proportional"}, "rope_type is 'proportional'"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_scaling.factor is None"),
        ("rope_parameters", {"rope_type": "dynamic"}, "rope_parameters.factor is None"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3"),
        ("num_attention_heads", 5, "multiple of num_attention_heads"),
        ("hidden_size", None, "hidden_size is missing"),
        ("vocab_size", "many", "vocab_size is 'many'"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("head_dim", 7, "head_dim is 7"),
        ("architectures", [3], "architectures names 3"),
        ("rope_theta", "x", "rope_theta is 'x'"),
        ("rope_theta", -1.0, "rope_theta is -1.0"),
        ("rope_scaling", "llama3", "rope_scaling is 'llama3', expected a mapping"),
        ("rope_scaling", {"rope_type": ["llama3"]}, "rope_scaling.rope_type is"),
        ("rms_norm_eps", "x", "rms_norm_eps is 'x'"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'"),
        ("eos_token_id", "</s>", "eos_token_id is '</s>'"),
        ("eos_token_id", [1, "x"], "eos_token_id is (1, 'x')"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        LlamaConfig.from_hf(SIZES | {field: value})
    assert said in str(raised.value)
