import itertools
import json
import struct
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained, load_tokenizer
from scripts import llama2c

LAYERS, HIDDEN, SEQ_LEN = 2, 20, 16
WORDS = ("the", "cat", "there", "is", "at", "theist", "teacher", "ch", "chat")


def pieces():
    """Scored pieces: a toy SentencePiece BPE with byte fallback, as llama2.c writes it."""
    listed = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{i:02X}>".encode() for i in range(256))]
    parts = {f" {word}"[:end] for word in WORDS for end in range(2, len(word) + 2)}
    parts |= {word[:end] for word in WORDS for end in range(2, len(word) + 1)}
    merged = [*sorted(parts, key=lambda part: (len(part), part)), "é "]
    letters = [" ", *sorted(set("".join(WORDS))), "é"]
    listed += [part.encode() for part in merged + letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    return list(zip(listed, scores, strict=True))


VOCAB = len(pieces())


def write_tokenizer(path, listed):
    data = [struct.pack("<i", max(len(text) for text, _ in listed))]
    data += [struct.pack("<fi", score, len(text)) + text for text, score in listed]
    path.write_bytes(b"".join(data))
    return path


def write_checkpoint(path, *, heads=4, kv_heads=4, head_dim=6, shared=True, vocab=VOCAB):
    """A random checkpoint of version 0, and its tensors under llama2.c's names."""
    rng, dim = np.random.default_rng(0), heads * head_dim
    shapes = {
        "embedding": (vocab, dim),
        "att_norm": (LAYERS, dim),
        "wq": (LAYERS, dim, dim),
        "wk": (LAYERS, kv_heads * head_dim, dim),
        "wv": (LAYERS, kv_heads * head_dim, dim),
        "wo": (LAYERS, dim, dim),
        "ffn_norm": (LAYERS, dim),
        "w1": (LAYERS, HIDDEN, dim),
        "w2": (LAYERS, dim, HIDDEN),
        "w3": (LAYERS, HIDDEN, dim),
        "final_norm": (dim,),
        "freqs": (2, SEQ_LEN, head_dim // 2),
    }
    if not shared:
        shapes["classifier"] = (vocab, dim)
    tensors = {
        name: rng.normal(1.0 if "norm" in name else 0.0, 0.4, shape).astype("<f4")
        for name, shape in shapes.items()
    }
    header = (dim, HIDDEN, LAYERS, heads, kv_heads, vocab if shared else -vocab, SEQ_LEN)
    path.write_bytes(
        struct.pack("<7i", *header) + b"".join(tensor.tobytes() for tensor in tensors.values())
    )
    return tensors


def meta_logits(tensors, tokens, heads, kv_heads):
    """llama2.c's forward pass in float64: neighbours of a head are rotated, as in Meta's code."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    length, dim = len(tokens), w["embedding"].shape[1]
    size = dim // heads

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

    def rotate(x):  # (t, heads, size)
        angles = np.arange(length)[:, None] / 10_000.0 ** (np.arange(0, size, 2) / size)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x = w["embedding"][tokens]
    for i in range(LAYERS):
        h = norm(x, w["att_norm"][i])
        q = rotate((h @ w["wq"][i].T).reshape(length, heads, size))
        k = rotate((h @ w["wk"][i].T).reshape(length, kv_heads, size))
        v = (h @ w["wv"][i].T).reshape(length, kv_heads, size)
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", weights, v).reshape(length, dim) @ w["wo"][i].T
        h = norm(x, w["ffn_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return norm(x, w["final_norm"]) @ w.get("classifier", w["embedding"]).T


def sentencepiece_ids(listed, text):
    """As llama2.c's encode does it: of all neighbours the best scored are joined, until none is."""
    known = {piece: i for i, (piece, _) in enumerate(listed)}
    ids = []
    for letter in f" {text}" if text else "":
        data = letter.encode()
        ids += [known[data]] if data in known else [byte + 3 for byte in data]
    while True:
        best, at = -1e10, None
        for i, (left, right) in enumerate(itertools.pairwise(ids)):
            joined = known.get(listed[left][0] + listed[right][0])
            if joined is not None and listed[joined][1] > best:
                best, at = listed[joined][1], i
        if at is None:
            return [1, *ids]
        ids[at : at + 2] = [known[listed[ids[at]][0] + listed[ids[at + 1]][0]]]


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer.bin", pieces())


@pytest.mark.parametrize(
    ("kv_heads", "shared"), [(4, True), (2, True), (1, False)], ids=["mha", "gqa", "unshared"]
)
def test_logits_are_those_of_llama2c(tmp_path, tokenizer, kv_heads, shared):
    checkpoint, folder = tmp_path / "model.bin", tmp_path / "hf"
    tensors = write_checkpoint(checkpoint, kv_heads=kv_heads, shared=shared)
    llama2c.convert(checkpoint, tokenizer, folder)
    tokens = np.random.default_rng(1).integers(0, VOCAB, SEQ_LEN)
    expected = meta_logits(tensors, tokens, 4, kv_heads)
    assert expected.std() > 1
    model = load_pretrained(folder)
    assert model.config.tie_word_embeddings == shared
    assert model.config.max_position_embeddings == SEQ_LEN
    np.testing.assert_allclose(model(jnp.asarray(tokens[None]))[0], expected, atol=1e-4)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(tokens[None])).logits[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_tokens_are_those_of_llama2c_and_any_text_comes_back(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "model.bin")
    llama2c.convert(tmp_path / "model.bin", tokenizer, tmp_path / "hf")
    ours, theirs = load_tokenizer(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    rng, listed = np.random.default_rng(0), pieces()
    texts = ["", " ", "  the  cat ", "é the", "naïve 日本 🙂\n\ttheist", "Z"]
    texts += [" ".join(rng.choice(WORDS, 4)) for _ in range(20)]
    texts += ["".join(rng.choice(list("theacis "), 12)) for _ in range(20)]
    for text in texts:
        expected = sentencepiece_ids(listed, text)
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] == expected, text
        assert ours.decode(expected, skip_special_tokens=True) == text


def test_command_line(tmp_path, tokenizer, monkeypatch, capsys):
    write_checkpoint(tmp_path / "model.bin")
    folder = tmp_path / "new" / "hf"
    arguments = [str(tmp_path / "model.bin"), str(tokenizer), str(folder)]
    monkeypatch.setattr(sys, "argv", ["llama2c.py", *arguments])
    llama2c.main()
    assert capsys.readouterr().out == f"{folder}\n"
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == LAYERS
    with pytest.raises(SystemExit) as raised:
        llama2c.main()
    assert raised.value.code == 2
    assert f"{folder}: exists and is not an empty folder" in capsys.readouterr().err


def change(path, do):
    path.write_bytes(do(path.read_bytes()))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.bin", lambda data: data[:20], "model.bin: 20 bytes, expected a header of 28"),
        ("model.bin", lambda data: data[:-4], r"model.bin: \d+ bytes, expected \d+ of .*dim=24"),
        ("model.bin", lambda data: data + b"\0", r"model.bin: \d+ bytes, expected \d+ of"),
        ("model.bin", lambda data: b"ak42" + data[4:], "is it a version 0 checkpoint"),
        ("model.bin", lambda data: struct.pack("<7i", 24, 20, 2, 4, 3, VOCAB, 16) + data[28:],
         "n_heads a multiple of n_kv_heads"),
        ("tokenizer.bin", lambda data: data[:-1], f"piece {VOCAB - 1} is of 2 bytes, expected"),
        ("tokenizer.bin", lambda data: data[:-6], f"ends within piece {VOCAB - 1}"),
        ("tokenizer.bin", lambda data: data[:-2] + b"\xff\xff", f"piece {VOCAB - 1}: 'utf-8'"),
        ("tokenizer.bin", lambda data: data[:-10],
         f"holds {VOCAB - 1} pieces, expected {VOCAB}, the model's vocabulary"),
        ("tokenizer.bin", lambda data: data.replace(b"</s>", b"<EOS"),
         r"begins with the pieces \('<unk>', '<s>', '<EOS'\), expected"),
        ("tokenizer.bin", lambda data: data[:-2] + b"ch", "are both 'ch', expected no two alike"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, tokenizer, file, damage, message):
    write_checkpoint(tmp_path / "model.bin")
    change(tmp_path / file, damage)
    with pytest.raises(InputError, match=message):
        llama2c.convert(tmp_path / "model.bin", tokenizer, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "tokenizer.bin"]


def test_vocabulary_of_another_model_is_refused(tmp_path, tokenizer):
    write_checkpoint(tmp_path / "model.bin", vocab=VOCAB + 1)
    with pytest.raises(InputError, match=f"holds {VOCAB} pieces, expected {VOCAB + 1}"):
        llama2c.convert(tmp_path / "model.bin", tokenizer, tmp_path / "hf")
