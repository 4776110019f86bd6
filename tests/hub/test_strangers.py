"""Folders of models and adapters that strangers wrote: refused by name, or read as others do."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loft_jax.errors import InputError
from loft_jax.generation import generate
from loft_jax.hub import (
    gguf_io,
    load_model_config,
    load_peft_adapter,
    load_pretrained,
    load_tokenizer,
    save_peft_adapter,
)
from loft_jax.hub.gguf_io import GGUF
from loft_jax.lora import LoRAConfig, add_lora, lora_layers
from tests.tiny import save_tiny_llama, tiny_tokenizer


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """A model with its tokenizer, to be spoilt."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit(path, **changes):
    """Sets keys of a JSON file, by dotted name."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = content
        for key in outer:
            inner = inner[key]
        inner[last] = value
    path.write_text(json.dumps(content))


# --- What transformers would read


def test_of_one_file_and_shards_the_file_is_read_as_transformers_does(tmp_path, caplog):
    one = save_tiny_llama(tmp_path / "one", seed=0)
    other = save_tiny_llama(tmp_path / "other", seed=1)
    AutoModelForCausalLM.from_pretrained(other).save_pretrained(one, max_shard_size="30KB")
    assert (one / "model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(one).model.norm.weight.detach().numpy()
    embedding = AutoModelForCausalLM.from_pretrained(one).model.embed_tokens.weight
    ours = load_pretrained(one)
    np.testing.assert_array_equal(ours.embed_tokens.embedding[...], embedding.detach().numpy())
    np.testing.assert_array_equal(ours.norm.scale[...], theirs)
    assert "as transformers does" in caplog.text


def test_a_folder_that_transformers_would_read_as_another_model_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds adapter_config\.json beside config\.json"):
        load_pretrained(folder)
    (folder / "adapter_config.json").unlink()
    edit(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(InputError, match=r"transformers_weights is 'other\.safetensors'"):
        load_pretrained(folder)


@pytest.mark.parametrize("ends", [None, 5, [5, 9, 11], [300]])
def test_generation_stops_where_transformers_stops(tmp_path, ends):
    folder = save_tiny_llama(tmp_path / "m", eos_token_id=399)
    model = load_pretrained(folder)
    greedy = generate(model, [[1, 7, 3]], max_new_tokens=24, eos_token_ids=())[0]
    if ends is not None:
        ends = [greedy[end % 8] for end in ends] if isinstance(ends, list) else greedy[ends]
        GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    torch_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = torch_model.dummy_inputs["input_ids"].new_tensor([[1, 7, 3]])
    theirs = torch_model.generate(inputs, max_new_tokens=24, do_sample=False)[0, 3:].tolist()
    assert generate(load_pretrained(folder), [[1, 7, 3]], max_new_tokens=24) == [theirs]
    assert (len(theirs) < 24) == (ends is not None)


def test_stop_tokens_that_are_no_tokens_are_refused(folder):
    edit(folder / "generation_config.json", eos_token_id={"a": 1})
    with pytest.raises(InputError, match=r"generation_config\.json: config: eos_token_id is"):
        load_pretrained(folder)


# --- What may be opened


def test_a_tensor_in_two_places_is_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "a.safetensors")
    save_file(tensors, folder / "b.safetensors")
    places = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=r"is in a\.safetensors and in b\.safetensors"):
        load_pretrained(folder)


def test_two_ways_to_stretch_rotary_frequencies_are_refused(folder):
    edit(folder / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(InputError, match="rope_scaling and rope_parameters differ"):
        load_model_config(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_pipes_devices_and_links_that_leave_the_folder_are_not_opened(tmp_path, folder, name):
    secret = tmp_path / "secret"
    shutil.copy(folder / name, secret)

    def load():
        load_pretrained(folder)
        load_tokenizer(folder)

    load()
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match=f"names the file '{name}', expected one inside"):
        load()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=rf"{name}: is a pipe or a device"):
        load()


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/../../secret", 5])
def test_an_index_names_files_of_its_folder_only(tmp_path, folder, shard):
    names = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"expected (one inside the folder|a file's name)"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"fast_tokenizer_files": ["../tokenizer.4.0.json"]},
        {"vocab_file": "/etc/passwd"},
        {"merges_file": "../../secret"},
    ],
)
def test_a_tokenizer_names_files_of_its_folder_only(folder, config):
    (folder.parent.parent / "secret").write_text("x")
    edit(folder / "tokenizer_config.json", **config)
    with pytest.raises(InputError, match="expected one inside the folder"):
        load_tokenizer(folder)


def test_files_of_the_machine_a_tokenizer_was_saved_on_do_not_matter(folder):
    elsewhere = "/home/author/.cache/huggingface/special_tokens_map.json"
    edit(folder / "tokenizer_config.json", special_tokens_map_file=elsewhere)
    assert load_tokenizer(folder)("Once")["input_ids"] == tiny_tokenizer()("Once")["input_ids"]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_only_tokenizers_are_made_for_tokenizers(folder, file):
    """By the class of a name transformers would make a model, or whatever else it has."""
    for name in ("LlamaForCausalLM", "pipeline", 5):
        edit(folder / file, tokenizer_class=name)
        with pytest.raises(InputError, match=rf"{file}: tokenizer_class is .*{name}"):
            load_tokenizer(folder)


def test_a_limit_of_a_tokenizer_is_a_number(folder):
    edit(folder / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(InputError, match="model_max_length is 'long', expected a number"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_code_of_a_folder_is_never_run_nor_asked_for(folder, monkeypatch, file):
    marker = folder / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    edit(folder / file, auto_map={"AutoTokenizer": ["code.T", "code.T"], "AutoConfig": "code.T"})
    edit(folder / "tokenizer_config.json", tokenizer_class="T")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with contextlib.suppress(InputError):  # some are read by a class of transformers
        load_tokenizer(folder)
    assert not marker.exists()


# --- What they may say


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2.5),
        ("vocab_size", 10**400),
        ("hidden_size", True),
        ("rope_theta", 10**400),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "x" * 10**6),
        ("architectures", 5),
        ("architectures", {"a": 1}),
        ("rope_scaling", [1]),
        ("rope_scaling", {"full_attention": {"rope_type": "linear", "factor": 8.0}}),
        ("rope_scaling", {"rope_type": {"a": 1}}),
        ("head_dim", {}),
        ("eos_token_id", [[1]]),
        ("hidden_act", ["silu"]),
    ],
)
def test_configurations_that_make_no_sense_are_refused(folder, setting, value):
    edit(folder / "config.json", **{setting: value}, rope_parameters=None)
    with pytest.raises(InputError, match=r"config\.json: ") as raised:
        load_model_config(folder)
    assert setting.split("_")[0] in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model__merges": [["a"]]}, "cannot be read as a tokenizer"),
        ({"pre_tokenizer": {"type": "Later"}}, "cannot be read as a tokenizer"),
        ({"model": None}, "cannot be read as a tokenizer"),
        ({"added_tokens": [{"id": "x"}]}, "tokenizer"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": 40
                    * [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}],
                }
            },
            "can make a text .* times as long",
        ),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": 100_000 * [{"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            },
            "post_processor can make a text .* times as long",
        ),
        (
            {
                "decoder": {
                    "type": "Sequence",
                    "decoders": 4
                    * [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}],
                }
            },
            "decoder can make a text .* times as long",
        ),
    ],
)
def test_tokenizers_that_cannot_be_read_are_refused_by_file(folder, change, said):
    edit(folder / "tokenizer.json", **change)
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{said}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("tokenizer.json", '{"version": "1.0", "trun'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": null}}'),
        ("special_tokens_map.json", "\0"),
        ("config.json", "{"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_named(folder, file, text):
    (folder / file).write_text(text)
    with pytest.raises(InputError) as raised:
        load_tokenizer(folder)
    assert str(folder) in str(raised.value)
    if "decoder" not in text:
        assert file in str(raised.value)


def test_a_tokenizer_reads_as_transformers_reads_it(folder):
    text = "Once upon a time <|end|> é 10:30"
    assert load_tokenizer(folder)(text) == AutoTokenizer.from_pretrained(folder)(text)


@pytest.mark.parametrize(
    "metadata",
    [
        struct.pack("<QQ", 0, 2**60),  # so many settings
        struct.pack("<QQ", 2**60, 0),  # so many tensors
        struct.pack("<QQQ", 0, 1, 2**63) + b"key",  # a key so long
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**60),  # such an array
        struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 0, 2**16) + bytes(2**16),
        struct.pack("<QQQ", 0, 1, 1) + b"k" + 9_000 * struct.pack("<IIQ", 9, 9, 1),  # that deep
    ],
)
def test_counts_of_gguf_that_are_not_there_are_refused(tmp_path, metadata, monkeypatch):
    monkeypatch.setattr(gguf_io, "_MOST_PIECES", 2**15)  # the reader needs a minute for 2**22
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + metadata)
    with pytest.raises(InputError, match=r"x\.gguf: not a readable GGUF file: "):
        GGUF(path)


# --- Adapters


@pytest.fixture
def adapter(tmp_path, tiny_llama):
    model = load_pretrained(tiny_llama)
    add_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"]), rngs=nnx.Rngs(0))
    save_peft_adapter(tmp_path / "adapter", model)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "((((a{1000}){1000}){1000}){1000})"},
        pytest.param({"target_modules": "(?:.|..|...|....)+[^a-z._0-9]"}, marks=pytest.mark.slow),
        {"rank_pattern": {"(?:.|..|...|....)+[^a-z._0-9]": 4}},
        {"r": 10**400},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("inf")},
        {"target_modules": [["q_proj"]]},
        {"base_model_name_or_path": None, "peft_type": ["LORA"] * 10**5},
        {"unknown": "x" * 10**6},
    ],
)
def test_settings_of_adapters_are_bounded(adapter, tiny_llama, settings):
    edit(adapter / "adapter_config.json", **settings)
    with pytest.raises(InputError, match="adapter") as raised:
        load_peft_adapter(adapter, load_pretrained(tiny_llama))
    assert len(str(raised.value)) < 800


def test_an_adapter_that_is_replaced_while_it_is_read_is_never_mixed(tmp_path):
    """Weights of one number, at that alpha: every reading has one number, or is refused."""

    def made(number):
        model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        config = LoRAConfig(rank=2, alpha=float(number))
        model = add_lora(model, config, rngs=nnx.Rngs(0))
        (layer,) = lora_layers(model).values()
        layer.lora_b.set_value(jnp.full_like(layer.lora_b[...], number))
        return model

    models = {number: made(number) for number in (1, 2, 3)}
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for model in models.values():
                save_peft_adapter(tmp_path, model)
                stop.wait(0.005)

    save_peft_adapter(tmp_path, models[1])
    writer = threading.Thread(target=write)
    writer.start()
    read = []
    deadline = time.monotonic() + 60
    try:
        while len(read) < 50 and time.monotonic() < deadline:
            model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
            try:
                load_peft_adapter(tmp_path, model)
            except InputError:  # as between the two files of another
                continue
            (layer,) = lora_layers(model).values()
            read.append((layer.lora_alpha, float(layer.lora_b[0, 0])))
    finally:
        stop.set()
        writer.join()
    assert len({alpha for alpha, _ in read}) > 1  # it was replaced meanwhile
    assert all(alpha == number for alpha, number in read)


def test_adapters_that_are_written_at_once_are_not_mixed(tmp_path):
    models = []
    for number in (1, 2):
        model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
        model = add_lora(model, LoRAConfig(rank=2, alpha=float(number)), rngs=nnx.Rngs(0))
        (layer,) = lora_layers(model).values()
        layer.lora_b.set_value(jnp.full_like(layer.lora_b[...], number))
        models.append(model)
    refused = []

    def write(model):
        for _ in range(60):
            try:
                save_peft_adapter(tmp_path, model)
            except InputError as error:
                refused.append(str(error))

    for _ in range(3):
        writers = [threading.Thread(target=write, args=(model,)) for model in models]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        read = load_peft_adapter(tmp_path, nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))
        (layer,) = lora_layers(read).values()
        assert layer.lora_alpha == float(layer.lora_b[0, 0])
    assert all("another process is writing an adapter there" in said for said in refused)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_adapter_in_pieces_that_do_not_fit_is_named(adapter, tiny_llama):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, "x" * 10**5: tensors[name]}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="is no LoRA factor") as raised:
        load_peft_adapter(adapter, load_pretrained(tiny_llama))
    assert len(str(raised.value)) < 600


WITHOUT_A_NETWORK = """
import socket, sys
asked = []
def refuse(*arguments, **named):
    asked.append(arguments)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.modules["torch"] = sys.modules["transformers"] = None
from loft_jax.hub import load_peft_adapter, load_pretrained, load_tokenizer
model, adapter, gguf = sys.argv[1:]
load_peft_adapter(adapter, load_pretrained(model))
del sys.modules["transformers"]
load_tokenizer(model)
print(load_tokenizer(gguf)("Hello world").input_ids)
assert not asked, asked
"""


def test_what_is_here_is_loaded_without_a_network_or_pytorch(folder, adapter, smollm2):
    """And weights without transformers."""
    online = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    code = [sys.executable, "-c", WITHOUT_A_NETWORK, str(folder), str(adapter), str(smollm2)]
    ran = subprocess.run(code, capture_output=True, text=True, env=online)
    assert ran.stdout.strip() == "[19556, 905]", ran.stderr
