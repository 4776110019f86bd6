"""Whole models: from a folder, a GGUF file or the Hugging Face hub, and back to a folder."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.errors import InputError
from loft_jax.hub.gguf_io import open_gguf
from loft_jax.hub.gguf_tokenizer import gguf_tokenizer
from loft_jax.hub.safetensors_io import (
    FILE_NAME,
    INDEX_NAME,
    Safetensors,
    read_json,
    write_checkpoint,
)
from loft_jax.models import Llama, LlamaConfig
from loft_jax.models.llama_layout import hf_tensor_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONFIG_NAME = "config.json"
_WEIGHT_PATTERNS = (_CONFIG_NAME, "model*.safetensors", INDEX_NAME)
_TOKENIZER_PATTERNS = (
    _CONFIG_NAME,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)
_MAX_SHARD_BYTES = 5 * 10**9

# Older checkpoints carry the rotary frequencies, which the configuration already gives.
_RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class _Source(Protocol):
    """Where tensors come from, by Hugging Face's names."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray: ...


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Llama:
    """Loads a Llama with its weights.

    Tensors are read one by one into the stacked parameters: what is held beyond the model itself is
    one stacked parameter and one tensor.

    Args:
        path_or_hub_id: A folder with ``config.json`` and safetensors, a ``.gguf`` file, a folder
            with exactly one of those, or a model's name on the Hugging Face hub.
        dtype: What the model computes in.
        param_dtype: What its parameters are stored in.
        remat: Recompute each layer's inside in the backward pass.

    Returns:
        The model.

    Raises:
        InputError: No such model, a hub that cannot be reached, a file that cannot be read, an
            unsupported configuration, or a tensor that is missing, unknown or of another shape.

    Example:
        >>> model = load_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    """
    config, source = _open(_resolve(path_or_hub_id, _WEIGHT_PATTERNS))
    model = nnx.eval_shape(
        lambda: Llama(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(model)
    parameters = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    _check(parameters, source, config)
    for path, parameter in parameters.items():
        parameter.set_value(jnp.asarray(_read_parameter(path, parameter, source)))
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
        return gguf_tokenizer(open_gguf(file))
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{path}: no tokenizer can be loaded: {error}") from error


def save_pretrained(
    folder: str | os.PathLike[str],
    model: Llama,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Writes a model folder that transformers loads: configuration, safetensors, tokenizer.

    The folder appears under its name when it is complete.

    Args:
        folder: Where to; must not exist, or be empty.
        model: A model without LoRA layers; parameters are stored in the dtype they have.
        tokenizer: Written beside the weights.

    Raises:
        InputError: The folder holds something, or the model still carries LoRA layers.
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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        config = model.config.to_hf()
        config["torch_dtype"] = str(np.dtype(model.embed_tokens.embedding.dtype))
        (temporary / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shapes = {
            name: (shape, np.dtype(parameter.dtype))
            for path, parameter in parameters.items()
            for name, shape in _hf_shapes(path, parameter.shape).items()
        }
        write_checkpoint(
            temporary, shapes, _hf_tensors(parameters), max_shard_bytes=_MAX_SHARD_BYTES
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        temporary.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp's are private
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _resolve(path_or_hub_id: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """A path as it is; anything else that can be a hub id, downloaded."""
    path = Path(path_or_hub_id)
    if path.exists():
        return path
    name = str(path_or_hub_id)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or path.suffix in (".gguf", ".json"):
        raise InputError(f"{name}: no such file or folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # of whichever transport this release of huggingface_hub has
        raise InputError(
            f"{name}: no such file or folder, and the Hugging Face hub did not give it: "
            f"{type(error).__name__}: {error}"
        ) from error


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that ``path`` is or, without a ``config.json``, holds."""
    if path.is_file():
        return path
    if (path / _CONFIG_NAME).exists():
        return None
    files = sorted(path.glob("*.gguf"))
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
    index = path / INDEX_NAME
    return _read_config(path / _CONFIG_NAME), Safetensors(
        index if index.exists() else path / FILE_NAME
    )


def _read_config(path: Path) -> LlamaConfig:
    try:
        return LlamaConfig.from_hf(read_json(path))
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
            if not np.array_equal(source.read(name), source.read("model.embed_tokens.weight")):
                raise InputError(
                    f"{source.path}: tensor {name!r} differs from the embedding, but the "
                    "configuration ties the two (tie_word_embeddings)"
                )
            continue
        raise InputError(
            f"{source.path}: tensor {name!r} of shape {source.shapes[name]} is not part of the "
            "configured model"
        )


def _read_parameter(path: str, parameter: Any, source: _Source) -> np.ndarray:
    """One of our parameters, all its layers, transposed and cast on the way."""
    values = np.empty(parameter.shape, parameter.dtype)
    layers = values if path.startswith("layers.") else values[None]
    for layer, name in zip(layers, _hf_shapes(path, parameter.shape), strict=True):
        tensor = source.read(name)
        layer[...] = (
            tensor.T if hf_tensor_name(path, 0 if layers is values else None)[1] else tensor
        )
    return values


def _hf_tensors(parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors, in the order of :func:`_hf_shapes`."""
    for path, parameter in parameters.items():
        values = np.asarray(parameter.get_value())
        layers = values if path.startswith("layers.") else values[None]
        for layer, (name, shape) in zip(
            layers, _hf_shapes(path, parameter.shape).items(), strict=True
        ):
            transposed = hf_tensor_name(path, 0 if layers is values else None)[1]
            tensor = layer.T if transposed else layer
            assert tensor.shape == shape
            yield name, tensor
