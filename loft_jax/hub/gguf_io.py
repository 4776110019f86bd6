"""GGUF files of the Llama architecture: configuration and dequantized weights."""

import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import regular_file
from loft_jax.hub.safetensors_io import Region
from loft_jax.models import LlamaConfig, RopeScaling

# llama.cpp's names -> Hugging Face's.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUF:
    """A GGUF file: its metadata, its configuration, and its tensors one at a time.

    Tensors go by Hugging Face's names and are laid out as Hugging Face lays them out. A tensor that
    has no such name keeps its own.

    Args:
        path: A ``.gguf`` file.

    Raises:
        InputError: A file that is missing, unreadable, damaged, or of another architecture.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = regular_file(path, "GGUF")
        with explained(f"{self.path}: not a readable GGUF file"):
            reader = _BoundedReader(self.path)
            self.metadata: dict[str, Any] = {
                key: field.contents() for key, field in reader.fields.items()
            }
            self._tensors: dict[str, ReaderTensor] = {
                _hf_name(tensor.name): tensor for tensor in reader.tensors
            }
            if len(self._tensors) < len(reader.tensors):
                raise ValueError("two of its tensors are the same one of Hugging Face's names")
            self.shapes: dict[str, tuple[int, ...]] = {
                name: tuple(int(size) for size in reversed(tensor.shape))  # they run backwards
                for name, tensor in self._tensors.items()
            }
        with explained(f"{self.path}: does not describe a Llama"):
            self.config = self._read_config()

    def read(self, name: str, region: Region = ...) -> np.ndarray:
        """Reads one tensor, or a region of it, and dequantizes the rows that it touches.

        Args:
            name: One of ``shapes``.
            region: A slice for each axis, without steps; by default all of it.

        Returns:
            The values as float32.

        Raises:
            InputError: There is no such tensor, or it is quantized in a way that cannot be undone
                here.
        """
        if name not in self._tensors:
            raise InputError(f"{self.path}: tensor {shown(name)} is missing")
        tensor = self._tensors[name]
        rows, *inside = (slice(None),) if region is ... else region
        kind = tensor.tensor_type.name
        with explained(f"{self.path}: tensor {shown(tensor.name)}, {kind}, cannot be dequantized"):
            stored = tensor.data.reshape(self.shapes[name][0], -1)[self._stored_rows(name)[rows]]
            values = dequantize(stored, tensor.tensor_type).astype(np.float32, copy=False)
            return values.reshape(-1, *self.shapes[name][1:])[:, *inside]

    def _stored_rows(self, name: str) -> np.ndarray:
        """Where each row of a tensor is stored; llama.cpp keeps two that are rotated adjacent."""
        rows = np.arange(self.shapes[name][0])
        heads = {
            "q_proj": self.config.num_attention_heads,
            "k_proj": self.config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is None:
            return rows
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)  # (heads, 2, head_dim / 2)

    def field(self, key: str) -> Any:
        """Gives a metadata field that must be there.

        Raises:
            InputError: It is not.
        """
        if key not in self.metadata:
            raise InputError(f"{self.path}: field {key!r} is missing")
        return self.metadata[key]

    def _read_config(self) -> LlamaConfig:
        metadata = self.metadata
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise InputError(
                f"{self.path}: architecture is {shown(architecture)}, only 'llama' is supported"
            )
        for key in ("llama.expert_count", "llama.attention.sliding_window"):
            if metadata.get(key):
                raise InputError(
                    f"{self.path}: {key} is {shown(metadata[key])}, which is not supported"
                )
        hidden_size = self.field("llama.embedding_length")
        heads = self.field("llama.attention.head_count")
        head_dim = metadata.get("llama.attention.key_length", hidden_size // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if metadata.get(key, head_dim) != head_dim:
                raise InputError(
                    f"{self.path}: {key} is {shown(metadata[key])}, expected the head size, "
                    f"{shown(head_dim)}"
                )
        return LlamaConfig(
            vocab_size=self.shapes.get("model.embed_tokens.weight", (0,))[0],
            hidden_size=hidden_size,
            intermediate_size=self.field("llama.feed_forward_length"),
            num_hidden_layers=self.field("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self.field("llama.context_length"),
            # float32 in the file: the shortest decimal that is the same float32 was meant
            rms_norm_eps=_shortest(self.field("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(metadata.get("llama.rope.freq_base", 10_000.0)),
            rope_scaling=self._read_rope_scaling(),
            tie_word_embeddings="lm_head.weight" not in self.shapes,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in self.shapes,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in self.shapes,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        )

    def _read_rope_scaling(self) -> RopeScaling | None:
        if "rope_freqs.weight" in self.shapes:
            raise InputError(
                f"{self.path}: holds the tensor 'rope_freqs.weight', by which llama.cpp stretches "
                "rotary frequencies as 'llama3' does; only 'none' and 'linear' are supported in "
                "GGUF. Expected the same model as a Hugging Face folder"
            )
        kind = self.metadata.get("llama.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return RopeScaling("linear", _shortest(self.field("llama.rope.scaling.factor")))
        raise InputError(
            f"{self.path}: llama.rope.scaling.type is {shown(kind)}, only 'none' and 'linear' are "
            "supported"
        )


class _BoundedReader(GGUFReader):
    """The reader, which goes on over the end of a file as if nothing were there, held inside it."""

    _pieces = 0

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        self._pieces += 1
        if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError("it is cut off, or its counts are wrong")
        if self._pieces > _MOST_PIECES:
            raise ValueError(f"its metadata has more than {_MOST_PIECES} values")
        return super()._get(offset, dtype, int(count), override_order)


_MOST_PIECES = 2**22
"""Numbers and texts of the metadata: the largest vocabularies have half as many."""


def open_gguf(path: str | os.PathLike[str]) -> GGUF:
    """Opens a GGUF file, or gives the last one again: parsing its vocabulary takes seconds.

    Args:
        path: A ``.gguf`` file.

    Returns:
        The file, to be read only.

    Raises:
        InputError: As for :class:`GGUF`.
    """
    path = regular_file(path, "GGUF").absolute()
    status = path.stat()
    return _open_gguf(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_gguf(path: Path, size: int, modified: int) -> GGUF:
    return GGUF(path)


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


def _hf_name(name: str) -> str:
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, module, parameter = match.groups()
        if module in _IN_LAYER:
            return f"model.layers.{layer}.{_IN_LAYER[module]}.{parameter}"
    module, _, parameter = name.rpartition(".")
    return f"{_TOP[module]}.{parameter}" if module in _TOP else name
