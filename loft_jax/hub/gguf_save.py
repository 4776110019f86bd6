"""Writes models as GGUF files, which llama.cpp reads."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from flax import nnx
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape, quantize

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import replacing
from loft_jax.hub.gguf_tokenizer import tokenizer_metadata
from loft_jax.hub.pretrained import hf_tensors, merged_parameters
from loft_jax.models.decoder_gguf import DecoderGGUF
from loft_jax.models.family import PretrainedModel, flat_parameters
from loft_jax.models.registry import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUFKind = Literal["f32", "f16", "bf16", "q8_0"]
"""How the matrices of a GGUF file are stored."""

_FILE_TYPES: Mapping[GGUFKind, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # GGUF's numbers
_BLOCK = 32  # numbers of a row that share a scale in Q8_0
_QUANTIZATION_VERSION = 2  # of the layout of blocks

# Fields of a configuration that do not change what is computed, or that the tokenizer has.
_NOT_COMPUTED = ("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")


class _Contents(NamedTuple):
    """What a file holds beside the parameters."""

    adapter: DecoderGGUF
    metadata: dict[str, Any]
    constants: dict[str, np.ndarray]


def check_gguf(model: PretrainedModel, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Checks that `save_gguf` can write a model.

    Args:
        model: The model, or its shapes alone, from `nnx.eval_shape`.
        tokenizer: Its tokenizer.

    Raises:
        InputError: GGUF files of its family are not supported, a file could not hold a setting of
            its configuration, or the tokenizer is of a kind that is not supported.
    """
    _contents(model, tokenizer)


def save_gguf(
    path: str | os.PathLike[str],
    model: PretrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    kind: GGUFKind = "f16",
    name: str = "",
) -> None:
    """Writes a language model with its tokenizer as one GGUF file.

    As llama.cpp's own converter does, it stores matrices in the asked kind, in float16 instead of
    Q8_0 if their rows are not of whole blocks, and vectors in float32. Tensors are converted one at
    a time. `load_pretrained` reads the file again.

    Args:
        path: File to write to; it must not exist. Its folder is made if missing.
        model: A language model without LoRA layers.
        tokenizer: Its tokenizer.
        kind: `"f32"`, `"f16"`, `"bf16"`, or `"q8_0"`: 8-bit integers with a float16 scale for every
            32 numbers of a row.
        name: Name of the model in the file.

    Raises:
        InputError: As for `check_gguf`; the file exists or cannot be written; the model still has
            LoRA layers; or a weight is too large for float16.
    """
    path = Path(path)
    contents = _contents(model, tokenizer)
    parameters = merged_parameters(model)
    if path.exists():
        raise InputError(f"{path}: exists already; expected the name of a new file")
    with explained(f"{path}: cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            writer = GGUFWriter(partial, contents.adapter.architecture)
            try:
                _write(writer, model, parameters, contents, kind, name)
            finally:
                writer.close()


def _contents(model: PretrainedModel, tokenizer: "PreTrainedTokenizerBase") -> _Contents:
    config = model.config
    family = family_of(config.model_type)
    adapter = family.gguf
    if adapter is None:
        raise InputError(f"model_type {family.model_type!r} is not supported in GGUF files")
    metadata, constants = adapter.contents(config)
    shapes = _shapes(model)
    read = adapter.config(metadata, shapes, constants)
    for field in dataclasses.fields(config):
        value, again = getattr(config, field.name), getattr(read, field.name)
        if field.name not in _NOT_COMPUTED and value != again:
            raise InputError(
                f"config: {field.name} is {shown(value)}, which GGUF files of the architecture "
                f"{adapter.architecture!r} do not hold; expected {shown(again)}"
            )
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    return _Contents(adapter, metadata, constants)


def _shapes(model: PretrainedModel) -> dict[str, tuple[int, ...]]:
    """Gives the shapes of Hugging Face's tensors, in the order of `hf_tensors`."""
    table = model.table
    return {
        name: shape
        for path, parameter in flat_parameters(model, nnx.Param).items()
        if not isinstance(parameter, nnx.LoRAParam)
        for name, shape in table.names(path, parameter.shape).items()
    }


def _write(
    writer: GGUFWriter,
    model: PretrainedModel,
    parameters: Mapping[str, Any],
    contents: _Contents,
    kind: GGUFKind,
    name: str,
) -> None:
    adapter, metadata, constants = contents
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    for key, value in metadata.items():
        _ADD[type(value)](writer, key, value)
    for constant, values in constants.items():
        writer.add_tensor_info(constant, values.shape, values.dtype, values.nbytes)
    for tensor, shape in _shapes(model).items():
        stored = _kind_of(shape, kind)
        size = quant_shape_to_byte_shape(shape, stored)
        bytes_ = int(np.prod(size))
        writer.add_tensor_info(
            adapter.stored_name(tensor), size, np.dtype(np.uint8), bytes_, raw_dtype=stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in constants.values():
        writer.write_tensor_data(values)
    for tensor, values in hf_tensors(parameters, model.table):
        rows = adapter.stored_rows(tensor, np.arange(len(values)), model.config)
        stored_values = np.empty(values.shape, np.float32)
        stored_values[rows] = values
        stored = _kind_of(values.shape, kind)
        with np.errstate(over="ignore"):
            blocks = quantize(stored_values, stored)
        if stored == GGMLQuantizationType.F16 and not np.isfinite(blocks).all():
            raise InputError(
                f"tensor {tensor!r} has numbers of up to {np.abs(stored_values).max():g}, too "
                "large for float16; expected bf16 or f32"
            )
        writer.write_tensor_data(blocks)


_ADD: Mapping[type, Any] = {
    bool: GGUFWriter.add_bool,
    int: GGUFWriter.add_uint32,
    float: GGUFWriter.add_float32,
    str: GGUFWriter.add_string,
    list: GGUFWriter.add_array,
}


def _kind_of(shape: tuple[int, ...], kind: GGUFKind) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind.upper()]
