"""Whole models: from a folder, a GGUF file or the Hugging Face hub, and back to a folder."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from loft_jax.errors import InputError, cut, explained, shown
from loft_jax.files import MOST_CONFIG, inside, new_folder, read_json, regular_file
from loft_jax.hub.gguf_io import open_gguf
from loft_jax.hub.gguf_tokenizer import gguf_tokenizer
from loft_jax.hub.host_arrays import whole
from loft_jax.hub.peft_names import CONFIG_NAME as ADAPTER_CONFIG_NAME
from loft_jax.hub.safetensors_io import (
    FILE_NAME,
    INDEX_NAME,
    Region,
    Safetensors,
    write_checkpoint,
)
from loft_jax.hub.tokenizer_folder import folder_tokenizer
from loft_jax.models import Llama, LlamaConfig, Quantization, Remat
from loft_jax.models.llama_layout import hf_tensor_name
from loft_jax.models.quantized import QuantizedParam, quantize, quantize_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_CONFIG_NAME = "config.json"
_GENERATION_NAME = "generation_config.json"
_WEIGHT_PATTERNS = (_CONFIG_NAME, _GENERATION_NAME, "model*.safetensors", INDEX_NAME)
_TOKENIZER_PATTERNS = (
    _CONFIG_NAME,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_EMBEDDING = "model.embed_tokens.weight"
_MAX_SHARD_BYTES = 5 * 10**9

# Older checkpoints carry the rotary frequencies, which the configuration already gives.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


Placement = Callable[[LlamaConfig, str, tuple[int, ...]], Sharding]
"""Where a parameter goes: by configuration of the model, dotted path and shape."""


class _Source(Protocol):
    """Where tensors come from, by Hugging Face's names."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, region: Region = ...) -> np.ndarray: ...


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: Remat = "dots",
    quantization: Quantization = "none",
    placement: Placement | None = None,
) -> Llama:
    """Loads a Llama with its weights.

    Tensors are read one by one into the stacked parameters. On a mesh, a host reads what its own
    devices need: what it holds at a time is the shard of one device, of one stacked parameter, and
    the part of one tensor that goes into it.

    Args:
        path_or_hub_id: A folder with ``config.json`` and safetensors, a ``.gguf`` file, a folder
            with exactly one of those, or a model's name on the Hugging Face hub.
        dtype: What the model computes in.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again, as for :class:`Llama`.
        quantization: What the kernels of the decoder layers are stored in, as for
            :func:`loft_jax.models.quantized.quantize_kernels`; each is quantized when it is read.
        placement: Where a parameter goes, by the model's configuration, the parameter's dotted path
            and its shape; by default on the default device.

    Returns:
        The model.

    Raises:
        InputError: No such model, a hub that cannot be reached, a file that cannot be read, an
            unsupported configuration, or a tensor that is missing, unknown or of another shape.

    Example:
        >>> model = load_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    """
    config, source = _open(_resolve(path_or_hub_id, _WEIGHT_PATTERNS))

    def made() -> Llama:
        model = Llama(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=nnx.Rngs(0))
        quantize_kernels(model, quantization)
        return model

    model = nnx.eval_shape(made)
    graphdef, state = nnx.split(model)
    parameters = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    _check(parameters, source, config)
    for path, parameter in parameters.items():
        sharding = None if placement is None else placement(config, path, parameter.shape)
        value = _load_parameter(path, parameter, source, sharding)
        if isinstance(parameter, QuantizedParam):
            place = None if placement is None else functools.partial(placement, config)
            value = quantize(value, quantization, name=path, placement=place)
        parameter.set_value(value)
    return nnx.merge(graphdef, state)


def load_model_config(path_or_hub_id: str | os.PathLike[str]) -> LlamaConfig:
    """Reads what a model is made of, and none of its weights.

    Args:
        path_or_hub_id: As for :func:`load_pretrained`, or a ``config.json`` itself.

    Returns:
        Its configuration.

    Raises:
        InputError: No such model, or an unsupported configuration.
    """
    path = Path(path_or_hub_id)
    if path.suffix != ".json":
        path = _resolve(path_or_hub_id, (_CONFIG_NAME,))
        if (file := _gguf_file(path)) is not None:
            return open_gguf(file).config
        path /= _CONFIG_NAME
    return _read_config(path)


