"""Loads models from a folder, a GGUF file or the Hugging Face hub, and saves them to a folder."""

import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from loft_jax.errors import InputError, check_choice, cut, explained, naming, shown
from loft_jax.files import MOST_CONFIG, inside, new_folder, read_json, regular_file
from loft_jax.hub.gguf_io import open_gguf
from loft_jax.hub.gguf_tokenizer import gguf_tokenizer
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.hub.image_processor import PROCESSOR_NAME, ImageProcessor
from loft_jax.hub.peft_names import CONFIG_NAME as ADAPTER_CONFIG_NAME
from loft_jax.hub.safetensors_io import (
    FILE_NAME,
    INDEX_NAME,
    Region,
    Safetensors,
    write_checkpoint,
)
from loft_jax.hub.tokenizer_folder import folder_tokenizer
from loft_jax.models import Head, Quantization, Remat
from loft_jax.models.family import (
    Family,
    ImageClassifier,
    LanguageModel,
    ParameterTable,
    PretrainedConfig,
    PretrainedModel,
    SequenceClassifier,
    flat_parameters,
    with_end_tokens,
    with_labels,
)
from loft_jax.models.quantized import QuantizedParam, quantize, quantize_kernels
from loft_jax.models.registry import family_of

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
    "spm.model",
    "merges.txt",
    "chat_template*",
)
_MAX_SHARD_BYTES = 5 * 10**9

Placement = Callable[[ParameterTable, str, tuple[int, ...]], Sharding]
"""Maps the model's table, a dotted path and a shape to the sharding of a parameter."""


