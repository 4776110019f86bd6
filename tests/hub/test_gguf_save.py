"""GGUF files that are written: read back, and read by transformers."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loft_jax import LoRAConfig, add_lora, save_peft_adapter
from loft_jax.cli import main
from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained, load_tokenizer
from loft_jax.hub.gguf_save import save_gguf
from loft_jax.models.mistral import Mistral, MistralConfig
from loft_jax.models.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)
from tests.models.decoder_checks import SIZES, TOKENS, save_decoder, torch_logits
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer

BLOCKS = {**SIZES, "intermediate_size": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e5}
CONFIGS = {
    "llama": transformers.LlamaConfig(**BLOCKS),
    "qwen2": transformers.Qwen2Config(**BLOCKS, tie_word_embeddings=True),
    # 128: transformers does not read the size of a head of this architecture
    "qwen3": transformers.Qwen3Config(**BLOCKS, head_dim=128),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        save_decoder(folder / name, config)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def llama(folders):
    return load_pretrained(folders / "llama")


def in_transformers(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_is_read_back_and_read_by_transformers(folders, tmp_path, architecture):
    model, path = load_pretrained(folders / architecture), tmp_path / "x.gguf"
    save_gguf(path, model, tiny_tokenizer(), kind="f32", name="tiny")
    again = load_pretrained(path)
    assert type(again) is type(model)
    logits = model(TOKENS)
    np.testing.assert_array_equal(again(TOKENS), logits)
    expected = torch_logits(AutoModelForCausalLM.from_pretrained(folders / architecture))
    found = torch_logits(in_transformers(path))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    fields = gguf.GGUFReader(path).fields
    assert fields["general.name"].contents() == "tiny"
    assert fields["general.file_type"].contents() == 0
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


@pytest.mark.parametrize(
    ("kind", "rounding"),
    [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.5 / 127 + 2**-11)],  # its scale is float16
)
def test_matrices_are_rounded_once_to_their_kind(folders, llama, tmp_path, kind, rounding):
    path = tmp_path / "x.gguf"
    save_gguf(path, llama, tiny_tokenizer(), kind=kind)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["output_norm.weight"] == "F32"
    assert set(kinds.values()) == {"F32", kind.upper()}
    theirs = in_transformers(path)
    weights = load_file(folders / "llama" / "model.safetensors")
    for name, stored in theirs.state_dict().items():
        exact = weights[name]
        scale = np.abs(exact) if kind != "q8_0" else np.abs(exact).max(-1, keepdims=True)
        assert np.all(np.abs(stored.numpy() - exact) <= rounding * scale + 1e-7), name
    logits = torch_logits(theirs)
    np.testing.assert_allclose(load_pretrained(path)(TOKENS), logits, atol=2e-4, rtol=1e-4)


def test_rows_of_no_whole_blocks_are_float16(tmp_path):
    folder = save_decoder(tmp_path / "model", transformers.LlamaConfig(**SIZES))
    save_gguf(tmp_path / "x.gguf", load_pretrained(folder), tiny_tokenizer(), kind="q8_0")
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors["blk.0.ffn_down.weight"] == "F16"  # 48 features
    assert tensors["blk.0.ffn_up.weight"] == "Q8_0"


def test_the_tokenizer_is_the_same_and_that_of_transformers(llama, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    save_gguf(tmp_path / "x.gguf", wider(llama, 405), tokenizer)
    ours = load_tokenizer(tmp_path / "x.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
    for text in ("it's a joy,  in 1984\n\n", "<|start|>user\nété 🙂<|end|>", "a<tool>b"):
        expected = tokenizer(text)["input_ids"]
        assert ours(text)["input_ids"] == expected
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected[1:]
    for name in ("bos_token", "eos_token", "pad_token", "chat_template"):
        assert getattr(ours, name) == getattr(tokenizer, name)
    assert ours.decode(ours("a<|end|>")["input_ids"], skip_special_tokens=True) == "a"
    types = gguf.GGUFReader(tmp_path / "x.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert types[3:6] == [3, 3, 1]
    assert types[400:] == [4, 5, 5, 5, 5]


def wider(model, vocab_size):
    """The model with more tokens than it has, whose weights are zero."""
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, vocab_size=vocab_size)
    table, head = model.embed_tokens.embedding, model.lm_head.kernel
    table.set_value(np.zeros((vocab_size, 32), np.float32))
    head.set_value(np.zeros((32, vocab_size), np.float32))
    return model


LLAMA_3 = Llama3Scaling(32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(2.0),
        LLAMA_3,
        LongRopeScaling((1.0, 1.3, 4.7, 8.0), (1.0, 1.3, 4.7, 8.0), 256, 256, None, 1.0),
    ],
    ids=lambda scaling: scaling.rope_type,
)
def test_scalings_of_rotations_are_read_back(llama, tmp_path, scaling):
    model = with_config(llama, rope_scaling=scaling)
    save_gguf(tmp_path / "x.gguf", model, tiny_tokenizer(), kind="f32")
    assert load_pretrained(tmp_path / "x.gguf").config.rope_scaling == scaling


def with_config(model, **changes):
    model = nnx.clone(model)
    model.config = dataclasses.replace(model.config, **changes)
    return model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": YarnScaling(4.0, 64)}, "config: rope_scaling is YarnScaling("),
        ({"rope_scaling": dataclasses.replace(LLAMA_3, low_freq_factor=2.0)}, "rope_scaling is Ll"),
    ],
)
def test_settings_that_a_file_cannot_hold_are_refused_by_name(llama, tmp_path, changes, said):
    with pytest.raises(InputError) as raised:
        save_gguf(tmp_path / "x.gguf", with_config(llama, **changes), tiny_tokenizer())
    assert said in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_window_and_other_families_are_refused_by_name(folders, tmp_path):
    model = with_config(
        load_pretrained(folders / "qwen2"),
        sliding_window=4,
        layer_types=("full_attention", "sliding_attention"),
    )
    with pytest.raises(InputError, match="config: sliding_window is 4, which GGUF files of the ar"):
        save_gguf(tmp_path / "x.gguf", model, tiny_tokenizer())
    config = MistralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    other = nnx.eval_shape(lambda: Mistral(config, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="model_type 'mistral' is not supported in GGUF files"):
        save_gguf(tmp_path / "x.gguf", other, tiny_tokenizer())


def test_what_cannot_be_written_is_refused(llama, tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(InputError, match=r"the tokenizer is BPE with the steps .'Metaspace'."):
        save_gguf(path, llama, tiny_sentencepiece_tokenizer())
    more = tiny_tokenizer()
    more.add_tokens(["<tool>"])
    with pytest.raises(InputError, match="has a token 400, and the weights have 400 rows"):
        save_gguf(path, llama, more)
    large = nnx.clone(llama)
    large.lm_head.kernel[...] *= 1e6
    with pytest.raises(InputError, match=r"tensor 'lm_head.weight' has .*too large for float16"):
        save_gguf(path, large, tiny_tokenizer())
    adapted = add_lora(nnx.clone(llama), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="still has LoRA factors; merge them before saving"):
        save_gguf(path, adapted, tiny_tokenizer())
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already; expected the name of a new file"):
        save_gguf(path, llama, tiny_tokenizer())
    assert path.read_bytes() == b"mine"


@pytest.fixture
def adapter(folders, llama, tmp_path):
    model = add_lora(nnx.clone(llama), LoRAConfig(rank=2), rngs=nnx.Rngs(0))
    for _, layer in nnx.iter_modules(model):
        if hasattr(layer, "lora_b"):
            layer.lora_b[...] += 0.1
    save_peft_adapter(tmp_path / "adapter", model, base_model=str(folders / "llama"))
    return model


def test_the_command_merges_an_adapter_into_a_file(adapter, tmp_path, capsys):
    merge = ["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "x.gguf")]
    assert main([*merge, "--gguf", "f32", "--dtype", "float32"]) == 2
    assert "dtype is 'float32' beside gguf f32" in capsys.readouterr().err
    assert main([*merge, "--gguf", "f32"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x.gguf'}\n"
    found = torch_logits(in_transformers(tmp_path / "x.gguf"))
    np.testing.assert_allclose(found, adapter(TOKENS), atol=1e-4, rtol=1e-4)
    assert main([*merge, "--gguf", "f32"]) == 2
    assert "x.gguf: exists already" in capsys.readouterr().err


def test_the_command_turns_a_file_into_a_folder(llama, tmp_path, capsys):
    save_gguf(tmp_path / "x.gguf", llama, tiny_tokenizer(), kind="q8_0")
    folder = tmp_path / "folder"
    assert main(["merge", "--model", str(tmp_path / "x.gguf"), "--output", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    found = torch_logits(AutoModelForCausalLM.from_pretrained(folder))
    expected = torch_logits(in_transformers(tmp_path / "x.gguf"))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a joy")["input_ids"] == tiny_tokenizer()("a joy")["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_the_command_writes_the_chat_template_of_the_adapter(folders, adapter, tmp_path):
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "adapter")
    merge = ["merge", "--adapter", str(tmp_path / "adapter"), "--output"]
    assert main([*merge, str(tmp_path / "x.gguf"), "--gguf", "f32"]) == 0
    assert main([*merge, str(tmp_path / "folder")]) == 0
    assert load_tokenizer(folders / "llama").chat_template
    for written in ("x.gguf", "folder"):
        assert load_tokenizer(tmp_path / written).chat_template is None


@pytest.mark.parametrize("architecture", CONFIGS)
def test_llama_cpp_gives_the_same_probabilities(folders, tmp_path, architecture):
    """Its cache of keys and values is float16."""
    llama_cpp = pytest.importorskip("xllamacpp")
    path = tmp_path / "x.gguf"
    save_gguf(path, load_pretrained(folders / architecture), tiny_tokenizer(), kind="f32")
    parameters = llama_cpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel = str(path), 256, 1
    server = llama_cpp.Server(parameters)
    text = "Review: a joy from start to finish, it's 1984.\nSentiment:"
    answer = server.handle_completions(
        {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 10}
    )
    (first,) = answer["choices"][0]["logprobs"]["content"]
    found = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
    logits = load_pretrained(path)(np.array([tiny_tokenizer()(text)["input_ids"]]))[0, -1]
    expected = torch.log_softmax(torch.tensor(np.array(logits)), -1)
    assert found == pytest.approx({i: float(expected[i]) for i in found}, abs=0.02)
    assert expected.argmax().item() in found
