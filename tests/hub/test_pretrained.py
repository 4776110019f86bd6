import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from loft_jax.errors import InputError
from loft_jax.hub import pretrained as module
from loft_jax.hub.pretrained import (
    load_pretrained,
    load_tokenizer,
    save_pretrained,
    stored_dtype,
)
from loft_jax.lora import LoRAConfig, add_lora
from tests.tiny import save_tiny_llama, tiny_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 400, (2, 20))


def torch_logits(folder, **how):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, **how)
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def assert_same(one, other):
    ours, theirs = nnx.to_flat_state(nnx.state(one)), nnx.to_flat_state(nnx.state(other))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


def test_sharded_weights_are_the_same_model(tmp_path, tiny_llama):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(
        tmp_path / "sharded", max_shard_size="50KB"
    )
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert_same(load_pretrained(tmp_path / "sharded"), load_pretrained(tiny_llama))


def test_bfloat16_storage(tmp_path, tiny_llama):
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(folder)
    logits = load_pretrained(folder)(TOKENS)
    np.testing.assert_allclose(logits, torch_logits(folder, dtype=torch.float32), atol=1e-4)
    kept = load_pretrained(folder, param_dtype=jnp.bfloat16)
    assert kept.layers.self_attn.k_proj.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(kept(TOKENS), logits, atol=1e-6)
    assert (stored_dtype(folder), stored_dtype(tiny_llama)) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("kind", ["untied", "tied", "sharded", "bfloat16"])
def test_what_is_saved_is_what_was_loaded(tmp_path, monkeypatch, kind):
    original = save_tiny_llama(tmp_path / "original", tie_word_embeddings=kind == "tied")
    if kind == "sharded":
        monkeypatch.setattr(module, "_MAX_SHARD_BYTES", 50_000)
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    model = load_pretrained(original, param_dtype=dtype)
    save_pretrained(tmp_path / "saved", model, tiny_tokenizer())

    again = load_pretrained(tmp_path / "saved", param_dtype=dtype)
    assert again.config == model.config
    assert_same(again, model)
    assert (len(list((tmp_path / "saved").glob("model-*"))) > 2) == (kind == "sharded")
    np.testing.assert_allclose(
        torch_logits(tmp_path / "saved", dtype=torch.float32), model(TOKENS), atol=1e-4
    )
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert kept.dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    text = "question: two plus two"
    assert load_tokenizer(tmp_path / "saved")(text) == tiny_tokenizer()(text)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_settings_of_generation_are_those_of_the_base(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    GenerationConfig(eos_token_id=[2, 4]).save_pretrained(base)
    model = load_pretrained(base)
    save_pretrained(tmp_path / "saved", model, base_model=base)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert kept.generation_config.eos_token_id == [2, 4]
    (base / "generation_config.json").unlink()
    save_pretrained(tmp_path / "without", model, base_model=base)
    assert not (tmp_path / "without" / "generation_config.json").exists()


def test_saving_refuses_a_folder_with_something_in_it(tmp_path, tiny_llama):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not an empty folder"):
        save_pretrained(tmp_path, load_pretrained(tiny_llama))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_saving_refuses_lora_layers(tmp_path, tiny_llama):
    model = load_pretrained(tiny_llama)
    add_lora(model, LoRAConfig(rank=2, target_modules=["v_proj"]), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"layers\.self_attn\.v_proj: still has LoRA"):
        save_pretrained(tmp_path / "out", model)
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_nothing(tmp_path, tiny_llama, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_checkpoint", fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(tmp_path / "out", load_pretrained(tiny_llama))
    assert not list(tmp_path.iterdir())


def changed(folder, tmp_path, change):
    """A copy of the model with its tensors and configuration changed in place."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, c: t.pop(Q), f"tensor '{Q}' is missing, expected shape (32, 32)"),
        (
            lambda t, c: t.update({Q: torch.zeros(16, 32)}),
            f"tensor '{Q}' has shape (16, 32), expected (32, 32)",
        ),
        (
            lambda t, c: t.update({"score.weight": torch.zeros(2, 32)}),
            "tensor 'score.weight' of shape (2, 32) is not part",
        ),
        (
            lambda t, c: c.update(num_hidden_layers=1),
            "tensor 'model.layers.1.",
        ),
        (
            lambda t, c: c.update(tie_word_embeddings=True),
            "tensor 'lm_head.weight' differs from the embedding",
        ),
        (
            lambda t, c: t.update({Q: torch.zeros(32, 32, dtype=torch.int8)}),
            f"tensor '{Q}' is stored as I8",
        ),
        (lambda t, c: c.update(model_type="gemma"), "config.json: config: model_type is 'gemma'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, tiny_llama, change, said):
    with pytest.raises(InputError) as raised:
        load_pretrained(changed(tiny_llama, tmp_path, change))
    assert said in str(raised.value)


def test_tensors_that_say_nothing_new_are_let_through(tmp_path):
    def change(tensors, config):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    tied = save_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    (tmp_path / "more").mkdir()
    assert_same(load_pretrained(changed(tied, tmp_path / "more", change)), load_pretrained(tied))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "expected config.json or exactly one .gguf file, found neither"),
        ({"a.gguf": "", "b.gguf": ""}, "found a.gguf, b.gguf"),
        ({"config.json": "{"}, "config.json: cannot be read as JSON"),
        ({"config.json": '{"model_type": "llama"}'}, "vocab_size is missing"),
        ({"a.gguf": "nonsense"}, "a.gguf: not a readable GGUF file"),
    ],
)
def test_folders_without_a_model_are_named(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as raised:
        load_pretrained(tmp_path)
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_a_folder_without_weights_is_named(tmp_path, tiny_llama):
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        load_pretrained(tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tiny_llama):
    with pytest.raises(InputError, match=r"has no tokenizer, expected tokenizer\.json"):
        load_tokenizer(tiny_llama)


@pytest.mark.parametrize("name", ["./no/such/folder", "missing.gguf", "a/b/c", "../x"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(InputError, match="no such file or folder"):
        load_pretrained(name)


def test_a_hub_that_does_not_answer_is_named_and_what_it_gave_before_is_used(tmp_path, tiny_llama):
    """As when a run is resumed: it had its model before."""
    model = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_llama, model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    script = (
        "from loft_jax.errors import InputError\n"
        "from loft_jax.hub.pretrained import load_pretrained\n"
        "print(load_pretrained('someone/tiny').config.vocab_size)\n"
        "try:\n    load_pretrained('nobody/nothing')\n"
        "except InputError as error:\n    print(error)\n"
    )
    online = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=online | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    rows, message = ran.stdout.splitlines()
    assert rows == "400", ran.stderr
    assert message.startswith("nobody/nothing: no such file or folder, and the Hugging Face hub")


def test_what_a_model_does_not_have_is_refused(tiny_llama):
    with pytest.raises(InputError, match=r"labels is .*, and a LlamaConfig has none"):
        load_pretrained(tiny_llama, labels=["a", "b"])
    with pytest.raises(InputError, match=r"^remat is 'all', expected 'none' or 'dots' or 'full'"):
        load_pretrained(tiny_llama, remat="all")


def test_a_hub_id_is_downloaded_and_loaded(tiny_llama, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load_pretrained("someone/tiny-llama"), load_pretrained(tiny_llama))
    [(name, patterns)] = asked
    assert name == "someone/tiny-llama"
    assert "config.json" in patterns
    assert not any(pattern in ("*", "*.bin") for pattern in patterns)