class _Source(Protocol):
    """A source of tensors by Hugging Face's names."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, region: Region = ...) -> np.ndarray: ...


class _Renamed:
    """A source whose tensors have Hugging Face's current names.

    Older names are translated, fused tensors are divided, a model without a head gets the prefix
    that it has within a model with one, and tensors that the family ignores are left out.
    """

    def __init__(self, source: _Source, family: Family) -> None:
        self.path = source.path
        names = {name: family.current_name(name) for name in source.shapes}
        if not any(name.startswith(family.prefix) for name in names.values()):
            names = {old: family.prefix + new for old, new in names.items()}
        self._places: dict[str, tuple[str, int]] = {}  # stored name, and the first row there
        self.shapes: dict[str, tuple[int, ...]] = {}
        for old, whole in names.items():
            if re.fullmatch(family.ignored, whole):
                continue
            parts = family.part_names(whole)
            shape = source.shapes[old]
            for number, new in enumerate(parts):
                if new in self._places:
                    raise InputError(
                        f"{self.path}: tensors {shown(self._places[new][0])} and {shown(old)} are "
                        f"both for {shown(new)}; expected one of them"
                    )
                if len(parts) > 1:
                    shape = (source.shapes[old][0] // len(parts), *source.shapes[old][1:])
                self._places[new] = (old, number * shape[0] if number else 0)
                self.shapes[new] = shape
        self._source = source

    def read(self, name: str, region: Region = ...) -> np.ndarray:
        old, first = self._places[name]
        shape = self.shapes[name]
        if shape == self._source.shapes[old]:
            return self._source.read(old, region)
        rows, *inside = map(slice, shape) if region is ... else region
        start, stop, _ = rows.indices(shape[0])
        return self._source.read(old, (slice(first + start, first + stop), *inside))


class _Opened(NamedTuple):
    """A model whose weights are not read yet."""

    family: Family
    config: PretrainedConfig
    source: _Source


@overload
def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    head: Literal["causal-lm"] = "causal-lm",
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike = ...,
    remat: Remat = ...,
    quantization: Quantization = ...,
    placement: Placement | None = ...,
    seed: int = ...,
) -> LanguageModel: ...


@overload
def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    head: Literal["sequence-classification"],
    labels: Sequence[str] | None = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike = ...,
    remat: Remat = ...,
    quantization: Quantization = ...,
    placement: Placement | None = ...,
    seed: int = ...,
) -> SequenceClassifier: ...


@overload
def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    head: Literal["image-classification"],
    labels: Sequence[str] | None = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike = ...,
    remat: Remat = ...,
    quantization: Quantization = ...,
    placement: Placement | None = ...,
    seed: int = ...,
) -> ImageClassifier: ...


@overload
def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    head: Head,
    labels: Sequence[str] | None = ...,
    dtype: DTypeLike = ...,
    param_dtype: DTypeLike = ...,
    remat: Remat = ...,
    quantization: Quantization = ...,
    placement: Placement | None = ...,
    seed: int = ...,
) -> PretrainedModel: ...


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    head: Head = "causal-lm",
    labels: Sequence[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: Remat = "dots",
    quantization: Quantization = "none",
    placement: Placement | None = None,
    seed: int = 0,
) -> PretrainedModel:
    """Loads a model with its weights.

    Tensors are read one by one into the stacked parameters. On a mesh, a host reads only what its
    own devices need. At a time it holds one device's shard of one stacked parameter, and the part
    of one tensor that belongs to it.

    Args:
        path_or_hub_id: A folder with `config.json` and safetensors, a `.gguf` file, a folder with
            exactly one `.gguf` file, or the name of a model on the Hugging Face hub.
        head: Head of the model.
        labels: For a head of classification, the names of its labels, or one name for a regression;
            by default those of the checkpoint.
        dtype: Dtype of the computation.
        param_dtype: Dtype of the stored parameters.
        remat: What the backward pass recomputes.
        quantization: Storage of the kernels of the layers, as for
            `loft_jax.models.quantized.quantize_kernels`; each is quantized when it is read.
        placement: Gives the sharding of a parameter from the model's parameter table, its dotted
            path and its shape; by default all are on the default device.
        seed: Seed of dropout, and of what the checkpoint lacks and is drawn, such as a new head. It
            is among the model's `output_modules`, which train and are exported whole.

    Returns:
        The model, a `loft_jax.models.family.PretrainedModel`, in evaluation mode as transformers
        loads it: dropout of its own is inactive until `model.train()`.

    Raises:
        InputError: There is no such model, the hub cannot be reached, a file cannot be read, the
            configuration is not supported, or a tensor is missing, unknown or of another shape.

    Example:
        >>> model = load_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    """
    check_choice("remat", remat, get_args(Remat))
    family, config, source = _open(_resolve(path_or_hub_id, _WEIGHT_PATTERNS))
    with naming(source.path):
        make = family.model(head)
    if labels is not None:
        relabelled = with_labels(config, labels)
        _drop_other_head(source, make, config, labels)
        config = relabelled

    def made() -> PretrainedModel:
        rngs = nnx.Rngs(seed)
        return make(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=rngs)

    def made_quantized() -> PretrainedModel:
        model = made()
        quantize_kernels(model, quantization)
        return model

    model = nnx.eval_shape(made_quantized)
    table = model.table
    graphdef, state = nnx.split(model)
    variables = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}
    parameters = {p: value for p, value in variables.items() if isinstance(value, nnx.Param)}
    absent = _check(parameters, source, table)
    drawn = _drawn(made, [path for path in variables if path in absent or path not in parameters])
    for path, parameter in parameters.items():
        sharding = None if placement is None else placement(table, path, parameter.shape)
        if path in absent:
            value = jax.device_put(np.asarray(drawn[path]), sharding)
        else:
            value = _load_parameter(path, parameter, source, table, sharding)
        if isinstance(parameter, QuantizedParam):
            place = None if placement is None else functools.partial(placement, table)
            value = quantize(value, quantization, name=path, placement=place)
        parameter.set_value(value)
    for path, variable in variables.items():
        if path not in parameters:  # a random stream
            variable.set_value(drawn[path])
    model = nnx.merge(graphdef, state)
    heads = tuple(f"{head}." for head in model.output_modules)
    new = {path.rpartition(".")[0] for path in absent if not path.startswith(heads)}
    if new:
        model.output_modules = (*model.output_modules, *sorted(new))
    if absent:
        model.drawn = tuple(sorted(absent))
        names = ", ".join(table.tensors[path].name for path in model.drawn)
        _log.warning("%s: has no %s; they are drawn", source.path, names)
    model.eval()
    return model


def _drop_other_head(source: _Source, make: Any, config: Any, labels: Sequence[str]) -> None:
    """Takes the head of other labels, whose outputs mean something else, out of a source."""
    known = config.labels
    nameless = known == tuple(f"LABEL_{number}" for number in range(len(labels)))
    if tuple(labels) == known or nameless or len(labels) == len(known) == 1:
        return
    table, heads = make.parameter_table(config), tuple(f"{p}." for p in make.output_modules)
    of_head = {t.name for path, t in table.tensors.items() if path.startswith(heads)}
    if found := of_head & source.shapes.keys():
        _log.warning(
            "%s: its head has the labels %s, and %s are asked for; a new head is drawn",
            *(source.path, shown(list(known)), shown(list(labels))),
        )
    for name in found:
        del source.shapes[name]


def _drawn(make: Callable[[], PretrainedModel], paths: Sequence[str]) -> dict[str, jax.Array]:
    """Computes the initial values of some variables of a model, and not of the others."""
    if not paths:
        return {}

    def draw() -> dict[str, jax.Array]:
        variables = flat_parameters(make())
        return {path: variables[path].get_value() for path in paths}

    drawn: dict[str, jax.Array] = jax.jit(draw)()
    return drawn


def load_model_config(path_or_hub_id: str | os.PathLike[str]) -> tuple[Family, PretrainedConfig]:
    """Reads the family and the configuration of a model, but not its weights.

    Args:
        path_or_hub_id: As for `load_pretrained`, or the path of a `config.json`.

    Returns:
        Its family and its configuration.

    Raises:
        InputError: There is no such model, or its configuration is not supported.
    """
    path = Path(path_or_hub_id)
    if path.suffix != ".json":
        path = _resolve(path_or_hub_id, (_CONFIG_NAME,))
        if (file := _gguf_file(path)) is not None:
            gguf = open_gguf(file)
            return gguf.family, gguf.config
        path /= _CONFIG_NAME
    return _read_config(path)


def stored_dtype(path_or_hub_id: str | os.PathLike[str]) -> np.dtype:
    """Finds the dtype that a model's weights are stored in, from the first of its table.

    Args:
        path_or_hub_id: As for `load_pretrained`.

    Returns:
        The dtype; float32 for a GGUF file, whose weights are dequantized when they are read.

    Raises:
        InputError: There is no such model, or a file cannot be read.
    """
    family, config, source = _open(_resolve(path_or_hub_id, _WEIGHT_PATTERNS))
    table = next(iter(family.models.values())).parameter_table(config)
    first = next(iter(table.tensors.values()))
    region = tuple(slice(0, 1) for _ in source.shapes[first.name])
    return source.read(first.name, region).dtype


def load_tokenizer(path_or_hub_id: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer that belongs to a model.

    Args:
        path_or_hub_id: As for `load_pretrained`.

    Returns:
        A tokenizer of transformers.

    Raises:
        InputError: There is no such model, or it has no tokenizer that can be read.
    """
    path = _resolve(path_or_hub_id, _TOKENIZER_PATTERNS)
    if (file := _gguf_file(path)) is not None:
        with explained(f"{file}: its tokenizer cannot be rebuilt"):
            return gguf_tokenizer(open_gguf(file))
    return folder_tokenizer(path)


