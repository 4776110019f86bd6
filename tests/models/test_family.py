import pytest
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    mlp_bias=True,
)
TABLE = Llama.parameter_table(CONFIG)
SIZES = {
    "layers": 2,
    "vocab": 64,
    "embed": 32,
    "norm": 32,
    "mlp": 48,
    "heads": 32,
    "kv_heads": 16,
}


def abstract():
    return nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))


def parameters(model):
    return {
        ".".join(map(str, path)): value
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def test_every_parameter_has_the_axes_of_its_shape():
    for path, parameter in parameters(abstract()).items():
        assert tuple(SIZES[name] for name in TABLE.logical_axes(path)) == parameter.shape, path


def test_factors_share_the_axes_of_their_weight():
    assert TABLE.logical_axes("layers.mlp.down_proj.lora_a") == ("layers", "mlp", None)
    assert TABLE.logical_axes("layers.mlp.down_proj.lora_b") == ("layers", None, "embed")
    assert TABLE.logical_axes("embed_tokens.lora_a") == ("vocab", None)
    assert TABLE.logical_axes("lm_head.lora_b") == (None, "vocab")
    assert TABLE.logical_axes("layers.self_attn.k_proj.bias") == ("layers", "kv_heads")


def test_names_are_those_of_transformers():
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in LlamaForCausalLM(TheirConfig(**CONFIG.to_hf())).state_dict().items()
    }
    ours = {}
    for path, parameter in parameters(abstract()).items():
        ours |= TABLE.names(path, parameter.shape)
    assert ours == theirs


def test_model_gives_the_name_of_a_module():
    model = abstract()
    assert model.hf_name("layers.self_attn.q_proj", 3) == "model.layers.3.self_attn.q_proj"
    assert model.hf_name("embed_tokens", None) == "model.embed_tokens"
    assert model.hf_name("lm_head", None) == "lm_head"


@pytest.mark.parametrize(
    "call",
    [
        lambda: TABLE.logical_axes("layers.self_attn.qkv.kernel"),
        lambda: TABLE.logical_axes("layers.self_attn.q_proj.lora_c"),
        lambda: TABLE.module_name("layers.self_attn.q_proj", None),
        lambda: TABLE.module_name("norm", 0),
        lambda: TABLE.module_name("head", None),
        lambda: TABLE.names("lm_head.lora_a", (32, 4)),
    ],
)
def test_unknown_paths_are_refused(call):
    with pytest.raises(InputError, match=r"layers\.self_attn|norm|head"):
        call()
