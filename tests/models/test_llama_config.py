import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.models.llama import LlamaConfig
from loft_jax.models.rope import RopeScaling

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
    assert older.rope_scaling == RopeScaling("llama3", **LLAMA3)


def test_oldest_spelling_of_linear_scaling():
    config = LlamaConfig.from_hf(SIZES | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == RopeScaling("linear", 2.0)


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
    ],
)
def test_transformers_reads_what_we_write_as_it_read_the_original(extra):
    config = LlamaConfig.from_hf(SIZES | extra)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    theirs = transformers.LlamaConfig(**SIZES | extra).to_dict()
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
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_scaling.rope_type is 'yarn'"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_scaling.factor is None"),
        ("rope_parameters", {"rope_type": "dynamic"}, "rope_parameters.rope_type is 'dynamic'"),
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