def load_processor(
    path_or_hub_id: str | os.PathLike[str],
) -> "PreTrainedTokenizerBase | ImageProcessor":
    """Loads what makes the inputs of a model: its image processor, or its tokenizer.

    Args:
        path_or_hub_id: As for `load_pretrained`.

    Returns:
        An image processor for a model of images, and else a tokenizer of transformers.

    Raises:
        InputError: There is no such model, or its processor cannot be read.
    """
    family, _ = load_model_config(path_or_hub_id)
    if "image-classification" not in family.models:
        return load_tokenizer(path_or_hub_id)
    return ImageProcessor.read(_resolve(path_or_hub_id, (PROCESSOR_NAME,)) / PROCESSOR_NAME)


def merged_parameters(model: PretrainedModel) -> dict[str, nnx.Param[Any]]:
    """Gives the parameters of a model by path; refuses one that has LoRA factors."""
    parameters = flat_parameters(model, nnx.Param)
    for path, parameter in parameters.items():
        if isinstance(parameter, nnx.LoRAParam):
            raise InputError(
                f"{path.rpartition('.')[0]}: still has LoRA factors; merge them before saving"
            )
    return parameters


def save_pretrained(
    folder: str | os.PathLike[str],
    model: PretrainedModel,
    processor: "PreTrainedTokenizerBase | ImageProcessor | None" = None,
    *,
    base_model: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model folder that transformers loads: configuration, safetensors, processor.

    The folder gets its name when it is complete. With several processes, all of them call this, and
    the first one writes.

    Args:
        folder: Folder to write to; it must not exist, or be empty.
        model: A model without LoRA layers; parameters are stored in their dtype.
        processor: Tokenizer or image processor to write beside the weights.
        base_model: The model that it was made from, as for `load_pretrained`. Its
            generation_config.json, which holds stop tokens, is copied if there is one.

    Raises:
        InputError: The folder is not empty, the model still has LoRA layers, or there is no such
            base model.
    """
    folder = Path(folder)
    parameters = merged_parameters(model)
    if jax.process_index() > 0:
        # Every process takes part in gathering each of them.
        for _ in hf_tensors(parameters, model.table):
            pass
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder")
    with new_folder(folder) as partial:
        config = model.config.to_hf()
        config["architectures"] = [model.architecture]
        # transformers loads all of them in this one.
        config["torch_dtype"] = str(jnp.result_type(*{p.dtype for p in parameters.values()}))
        (partial / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shapes = {
            name: (shape, np.dtype(parameter.dtype))
            for path, parameter in parameters.items()
            for name, shape in model.table.names(path, parameter.shape).items()
        }
        tensors = hf_tensors(parameters, model.table)
        write_checkpoint(partial, shapes, tensors, max_shard_bytes=_MAX_SHARD_BYTES)
        if base_model is not None:
            generation = inside(_resolve(base_model, _WEIGHT_PATTERNS), _GENERATION_NAME)
            if generation.is_file():
                shutil.copy(generation, partial)
        if processor is not None:
            processor.save_pretrained(str(partial))


def _resolve(path_or_hub_id: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """Gives an existing path as it is, and downloads anything else that can be a hub id."""
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
    """Gives the GGUF file that `path` is, or that a folder without `config.json` holds."""
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


def _open(path: Path) -> _Opened:
    if (file := _gguf_file(path)) is not None:
        if file.suffix != ".gguf":
            raise InputError(f"{file}: expected a folder or a .gguf file")
        gguf = open_gguf(file)
        return _Opened(gguf.family, gguf.config, _Renamed(gguf, gguf.family))
    if (path / ADAPTER_CONFIG_NAME).exists():
        raise InputError(
            f"{path}: holds {ADAPTER_CONFIG_NAME} beside {_CONFIG_NAME}, so that transformers "
            "would load another model, which that names; expected a model alone"
        )
    family, config = _read_config(path / _CONFIG_NAME)
    if (path / _GENERATION_NAME).exists():
        generation = read_json(inside(path, _GENERATION_NAME), most_bytes=MOST_CONFIG)
        ends = generation.get("eos_token_id")
        # Transformers generates by these, whatever the model's configuration says.
        if ends is not None:
            with (
                explained(f"{path / _GENERATION_NAME}: cannot be read as a configuration"),
                naming(path / _GENERATION_NAME),
            ):
                config = with_end_tokens(config, ends)
    # If there are both, transformers reads the single file too.
    one, index = path / FILE_NAME, path / INDEX_NAME
    if one.exists() and index.exists():
        _log.warning("%s: read from %s, as transformers does, not by its index", path, FILE_NAME)
    source = Safetensors(index if index.exists() and not one.exists() else one)
    return _Opened(family, config, _Renamed(source, family))


def _read_config(path: Path) -> tuple[Family, PretrainedConfig]:
    content = read_json(inside(path.parent, path.name), most_bytes=MOST_CONFIG)
    if (name := content.get("transformers_weights")) is not None:
        raise InputError(
            f"{path}: transformers_weights is {shown(name)}, which is not supported; expected "
            f"weights in {FILE_NAME} or named by {INDEX_NAME}"
        )
    with explained(f"{path}: cannot be read as a configuration"), naming(path):
        family = family_of(content.get("model_type"))
        return family, family.config.from_hf(content)


def _check(parameters: Mapping[str, Any], source: _Source, table: ParameterTable) -> set[str]:
    """Checks that the source has exactly the expected tensors, in their shapes.

    Returns:
        Paths of the optional parameters that the source lacks.
    """
    absent: set[str] = set()
    expected: set[str] = set()
    for path, parameter in parameters.items():
        names = table.names(path, parameter.shape)
        expected.update(names)
        if table.tensor(path).optional and not source.shapes.keys() & names.keys():
            absent.add(path)
            continue
        for name, shape in names.items():
            found = source.shapes.get(name)
            if found is None:
                raise InputError(
                    f"{source.path}: tensor {name!r} is missing, expected shape {shape}"
                )
            if found != shape:
                raise InputError(
                    f"{source.path}: tensor {name!r} has shape {found}, expected {shape} from the "
                    "configuration"
                )
    tied = {tensor.tied: tensor.name for tensor in table.tensors.values() if tensor.tied}
    for name in source.shapes.keys() - expected:
        if name not in tied:
            raise InputError(
                f"{source.path}: tensor {name!r} of shape {source.shapes[name]} is not part of the "
                "configured model"
            )
        if not np.array_equal(source.read(name), source.read(tied[name])):
            raise InputError(
                f"{source.path}: tensor {name!r} differs from the embedding, but the "
                "configuration ties the two (tie_word_embeddings)"
            )
    return absent


def _load_parameter(
    path: str,
    parameter: Any,
    source: _Source,
    table: ParameterTable,
    sharding: Sharding | None,
) -> jax.Array:
    if sharding is None:
        everything = tuple(slice(0, size) for size in parameter.shape)
        return jnp.asarray(_read_shard(path, parameter, source, table, everything))
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
        assert index is not None
        bounds = tuple(
            axis.indices(size)[:2] for axis, size in zip(index, parameter.shape, strict=True)
        )
        devices.setdefault(bounds, []).append(device)
    shards = []
    for bounds, copies in devices.items():
        region = tuple(slice(*bound) for bound in bounds)
        values = _read_shard(path, parameter, source, table, region)
        shards += [jax.device_put(values, device) for device in copies]
        jax.block_until_ready(shards)  # before the next shard takes memory
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)


def _read_shard(
    path: str, parameter: Any, source: _Source, table: ParameterTable, index: Sequence[slice]
) -> np.ndarray:
    """Reads a region of one of our parameters in all its layers, transposed and cast."""
    values = np.empty([axis.stop - axis.start for axis in index], parameter.dtype)
    names, tensor = list(table.names(path, parameter.shape)), table.tensor(path)
    layers = values if tensor.stacked else values[None]
    if tensor.stacked:
        names, index = names[index[0]], index[1:]
    order = tensor.stored_axes(len(index))
    for layer, name in zip(layers, names, strict=True):
        read = source.read(name, tuple(index[axis] for axis in order))
        layer.transpose(order)[...] = read
    return values


def hf_tensors(
    parameters: Mapping[str, Any], table: ParameterTable
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields a model's parameters as Hugging Face's tensors.

    Args:
        parameters: Variables by dotted path.
        table: Of the model.

    Yields:
        Names and arrays, in the order of the parameters and, for each, of the layers.
    """
    for path, parameter in parameters.items():
        # Indexing dequantizes a quantized kernel.
        values, tensor = gather_to_host(parameter[...]), table.tensor(path)
        layers = values if tensor.stacked else values[None]
        for layer, name in zip(layers, table.names(path, parameter.shape), strict=True):
            yield name, layer.transpose(tensor.stored_axes(layer.ndim))