def stored_dtype(path_or_hub_id: str | os.PathLike[str]) -> np.dtype:
    """What a model's weights are stored in, as its embeddings tell.

    Args:
        path_or_hub_id: As for :func:`load_pretrained`.

    Returns:
        Their dtype; float32 for a GGUF file, whose weights are computed when they are read.

    Raises:
        InputError: No such model, or a file that cannot be read.
    """
    source = _open(_resolve(path_or_hub_id, _WEIGHT_PATTERNS))[1]
    return source.read(_EMBEDDING, (slice(0, 1), slice(0, 1))).dtype


def load_tokenizer(path_or_hub_id: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer that belongs to a model.

    Args:
        path_or_hub_id: As for :func:`load_pretrained`.

    Returns:
        A tokenizer of transformers.

    Raises:
        InputError: No such model, or no tokenizer with it that can be read.
    """
    path = _resolve(path_or_hub_id, _TOKENIZER_PATTERNS)
    if (file := _gguf_file(path)) is not None:
        with explained(f"{file}: its tokenizer cannot be rebuilt"):
            return gguf_tokenizer(open_gguf(file))
    return folder_tokenizer(path)


def save_pretrained(
    folder: str | os.PathLike[str],
    model: Llama,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model folder that transformers loads: configuration, safetensors, tokenizer.

    The folder appears under its name when it is complete. Of several processes all call this, and
    the first one writes.

    Args:
        folder: Where to; must not exist, or be empty.
        model: A model without LoRA layers; parameters are stored in the dtype they have.
        tokenizer: Written beside the weights.
        base_model: What the model was made from, as for :func:`load_pretrained`: its settings of
            generation, stop tokens among them, are taken over where it has a file of them.

    Raises:
        InputError: The folder holds something, the model still carries LoRA layers, or there is no
            such base model.
    """
    folder = Path(folder)
    parameters = {
        ".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))
    }
    for path, parameter in parameters.items():
        if isinstance(parameter, nnx.LoRAParam):
            raise InputError(
                f"{path.rpartition('.')[0]}: still carries LoRA factors; merge them before saving"
            )
    if jax.process_index() > 0:
        for _ in _hf_tensors(parameters):  # has its part in each of them
            pass
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder")
    with new_folder(folder) as partial:
        config = model.config.to_hf()
        config["torch_dtype"] = str(np.dtype(model.embed_tokens.embedding.dtype))
        (partial / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shapes = {
            name: (shape, np.dtype(parameter.dtype))
            for path, parameter in parameters.items()
            for name, shape in _hf_shapes(path, parameter.shape).items()
        }
        write_checkpoint(partial, shapes, _hf_tensors(parameters), max_shard_bytes=_MAX_SHARD_BYTES)
        if base_model is not None:
            generation = inside(_resolve(base_model, _WEIGHT_PATTERNS), _GENERATION_NAME)
            if generation.is_file():
                shutil.copy(generation, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


def _resolve(path_or_hub_id: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """A path as it is; anything else that can be a hub id, downloaded."""
    path = Path(path_or_hub_id)
    with explained(f"{cut(str(path))}: cannot be looked for"):
        if path.exists():
            return path
    name = str(path_or_hub_id)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or path.suffix in (".gguf", ".json"):
        raise InputError(f"{cut(name)}: no such file or folder")
    from huggingface_hub import snapshot_download

    with explained(
        f"{cut(name)}: no such file or folder, and the Hugging Face hub did not give it"
    ):
        return Path(snapshot_download(name, allow_patterns=list(patterns)))


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that ``path`` is or, without a ``config.json``, holds."""
    if not path.is_dir():
        return regular_file(path, "a folder or a .gguf file")
    if (path / _CONFIG_NAME).exists():
        return None
    files = [inside(path, file.name) for file in sorted(path.glob("*.gguf"))]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "neither"
        raise InputError(
            f"{path}: expected {_CONFIG_NAME} or exactly one .gguf file, found {found}"
        )
    return files[0]


def _open(path: Path) -> tuple[LlamaConfig, _Source]:
    if (file := _gguf_file(path)) is not None:
        if file.suffix != ".gguf":
            raise InputError(f"{file}: expected a folder or a .gguf file")
        gguf = open_gguf(file)
        return gguf.config, gguf
    if (path / ADAPTER_CONFIG_NAME).exists():
        raise InputError(
            f"{path}: holds {ADAPTER_CONFIG_NAME} beside {_CONFIG_NAME}, so that transformers "
            "would load another model, which that names; expected a model alone"
        )
    config = _read_config(path / _CONFIG_NAME)
    if (path / _GENERATION_NAME).exists():
        generation = read_json(inside(path, _GENERATION_NAME), most_bytes=MOST_CONFIG)
        ends = generation.get("eos_token_id")
        if ends is not None:  # as transformers generates, whatever the model's own says
            with _naming(path / _GENERATION_NAME):
                config = dataclasses.replace(
                    config, eos_token_id=tuple(ends) if isinstance(ends, list) else ends
                )
    # Where there are both, transformers reads the one file too.
    one, index = path / FILE_NAME, path / INDEX_NAME
    if one.exists() and index.exists():
        _log.warning("%s: read from %s, as transformers does, not by its index", path, FILE_NAME)
    return config, Safetensors(index if index.exists() and not one.exists() else one)


def _read_config(path: Path) -> LlamaConfig:
    content = read_json(inside(path.parent, path.name), most_bytes=MOST_CONFIG)
    if (name := content.get("transformers_weights")) is not None:
        raise InputError(
            f"{path}: transformers_weights is {shown(name)}, which is not supported; expected "
            f"weights in {FILE_NAME} or named by {INDEX_NAME}"
        )
    with _naming(path):
        return LlamaConfig.from_hf(content)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file before what is wrong with its values."""
    with explained(f"{path}: cannot be read as a configuration"):
        try:
            yield
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _hf_shapes(path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors that make up one of our parameters, in order of layers, and their shapes."""
    stacked = path.startswith("layers.")
    shapes = {}
    for layer in range(shape[0]) if stacked else (None,):
        name, transposed = hf_tensor_name(path, layer)
        one = shape[1:] if stacked else shape
        shapes[name] = one[::-1] if transposed else one
    return shapes


def _check(parameters: Mapping[str, Any], source: _Source, config: LlamaConfig) -> None:
    """Everything that is expected is there in its shape, and nothing else is."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, parameter in parameters.items():
        expected |= _hf_shapes(path, parameter.shape)
    for name, shape in expected.items():
        found = source.shapes.get(name)
        if found is None:
            raise InputError(f"{source.path}: tensor {name!r} is missing, expected shape {shape}")
        if found != shape:
            raise InputError(
                f"{source.path}: tensor {name!r} has shape {found}, expected {shape} from the "
                "configuration"
            )
    for name in source.shapes.keys() - expected.keys():
        if _RECOMPUTED.fullmatch(name):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            if not np.array_equal(source.read(name), source.read(_EMBEDDING)):
                raise InputError(
                    f"{source.path}: tensor {name!r} differs from the embedding, but the "
                    "configuration ties the two (tie_word_embeddings)"
                )
            continue
        raise InputError(
            f"{source.path}: tensor {name!r} of shape {source.shapes[name]} is not part of the "
            "configured model"
        )


def _load_parameter(
    path: str, parameter: Any, source: _Source, sharding: Sharding | None
) -> jax.Array:
    if sharding is None:
        everything = tuple(slice(0, size) for size in parameter.shape)
        return jnp.asarray(_read_shard(path, parameter, source, everything))
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
        assert index is not None
        bounds = tuple(
            axis.indices(size)[:2] for axis, size in zip(index, parameter.shape, strict=True)
        )
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, copies in devices.items():
        values = _read_shard(path, parameter, source, tuple(slice(*bound) for bound in bounds))
        shards += [jax.device_put(values, device) for device in copies]
        jax.block_until_ready(shards)  # before the next one takes memory
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)


def _read_shard(path: str, parameter: Any, source: _Source, index: Sequence[slice]) -> np.ndarray:
    """A region of one of our parameters, all its layers, transposed and cast on the way."""
    values = np.empty([axis.stop - axis.start for axis in index], parameter.dtype)
    names = list(_hf_shapes(path, parameter.shape))
    if path.startswith("layers."):
        layers, names, index = values, names[index[0]], index[1:]
    else:
        layers = values[None]
    for layer, name in zip(layers, names, strict=True):
        transposed = hf_tensor_name(path, 0 if layers is values else None)[1]
        tensor = source.read(name, tuple(index[::-1] if transposed else index))
        layer[...] = tensor.T if transposed else tensor
    return values


def _hf_tensors(parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors, in the order of :func:`_hf_shapes`."""
    for path, parameter in parameters.items():
        values = whole(parameter.get_value())
        layers = values if path.startswith("layers.") else values[None]
        for layer, (name, shape) in zip(
            layers, _hf_shapes(path, parameter.shape).items(), strict=True
        ):
            transposed = hf_tensor_name(path, 0 if layers is values else None)[1]
            tensor = layer.T if transposed else layer
            assert tensor.shape == shape
            yield name, tensor
