"""Converts a checkpoint and a tokenizer of llama2.c to a folder in Hugging Face's form.

Reads llama2.c's version 0: `model.bin` as its `run.c` takes it, in float32, and
`tokenizer.bin`, a SentencePiece BPE with its scores. The folder is one that transformers and
`loft_jax.load_pretrained` load.

Source: https://github.com/karpathy/llama2.c (`run.c`, `export.py`, `tokenizer.py`).
"""

import argparse
import json
import os
import re
import shutil
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from loft_jax.errors import InputError
from loft_jax.hub.safetensors_io import FILE_NAME, write_safetensors
from loft_jax.models.llama import LlamaConfig

_UNK, _BOS, _EOS = range(3)  # ids that llama2.c's run.c relies on
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class _Header(NamedTuple):
    """The seven numbers that a checkpoint begins with."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int  # negative: the classifier is not the embedding
    seq_len: int


_HEADER = struct.Struct("<7i")


def main() -> None:
    """Command line: exit code 2 and one message when something is in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="model.bin, of version 0")
    parser.add_argument("tokenizer", type=Path, help="tokenizer.bin")
    parser.add_argument("folder", type=Path, help="where to; must be empty or absent")
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.tokenizer, arguments.folder)
    except (InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(arguments.folder)


def convert(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Writes a model and its tokenizer to a folder, which appears when it is complete.

    Args:
        checkpoint: A `model.bin` of version 0.
        tokenizer: The `tokenizer.bin` that belongs to it.
        folder: Where to; must not exist, or be empty.

    Raises:
        InputError: The folder holds something, or a file is not what it should be.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder")
    config, tensors = read_checkpoint(checkpoint)
    pieces = read_pieces(tokenizer, config.vocab_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write_safetensors(temporary / FILE_NAME, tensors)
        _write_json(temporary / "config.json", {**config.to_hf(), "torch_dtype": "float32"})
        make_tokenizer(pieces).save(str(temporary / "tokenizer.json"))
        unk, bos, eos = _SPECIAL
        _write_json(
            temporary / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": unk,
                "bos_token": bos,
                "eos_token": eos,
                "model_max_length": config.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
        )
        temporary.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp's are private
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_checkpoint(path: Path) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """Reads a checkpoint of version 0.

    Args:
        path: A `model.bin`.

    Returns:
        The configuration, and float32 tensors by Hugging Face's names, laid out as there.

    Raises:
        InputError: The header makes no sense, or the file is not as long as it says.
    """
    size = path.stat().st_size
    if size < _HEADER.size:
        raise InputError(f"{path}: {size} bytes, expected a header of {_HEADER.size} at least")
    with path.open("rb") as file:
        header = _Header._make(_HEADER.unpack(file.read(_HEADER.size)))
    _check_header(path, header)
    head_dim = header.dim // header.n_heads
    parts = _parts(header)
    expected = _HEADER.size + 4 * sum(int(np.prod(shape)) for shape in parts.values())
    if size != expected:
        raise InputError(
            f"{path}: {size} bytes, expected {expected} of a version 0 checkpoint with {header}"
        )
    values = np.memmap(path, np.dtype("<f4"), "r", offset=_HEADER.size)
    tensors, at = {}, 0
    for name, shape in parts.items():
        count = int(np.prod(shape))
        part = values[at : at + count].reshape(shape)
        at += count
        if name.startswith("freqs"):
            continue  # what rope_theta gives
        if "{}" not in name:
            tensors[name] = part
            continue
        for layer, tensor in enumerate(part):
            if "q_proj" in name or "k_proj" in name:
                tensor = _halves(tensor, head_dim)
            tensors[name.format(layer)] = tensor
    config = LlamaConfig(
        vocab_size=abs(header.vocab_size),
        hidden_size=header.dim,
        intermediate_size=header.hidden_dim,
        num_hidden_layers=header.n_layers,
        num_attention_heads=header.n_heads,
        num_key_value_heads=header.n_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=header.seq_len,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=header.vocab_size > 0,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
    )
    return config, tensors


def _check_header(path: Path, header: _Header) -> None:
    if (
        min(header._replace(vocab_size=abs(header.vocab_size))) < 1
        or header.dim % header.n_heads
        or header.dim // header.n_heads % 2
        or header.n_heads % header.n_kv_heads
    ):
        raise InputError(
            f"{path}: begins with {header}, expected positive numbers, n_heads a multiple of "
            "n_kv_heads, and dim an even multiple of n_heads; is it a version 0 checkpoint?"
        )


def _parts(header: _Header) -> dict[str, tuple[int, ...]]:
    """What follows the header, in its order: names of Hugging Face, and shapes over layers."""
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = header
    head_dim = dim // heads
    layer = "model.layers.{}."
    parts: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (abs(vocab), dim),
        layer + "input_layernorm.weight": (layers, dim),
        layer + "self_attn.q_proj.weight": (layers, dim, dim),
        layer + "self_attn.k_proj.weight": (layers, kv_heads * head_dim, dim),
        layer + "self_attn.v_proj.weight": (layers, kv_heads * head_dim, dim),
        layer + "self_attn.o_proj.weight": (layers, dim, dim),
        layer + "post_attention_layernorm.weight": (layers, dim),
        layer + "mlp.gate_proj.weight": (layers, hidden, dim),
        layer + "mlp.down_proj.weight": (layers, dim, hidden),
        layer + "mlp.up_proj.weight": (layers, hidden, dim),
        "model.norm.weight": (dim,),
        "freqs_cos": (seq_len, head_dim // 2),
        "freqs_sin": (seq_len, head_dim // 2),
    }
    if vocab < 0:
        parts["lm_head.weight"] = (-vocab, dim)
    return parts


def _halves(tensor: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k: llama2.c rotates neighbours, Hugging Face one half with the other."""
    pairs = tensor.reshape(-1, head_dim // 2, 2, tensor.shape[1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)


def read_pieces(path: Path, count: int) -> list[tuple[str, float]]:
    """Reads a vocabulary.

    Args:
        path: A `tokenizer.bin`.
        count: How many pieces the model has.

    Returns:
        Pieces as SentencePiece writes them, with their scores, in the order of their ids.

    Raises:
        InputError: The file is damaged, or holds another number of pieces.
    """
    data = path.read_bytes()
    pieces: list[tuple[str, float]] = []
    at = 4  # after the longest piece's length, which nothing here needs
    while at < len(data):
        if at + 8 > len(data):
            raise InputError(f"{path}: ends within piece {len(pieces)}, expected a whole one")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            raise InputError(
                f"{path}: piece {len(pieces)} is of {length} bytes, expected 0 to "
                f"{len(data) - at}, which is what is left of the file"
            )
        try:
            text = data[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: piece {len(pieces)}: {error}, expected UTF-8") from error
        at += length
        pieces.append((text.replace(" ", "▁"), score))  # llama2.c's export does the reverse
    if len(pieces) != count:
        raise InputError(
            f"{path}: holds {len(pieces)} pieces, expected {count}, the model's vocabulary"
        )
    # llama2.c writes line breaks around those of bos and eos.
    named = tuple(text.strip("\n") for text, _ in pieces[: len(_SPECIAL)])
    if named != _SPECIAL:
        raise InputError(f"{path}: begins with the pieces {named}, expected {_SPECIAL}")
    pieces[: len(_SPECIAL)] = [(text, 0.0) for text in _SPECIAL]
    seen: dict[str, int] = {}
    for number, (text, _) in enumerate(pieces):
        if seen.setdefault(text, number) != number:
            raise InputError(
                f"{path}: pieces {seen[text]} and {number} are both {text!r}, expected no two alike"
            )
    return pieces


def make_tokenizer(pieces: list[tuple[str, float]]) -> Tokenizer:
    """Builds the BPE that merges in the order of SentencePiece's scores.

    Args:
        pieces: Pieces and scores in the order of their ids; the first three are special.

    Returns:
        A tokenizer that puts a space before a text and bos before that, as llama2.c does.
    """
    vocab = {text: number for number, (text, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(pieces),
            unk_token=_SPECIAL[_UNK],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in _SPECIAL]
    )
    bos = _SPECIAL[_BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, _BOS)]
    )
    return tokenizer


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Pairs of pieces that make another one, the best scored first.

    Of equally scored ones, that with the longer left piece comes first, as in transformers'
    converter of SentencePiece models.
    """
    known = {text: score for text, score in pieces[len(_SPECIAL) :] if not _BYTE.fullmatch(text)}
    pairs = [
        (text[:cut], text[cut:])
        for text in known
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    return sorted(
        pairs,
        key=lambda pair: (known["".join(pair)], len(pair[0]), len(pair[1])),
        reverse=True,
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
