import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loft_jax.errors import InputError
from loft_jax.hub.gguf_io import GGUF, open_gguf
from loft_jax.hub.pretrained import load_pretrained
from tests.tiny import save_tiny_llama

FIELDS = {
    "block_count": 2,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "context_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 8,
}


def write_gguf(path, folder, *, architecture="llama", strings=None, numbers=None, quantized=()):
    """Writes a Hugging Face Llama as llama.cpp's converter does, q and k permuted."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (numbers or {})).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in (strings or {}).items():
        writer.add_string(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        array = tensor.float().numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                halves = array.reshape(heads, 2, len(array) // heads // 2, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.F32
        if any(part in name for part in quantized):
            kind = gguf.GGMLQuantizationType.Q8_0
            array = gguf.quants.quantize(array, kind)
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(short, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(
        tmp_path_factory.mktemp("gguf") / "llama",
        intermediate_size=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 1e5, "rope_type": "default"},
    )


def test_gives_the_model_it_was_made_from(tmp_path, folder):
    path = write_gguf(tmp_path / "x.gguf", folder)
    ours, original = load_pretrained(path), load_pretrained(folder)
    for name in ("rms_norm_eps", "rope_theta", "vocab_size", "tie_word_embeddings", "head_dim"):
        assert getattr(ours.config, name) == getattr(original.config, name), name
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(ours(tokens), original(tokens))


def test_dequantizes(tmp_path, folder):
    path = write_gguf(tmp_path / "x.gguf", folder, quantized=("up_proj", "q_proj"))
    file = GGUF(path)
    exact = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for part, bound in (("self_attn.q_proj", 0.01), ("self_attn.v_proj", 0.0)):
        name = f"model.layers.1.{part}.weight"
        error = np.abs(file.read(name) - exact[name].numpy()).max()
        assert error <= bound
        assert (error > 0) == (bound > 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"numbers": {"expert_count": 8}}, "llama.expert_count is 8"),
        ({"numbers": {"rope.dimension_count": 4}}, "llama.rope.dimension_count is 4"),
        ({"strings": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
        ({"strings": {"rope.scaling.type": "linear"}}, "llama.rope.scaling.factor' is missing"),
        ({"numbers": {"attention.head_count_kv": 3}}, "num_key_value_heads is 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, folder, change, said):
    path = write_gguf(tmp_path / "x.gguf", folder, **change)
    with pytest.raises(InputError) as raised:
        GGUF(path)
    assert said in str(raised.value)


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, -8])
def test_a_damaged_file_is_named(tmp_path, folder, kept):
    path = write_gguf(tmp_path / "x.gguf", folder)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"x\.gguf"):
        load_pretrained(path)


def test_a_file_is_opened_again_only_when_it_changed(tmp_path, folder):
    path = write_gguf(tmp_path / "x.gguf", folder)
    first = open_gguf(path)
    assert open_gguf(path) is first
    write_gguf(path, folder, numbers={"context_length": 512})
    assert open_gguf(path).config.max_position_embeddings == 512


@pytest.mark.slow
def test_smollm2_gives_the_logits_of_transformers(smollm2):
    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(0, 49152, (2, 64))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = load_pretrained(smollm2)(tokens)
    # Logits reach 40; each side is within 1.2e-4 of a float64 run.
    np.testing.assert_allclose(logits, expected, atol=3e-4, rtol=0)
    assert np.abs(expected).max() > 20
