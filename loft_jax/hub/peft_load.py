"""Reads LoRA adapters from folders of Hugging Face PEFT."""

import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.files import inside
from loft_jax.hub.peft_base import check_folder
from loft_jax.hub.peft_config import PeftConfig, Strength
from loft_jax.hub.peft_names import (
    CONFIG_NAME,
    PREFIX,
    WEIGHTS_NAME,
    NameRule,
    listed,
    module_names,
    saved_tensors,
    tensor_name,
)
from loft_jax.hub.safetensors_io import Safetensors
from loft_jax.lora import LoRAConfig, lora_layers
from loft_jax.lora.axes import WeightAxes
from loft_jax.lora.inject import insert_lora
from loft_jax.lora.layers import weight_axes
from loft_jax.lora.targets import is_adaptable, named_modules
from loft_jax.models.family import (
    PretrainedModel,
    flat_parameters,
)

Model = TypeVar("Model", bound=nnx.Module)

_FACTOR = re.compile(
    rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\."
    r"(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embed>[AB])|lora_(?P<dora>magnitude)_vector)"
)
_BASE = re.compile(rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.base_layer\.weight")


def load_peft_adapter(
    folder: str | os.PathLike[str],
    model: Model,
    *,
    hf_name: NameRule | None = None,
    dtype: DTypeLike | None = None,
) -> Model:
    """Reads an adapter in PEFT's format into a model, in place.

    A model without LoRA gets LoRA layers, without dropout, which does not affect what an adapter
    computes. A model with LoRA must have it on the same layers as the adapter, with the same ranks
    and alphas, and with rsLoRA and DoRA if the adapter has them; its factors and magnitudes are
    overwritten. Its initial product must be zero (not "balanced" or "pissa"), since no adapter
    holds another one. If an error is raised, the model is unchanged.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        model: The base model, with or without LoRA.
        hf_name: As in `save_peft_adapter`.
        dtype: Dtype of the factors; by default that of the model's factors, if it has LoRA, and
            else that of the file.

    Returns:
        The same model.

    Raises:
        InputError: The adapter is missing, damaged, not supported, or for another base model; the
            message names the file and the setting, module or tensor. A stack of layers has one rank
            and one alpha, so an adapter that leaves out some of its layers, or adapts them
            differently, is refused.

    Example:
        >>> import tempfile
        >>> from loft_jax import add_lora, save_peft_adapter
        >>> folder = Path(tempfile.mkdtemp())
        >>> base = lambda: nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> save_peft_adapter(folder, add_lora(base(), LoRAConfig(rank=2), rngs=nnx.Rngs(1)))
        >>> list(lora_layers(load_peft_adapter(folder, base())))
        ['layers.0']

    Source:
        PEFT's checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint.
    """
    folder = Path(folder)
    check_folder(folder)
    if not (folder / WEIGHTS_NAME).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(f"{folder}: holds adapter_model.bin, expected {WEIGHTS_NAME}")
    config, file, filled, saved = _read_unchanged(folder, model, _slots(model, hf_name))
    existing = lora_layers(model)
    if existing:
        _check_same_layers(file, config, existing, filled)
    values = {path: _values(file, existing.get(path), f, dtype) for path, f in filled.items()}
    if not existing:
        insert_lora(model, _lora_config(config, filled), rngs=nnx.Rngs(0))
    parameters = flat_parameters(model, nnx.Param)
    for path, stored in saved.items():
        held = jnp.asarray(stored, dtype or stored.dtype)
        sharding = parameters[path].get_value().sharding
        parameters[path].set_value(jax.device_put(held, sharding))
    if isinstance(model, PretrainedModel):
        model.drawn = tuple(path for path in model.drawn if path not in saved)
    layers = lora_layers(model)
    for path, arrays in values.items():
        for name, array in arrays.items():
            getattr(layers[path], name).set_value(array)
    return model


class _Slot(NamedTuple):
    """The place of a module of the file: a layer of the model, and its number in the stack."""

    path: str
    number: int
    layer: Any
    axes: WeightAxes


class _Filled(NamedTuple):
    """The adapter arrays of one layer of the model, by attribute.

    `lora_a (*stack, *in, r)`, `lora_b (*stack, r, *out)`, with DoRA `lora_magnitude
    (*stack, out)`.
    """

    strength: Strength
    arrays: dict[str, np.ndarray]


def _read_unchanged(
    folder: Path, model: nnx.Module, slots: dict[str, _Slot]
) -> tuple[PeftConfig, Safetensors, dict[str, _Filled], dict[str, np.ndarray]]:
    """Reads one adapter consistently, even if another is written to the folder meanwhile.

    A writer removes the configuration, replaces the weights, and then writes its configuration. So
    if both files are the same before and after reading, everything that was read belongs to one
    adapter.
    """
    deadline = time.monotonic() + _SECONDS_OF_WRITING
    while True:
        before = _identity(folder)
        try:
            config = PeftConfig.read(inside(folder, CONFIG_NAME))
            file = Safetensors(folder / WEIGHTS_NAME)
            whole = _whole_parameters(config, model, slots)
            by_module = _by_module(file, slots, {name for name, _ in whole.values()})
            _check_complete(file, config, slots, by_module)
            filled = _filled(file, config, slots, by_module)
            saved = _saved(file, model, whole)
        except InputError:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return config, file, filled, saved
        if time.monotonic() > deadline:
            raise InputError(f"{folder}: is written to all the time, expected an adapter at rest")
        time.sleep(0.05)


_SECONDS_OF_WRITING = 10.0


def _identity(folder: Path) -> list[tuple[int, int, int] | None]:
    """Identifies the files of an adapter, to notice if they are replaced."""
    found: list[tuple[int, int, int] | None] = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            status = (folder / name).stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError:
            found.append(None)
    return found


def _slots(model: nnx.Module, hf_name: NameRule | None) -> dict[str, _Slot]:
    """Maps the name of every module that an adapter of this model could adapt to its place."""
    slots: dict[str, _Slot] = {}
    seen: set[int] = set()
    for path, layer in named_modules(model).items():
        if not is_adaptable(layer) or id(layer) in seen:
            continue
        seen.add(id(layer))
        try:
            axes = weight_axes(layer)
            names = module_names(model, path, axes, hf_name)
        except InputError:
            continue  # it has no name in PyTorch, so no adapter can adapt it
        for index, name in enumerate(names):
            slots[name] = _Slot(path, index, layer, axes)
    return slots


def _whole_parameters(
    config: PeftConfig, model: nnx.Module, slots: dict[str, _Slot]
) -> dict[str, tuple[str, bool]]:
    """Finds the tensors of `modules_to_save` by path of ours, and whether they are transposed."""
    found: dict[str, tuple[str, bool]] = {}
    for name, slot in slots.items():
        if config.is_saved(name):
            found |= saved_tensors(model, slot.path)
    return found


def _saved(
    file: Safetensors, model: nnx.Module, whole: dict[str, tuple[str, bool]]
) -> dict[str, np.ndarray]:
    """Reads the parameters that the file holds whole, in our layout."""
    parameters = flat_parameters(model, nnx.Param)
    values = {}
    for path, (name, transposed) in whole.items():
        if name not in file.shapes:
            name = name.removeprefix(PREFIX)
        if name not in file.shapes:
            raise InputError(
                f"{file.path}: tensor {name!r} is missing, which modules_to_save of {CONFIG_NAME} "
                "names"
            )
        shape = parameters[path].shape
        expected = shape[::-1] if transposed else shape
        if file.shapes[name] != expected:
            raise InputError(
                f"{file.path}: tensor {shown(name)} is {file.shapes[name]}, and the model's is "
                f"{expected}; expected the same labels"
            )
        values[path] = file.read(name).T if transposed else file.read(name)
    return values


def _by_module(
    file: Safetensors, slots: dict[str, _Slot], whole: Collection[str]
) -> dict[str, dict[str, str]]:
    """Groups the names of the tensors by module, as A, B and magnitude."""
    held = {*whole, *(name.removeprefix(PREFIX) for name in whole)}
    by_module: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for tensor in file.shapes:
        if tensor in held:
            continue
        factor, base = _FACTOR.fullmatch(tensor), _BASE.fullmatch(tensor)
        if base:
            _check_base_weight(file, tensor, slots.get(base["module"]))
            continue
        if not factor:
            raise InputError(
                f"{file.path}: tensor {shown(tensor)} is no LoRA factor, not supported"
            )
        module = factor["module"]
        if module not in slots:
            unknown.append(module)
            continue
        layer = slots[module].layer
        fits = isinstance(layer, nnx.Embed) == bool(factor["embed"])
        if factor["dora"]:
            fits = isinstance(layer, nnx.Linear)
        if not fits:
            kind = type(layer).__name__
            raise InputError(
                f"{file.path}: tensor {shown(tensor)} does not fit {shown(module)}, a {kind}"
            )
        key = factor["linear"] or factor["embed"] or factor["dora"]
        by_module.setdefault(module, {})[key] = tensor
    if unknown:
        raise InputError(
            f"{file.path}: the adapter is for another base model: "
            f"this one has no {listed(dict.fromkeys(unknown))}"
        )
    return by_module


def _check_base_weight(file: Safetensors, tensor: str, slot: _Slot | None) -> None:
    """Checks that the embedding that PEFT stores beside its factors is the model's."""
    if slot is not None and not slot.axes.stack:
        embedding = isinstance(slot.layer, nnx.Embed)
        weight = slot.layer.embedding if embedding else slot.layer.kernel
        own = np.asarray(weight[...]).reshape(slot.axes.fan_in, slot.axes.fan_out)
        own = own if embedding else own.T  # (out, in) in PyTorch
        if np.array_equal(file.read(tensor).astype(own.dtype), own):
            return
    raise InputError(f"{file.path}: tensor {shown(tensor)} is a base weight other than the model's")


def _check_complete(
    file: Safetensors,
    config: PeftConfig,
    slots: dict[str, _Slot],
    by_module: dict[str, dict[str, str]],
) -> None:
    if not by_module:
        raise InputError(f"{file.path}: holds no LoRA factors")
    wanted = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    for module, tensors in by_module.items():
        for factor in sorted(wanted - set(tensors)):
            name = tensor_name(module, factor, slots[module].layer)
            raise InputError(f"{file.path}: tensor {name!r} is missing")
        for factor in sorted(set(tensors) - wanted):
            raise InputError(
                f"{file.path}: tensor {shown(tensors[factor])} is of DoRA, "
                f"but use_dora in {CONFIG_NAME} is not true"
            )
    missing = [name for name in slots if config.is_target(name) and name not in by_module]
    if missing:
        raise InputError(
            f"{file.path}: has no factors for {listed(missing)}, "
            f"which target_modules of {CONFIG_NAME} names: damaged, or for another base model"
        )


def _filled(
    file: Safetensors,
    config: PeftConfig,
    slots: dict[str, _Slot],
    by_module: dict[str, dict[str, str]],
) -> dict[str, _Filled]:
    """Reads the factors of every adapted layer of the model, stacked."""
    members: dict[str, dict[int, str]] = {}
    for module in by_module:
        members.setdefault(slots[module].path, {})[slots[module].number] = module
    filled: dict[str, _Filled] = {}
    for path, modules in members.items():
        axes = slots[next(iter(modules.values()))].axes
        for index in range(*axes.stack or (1,)):
            if index not in modules:
                raise InputError(
                    f"{file.path}: has no factors for layer {index} of {path!r}; the model's "
                    f"layers are stacked, so all of them are adapted or none"
                )
        strengths = {config.strength(module): module for module in modules.values()}
        if len(strengths) > 1:
            raise InputError(
                f"{file.path}: rank and alpha differ between layers of {path!r}, "
                + ", ".join(f"{m}: {s.rank} and {s.alpha:g}" for s, m in strengths.items())
                + "; the model's layers are stacked, so they share both"
            )
        strength = next(iter(strengths))
        ordered = [modules[index] for index in sorted(modules)]
        rank = strength.rank
        parts: list[tuple[str, tuple[int, ...], str, tuple[int, ...]]] = [
            # Attribute, its shape, kind of tensor in the file, its shape.
            ("lora_a", axes.a_shape(rank), "A", (rank, axes.fan_in)),
            ("lora_b", axes.b_shape(rank), "B", (axes.fan_out, rank)),
        ]
        if config.use_dora:
            width = (axes.fan_out,)
            parts.append(("lora_magnitude", (*axes.stack, *width), "magnitude", width))
        arrays = {}
        for name, own, part, shape in parts:
            tensors = [by_module[module][part] for module in ordered]
            arrays[name] = _stacked(file, tensors, shape).reshape(own)
        filled[path] = _Filled(strength, arrays)
    return filled


def _stacked(file: Safetensors, tensors: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """Stacks the tensors of one kind, with factors transposed to `(in, r)` or `(r, out)`."""
    for tensor in tensors:
        if file.shapes[tensor] != shape:
            raise InputError(
                f"{file.path}: tensor {shown(tensor)} is {file.shapes[tensor]}, expected {shape} "
                f"by the model's weight and the rank in {CONFIG_NAME}"
            )
    matrices = [file.read(tensor).T for tensor in tensors]
    if len({matrix.dtype for matrix in matrices}) > 1:
        raise InputError(f"{file.path}: dtypes of {listed(tensors)} differ, expected one")
    return np.stack(matrices)


def _check_same_layers(
    file: Safetensors, config: PeftConfig, existing: dict[str, Any], filled: dict[str, _Filled]
) -> None:
    for verb, paths in (
        ("does not adapt", [path for path in existing if path not in filled]),
        ("also adapts", [path for path in filled if path not in existing]),
    ):
        if paths:
            raise InputError(f"{file.path}: {verb} {listed(paths)}, unlike the model's LoRA")
    for path, layer in existing.items():
        if layer.lora_start_a is not None:
            raise InputError(
                f"{path}: the model's LoRA has a start that is not zero, which no adapter holds; "
                f"expected a model without LoRA, or with another init"
            )
        for feature, ours, theirs in (
            ("rsLoRA", layer.lora_rslora, config.use_rslora),
            ("DoRA", layer.lora_magnitude is not None, config.use_dora),
        ):
            if ours != theirs:
                has, lacks = ("adapter", "model") if theirs else ("model", "adapter")
                raise InputError(
                    f"{file.path}: {path} has {feature} in the {has} and not in the {lacks}"
                )
        own, found = Strength(layer.lora_rank, layer.lora_alpha), filled[path].strength
        if own != found:
            raise InputError(
                f"{file.path}: {path} has rank {found.rank} and alpha {found.alpha:g}, "
                f"the model has rank {own.rank} and alpha {own.alpha:g} there"
            )


def _values(
    file: Safetensors, layer: Any, filled: _Filled, dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    """Converts factors to JAX arrays, with the shardings of those that they replace."""
    values = {}
    for name, array in filled.arrays.items():
        old = None if layer is None else getattr(layer, name)[...]
        wanted = jnp.dtype(dtype or (array.dtype if old is None else old.dtype))
        if dtype is None and jnp.promote_types(wanted, array.dtype) != wanted:
            raise InputError(
                f"{file.path}: factors are {array.dtype}, which the model's {wanted} cannot hold; "
                f"pass dtype to round them"
            )
        value = jnp.asarray(array.astype(wanted))
        if value.dtype != wanted:
            raise InputError(
                f"{file.path}: factors are {wanted}, which JAX holds with jax_enable_x64 only; "
                f"pass dtype to round them"
            )
        values[name] = value if old is None else jax.device_put(value, old.sharding)
    return values


def _lora_config(config: PeftConfig, filled: dict[str, _Filled]) -> LoRAConfig:
    return LoRAConfig(
        rank=1,
        target_modules=f"(?:{'|'.join(re.escape(path) for path in filled)})",
        rank_pattern={f"^{re.escape(path)}": f.strength.rank for path, f in filled.items()},
        alpha_pattern={f"^{re.escape(path)}": f.strength.alpha for path, f in filled.items()},
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
