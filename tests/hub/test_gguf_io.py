import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from loft_jax.errors import InputError
from loft_jax.hub.gguf_io import GGUF, open_gguf
from loft_jax.hub.pretrained import load_pretrained, save_pretrained
from loft_jax.models.rope_scaling import LinearScaling, Llama3Scaling
from tests.models.decoder_checks import SIZES, save_decoder
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


def write_gguf(
    path,
    folder,
    *,
    architecture="llama",
    strings=None,
    numbers=None,
    quantized=(),
    theta=1e5,
    rope_freqs=None,
):
    """Writes a Hugging Face model as llama.cpp's converter does, q and k of a Llama permuted."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (numbers or {})).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for key, value in (strings or {}).items():
        writer.add_string(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", theta)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], 2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name and architecture == "llama":
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


QWEN2 = {**SIZES, "intermediate_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e5}
OTHERS = {
    "qwen2": (transformers.Qwen2Config(**QWEN2), {}),
    "qwen3": (
        transformers.Qwen3Config(**QWEN2, head_dim=16, tie_word_embeddings=True),
        {f"attention.{name}": 16 for name in ("key_length", "value_length")}
        | {"rope.dimension_count": 16},
    ),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_give_the_model_they_were_made_from(tmp_path, architecture):
    config, numbers = OTHERS[architecture]
    folder = save_decoder(tmp_path / "model", config)
    path = write_gguf(tmp_path / "x.gguf", folder, architecture=architecture, numbers=numbers)
    ours, original = load_pretrained(path), load_pretrained(folder)
    for name in ("rms_norm_eps", "rope_theta", "vocab_size", "tie_word_embeddings", "head_dim"):
        assert getattr(ours.config, name) == getattr(original.config, name), name
    assert type(ours) is type(original)
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


def write_matrices(path, *matrices):
    """A file of matrices `(blocks as bytes, kind)` and what a configuration needs."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in FIELDS.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((400, 32), np.float32))
    for number, (stored, kind) in enumerate(matrices):
        writer.add_tensor(f"blk.{number}.ffn_up.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = [gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, *gguf.quants._type_traits]


@pytest.mark.filterwarnings("ignore:invalid value")  # random blocks may have a scale of inf
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_that_gguf_dequantizes_is_read(tmp_path, kind):
    """A matrix, and a region of it, as gguf gives them."""
    rng = np.random.default_rng(0)
    try:
        stored = gguf.quants.quantize(rng.normal(size=(5, 512)).astype(np.float32), kind)
    except NotImplementedError:  # gguf only reads it: blocks of any bytes are valid
        size = gguf.quants.quant_shape_to_byte_shape((5, 512), kind)
        stored = rng.integers(0, 256, size, np.uint8)
    file = GGUF(write_matrices(tmp_path / "x.gguf", (stored, kind)))
    name = "model.layers.0.mlp.up_proj.weight"
    assert file.shapes[name] == (5, 512)
    expected = gguf.quants.dequantize(stored, kind)
    np.testing.assert_array_equal(file.read(name), expected)
    region = (slice(1, 4), slice(3, 400))
    np.testing.assert_array_equal(file.read(name, region), expected[region])


def test_a_kind_that_gguf_does_not_dequantize_is_refused_by_name(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_K
    stored = np.zeros(gguf.quants.quant_shape_to_byte_shape((5, 512), kind), np.uint8)
    fine = (np.zeros((5, 512), np.float32), gguf.GGMLQuantizationType.F32)
    path = write_matrices(tmp_path / "x.gguf", fine, (stored, kind))
    with pytest.raises(InputError, match=r"x\.gguf: tensor 'blk\.1\.ffn_up\.weight' .* as Q8_K"):
        GGUF(path)


def converted_llama3(theta, factor):
    """Divisors of 4 frequencies, as llama.cpp's converter computes them."""
    frequencies = 1.0 / theta ** (np.arange(0, 8, 2) / 8)
    divisors = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        blended = 1 / ((1 - smooth) / factor + smooth)
        low, high = wavelength > 8192, wavelength < 8192 / 4
        divisors.append(1.0 if high else factor if low else blended)
    return divisors


def test_llama3_scaling_is_that_of_the_model_it_was_made_from(tmp_path):
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    folder = save_tiny_llama(
        tmp_path / "llama",
        rms_norm_eps=1e-5,
        intermediate_size=64,
        rope_parameters={"rope_theta": 5e5, "rope_type": "llama3", **scaling},
    )
    divisors = converted_llama3(5e5, 32.0)
    assert len({*divisors}) == 3  # kept, blended and divided
    path = write_gguf(tmp_path / "x.gguf", folder, theta=5e5, rope_freqs=divisors)
    model = load_pretrained(path)
    assert model.config.rope_scaling == Llama3Scaling(**scaling)
    tokens = np.arange(40)[None]
    np.testing.assert_array_equal(model(tokens), load_pretrained(folder)(tokens))


def test_other_divisors_of_frequencies_are_used_and_saved(tmp_path, folder):
    divisors = np.array([1.0, 1.3, 4.7, 8.0], np.float32)
    model = load_pretrained(write_gguf(tmp_path / "x.gguf", folder, rope_freqs=divisors))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.model.rotary_emb.inv_freq /= torch.tensor(divisors)
    save_pretrained(tmp_path / "saved", model)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = np.arange(60)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        again = saved(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(again, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_factor_alone_is_that_of_linear_scaling(tmp_path, folder, key):
    """As in llama.cpp, for files older than the kinds of scaling."""
    path = write_gguf(tmp_path / "x.gguf", folder, numbers={key: 4})
    assert GGUF(path).config.rope_scaling == LinearScaling(4.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "stablelm"}, "architecture is 'stablelm'"),
        ({"numbers": {"expert_count": 8}}, "llama.expert_count is 8"),
        ({"numbers": {"attention.causal": 0}}, "llama.attention.causal is 0, only true"),
        ({"numbers": {"rope.dimension_count": 4}}, "llama.rope.dimension_count is 4"),
        ({"strings": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
        ({"strings": {"rope.scaling.type": "linear"}}, "llama.rope.scaling.factor' is missing"),
        ({"rope_freqs": [1.0, 2.0]}, "'rope_freqs.weight' of shape (2,) is [1.0, 2.0], expected 4"),
        ({"rope_freqs": [1.0, 2.0, 0.0, 4.0]}, "'rope_freqs.weight' of shape (4,) is [1.0, 2.0, 0"),
        (
            {"rope_freqs": [1.0] * 4, "strings": {"rope.scaling.type": "linear"}},
            "llama.rope.scaling is 'linear' beside the tensor 'rope_freqs.weight'",
        ),
        ({"numbers": {"attention.head_count_kv": 3}}, "num_key_value_heads is 3"),
        ({"numbers": {"attention.head_count": 0}}, "llama.attention.head_count is 0, expected"),
        ({"numbers": {"rope.scaling.attn_factor": 2}}, "llama.rope.scaling.attn_factor is 2, only"),
        (
            {"rope_freqs": [1.0] * 4, "numbers": {"rope.scale_linear": 4}},
            "llama.rope.scaling is 'linear' beside the tensor 'rope_freqs.weight'",
        ),
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
