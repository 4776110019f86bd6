"""Reads LoRA adapters from folders of Hugging Face PEFT."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
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
from loft_jax.hub.peft_config import PeftConfig, RankAlpha
from loft_jax.hub.peft_file import AdapterFile, read_unchanged
from loft_jax.hub.peft_names import (
    CONFIG_NAME,
    FACTOR,
    PREFIX,
    WEIGHTS_NAME,
    NameRule,
    Place,
    listed,
    module_names,
    name_rule,
    tensor_name,
    tensor_places,
)
from loft_jax.lora import lora_layers
from loft_jax.lora.axes import WeightAxes
from loft_jax.lora.config import product_scaling
from loft_jax.lora.foreign import foreign_lora
from loft_jax.lora.inject import LayerFactors, insert_lora
from loft_jax.lora.layers import weight_axes
from loft_jax.lora.targets import is_adaptable, named_modules
from loft_jax.models.family import LanguageModel, PretrainedModel, flat_parameters

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nnx.Module)


def load_peft_adapter(
    folder: str | os.PathLike[str],
    model: Model,
    *,
    hf_name: NameRule | str | None = None,
    dtype: DTypeLike | None = None,
    dropout: float = 0.0,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Reads an adapter in PEFT's format into a model, in place.

    A model without LoRA gets LoRA layers. A model with LoRA must have it on the same layers as the
    adapter, with the same ranks and alphas, and with rsLoRA and DoRA if the adapter has them; its
    factors and magnitudes are overwritten. Its initial product must be zero (not "balanced" or
    "pissa"), since no adapter holds another one. If an error is raised, the model is unchanged.

    An adapter may adapt some layers of a stack, and its layers may differ in rank, alpha and dtype.
    Those of one stack have one rank and one alpha here: the largest rank, and the scaling that goes
    with it; smaller factors are filled with zeros, and B has the ratio of the scalings. Modules
    that the adapter holds whole (`modules_to_save`) and biases that it trained (`bias`) replace
    the model's. A head that is tied to the embedding gets a weight of its own if the adapter
    changes one of them alone, as in PEFT. float64 is read as float32, unless JAX has x64.

    Names of tensors may have what wrappers of the trained model add (`_orig_mod.`, `module.`, the
    name of the adapter). Those that PEFT itself would ignore are read, with a warning.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        model: The base model, with or without LoRA.
        hf_name: As in `save_peft_adapter`.
        dtype: Dtype of the factors; by default that of the model's factors, if it has LoRA, and
            else that of the file.
        dropout: Dropout of the LoRA layers that a model without LoRA gets; for training only. A
            model with LoRA keeps its own, and none can be given.
        rngs: As in `add_lora`, for dropout; by default of seed 0.

    Returns:
        The same model.

    Raises:
        InputError: The adapter is missing, damaged, not supported, or for another base model; the
            message names the file and the setting, module or tensor. Or dropout is given for a
            model with LoRA.

    Example:
        >>> import tempfile
        >>> from loft_jax import LoRAConfig, add_lora, save_peft_adapter
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
    rule = name_rule(hf_name)
    for path, kind in foreign_lora(model).items():
        raise InputError(f"{path or 'the model'}: is {kind}; load_peft_factors reads into it")
    existing: dict[str, Any] = lora_layers(model)
    if existing and dropout:
        raise InputError(
            f"dropout is {shown(dropout)}, but the model's LoRA has its own; expected a model "
            "without LoRA"
        )
    with _retied_on_error(model):
        config, file, filled, whole, names = read_unchanged(
            folder, lambda: _read(folder, model, rule)
        )
        if existing:
            _check_same_layers(file, config, existing, filled)
        values = {path: _values(file, existing.get(path), f, dtype) for path, f in filled.items()}
        for path, layer in existing.items():
            for name, array in values[path].items():
                getattr(layer, name).set_value(array)
        if not existing:
            layers = {}
            for path, f in filled.items():
                a, b, *magnitude = values[path].values()
                layers[path] = LayerFactors(*f.rank_alpha, f.numbers, a, b, *magnitude)
            rslora, own = config.use_rslora, rngs or nnx.Rngs(0)
            insert_lora(model, layers, use_rslora=rslora, dropout=dropout, rngs=own)
    file.log_unknown_to_peft()
    parameters = flat_parameters(model, nnx.Param)
    for path, stored in whole.items():
        _set_whole(parameters[path], stored, dtype)
    if isinstance(model, PretrainedModel):
        if brought := whole.keys() & set(model.drawn):
            _log.info("%s: brings %s: what was drawn is replaced", folder, listed(sorted(brought)))
            model.drawn = tuple(path for path in model.drawn if path not in brought)
        model.replaced = tuple(dict.fromkeys((*model.replaced, *names)))
    elif names:
        _log.warning(
            "%s: replaces %s; save_peft_adapter writes them if modules_to_save or bias say so",
            folder,
            listed(names),
        )
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
    (*stack, out)`. `numbers` are those of the adapted layers of a stack, None for all of them.
    """

    rank_alpha: RankAlpha
    numbers: tuple[int, ...] | None
    arrays: dict[str, np.ndarray]


_Whole = dict[str, dict[int | None, np.ndarray]]
"""Parameters that an adapter holds whole, in our layout, by path and number in the stack."""


class _Contents(NamedTuple):
    """What the tensors of a file are: factors by module and kind, and whole ones by name."""

    factors: dict[str, dict[str, str]]
    whole: dict[str, str]


@contextlib.contextmanager
def _retied_on_error(model: nnx.Module) -> Iterator[None]:
    """Takes a head of its own, which reading gave to the model, away again after an error."""
    tied = getattr(model, "tied_modules", ())
    try:
        yield
    except BaseException:
        if isinstance(model, LanguageModel) and tied and not model.tied_modules:
            model.retie()
        raise


def _untie_if_changed(model: nnx.Module, config: PeftConfig, file: AdapterFile) -> None:
    """Gives a tied head a weight of its own, if the adapter changes it or the embedding alone.

    PEFT computes so: factors of a head are not those of the embedding, nor is a saved copy of one.
    """
    if isinstance(model, LanguageModel) and (tied := model.tied_modules):
        head = any(name.startswith(f"{PREFIX}lm_head.") for name in file.shapes)
        if head or any(config.is_saved(model.hf_name(path, None)) for path in tied):
            model.untie()


def _read(
    folder: Path, model: nnx.Module, hf_name: NameRule | None
) -> tuple[PeftConfig, AdapterFile, dict[str, _Filled], _Whole, list[str]]:
    config = PeftConfig.read(inside(folder, CONFIG_NAME))
    file = AdapterFile(folder / WEIGHTS_NAME)
    _untie_if_changed(model, config, file)
    slots, places = _slots(model, hf_name), tensor_places(model)
    contents = _contents(file, config, model, slots, places)
    _check_complete(file, config, model, slots, contents)
    filled = _filled(file, config, slots, contents.factors)
    whole = _whole(file, config, model, places, contents.whole)
    return config, file, filled, whole, list(contents.whole)


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


def _contents(
    file: AdapterFile,
    config: PeftConfig,
    model: nnx.Module,
    slots: dict[str, _Slot],
    places: dict[str, Place],
) -> _Contents:
    """Finds what each tensor is, and refuses those that the model has no place for."""
    contents = _Contents({}, {})
    unknown: list[str] = []
    for tensor in file.shapes:
        if factor := FACTOR.fullmatch(tensor):
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
            contents.factors.setdefault(module, {})[key] = tensor
        elif not any(copy in tensor for copy in _COPIES):
            name = tensor.removeprefix(PREFIX).replace(".base_layer.", ".")
            if name not in places:
                raise InputError(
                    f"{file.path}: tensor {shown(tensor)} is no LoRA factor, not supported"
                )
            if _is_whole(tensor, name, config, model, places[name]) or _is_rounded(
                file, tensor, model, places[name]
            ):
                contents.whole[name] = tensor
    if unknown:
        raise InputError(
            f"{file.path}: the adapter is for another base model: "
            f"this one has no {listed(dict.fromkeys(unknown))}"
        )
    return contents


# With `bias="all"`, PEFT stores biases of a module that is saved whole twice more: those of the
# base, and its own under the name that the wrapper gives them.
_COPIES = (".original_module.", ".modules_to_save.")


def _is_whole(tensor: str, name: str, config: PeftConfig, model: nnx.Module, place: Place) -> bool:
    """Whether a tensor replaces the one of the base."""
    module, _, last = name.rpartition(".")
    if config.is_saved(module):
        return True
    if last == "bias" and config.bias != "none":
        return config.bias == "all" or ".base_layer." in tensor
    # A head that is tied in training is not named beside its embedding.
    return (
        config.ensure_weight_tying
        and ".base_layer." not in tensor
        and place.path.rpartition(".")[0] in getattr(model, "output_modules", ())
    )


def _is_rounded(file: AdapterFile, tensor: str, model: nnx.Module, place: Place) -> bool:
    """Whether the embedding that PEFT stores beside its factors is the model's, but rounded.

    PEFT puts it in the place of the model's, which was loaded in another dtype for training.

    Raises:
        InputError: It is another one.
    """
    value = flat_parameters(model, nnx.Param)[place.path].get_value()
    if isinstance(value, jax.Array):
        own = np.asarray(value if place.number is None else value[place.number])
        own = own.T if place.transposed else own
        if (shape := file.shapes[tensor]) != own.shape:
            raise InputError(
                f"{file.path}: tensor {shown(tensor)} is a base weight of shape {shape}, and the "
                f"model's is {own.shape}; expected the base of its training, with the tokens that "
                "were added to it"
            )
        stored = file.read(tensor)
        if np.array_equal(stored.astype(own.dtype), own):
            return False
        if np.array_equal(own.astype(stored.dtype), stored):
            return True
    raise InputError(f"{file.path}: tensor {shown(tensor)} is a base weight other than the model's")


def _whole(
    file: AdapterFile,
    config: PeftConfig,
    model: nnx.Module,
    places: dict[str, Place],
    tensors: dict[str, str],
) -> _Whole:
    """Reads the parameters that the file holds whole, in our layout."""
    for name in places:
        if config.is_saved(name.rpartition(".")[0]) and name not in tensors:
            raise InputError(
                f"{file.path}: tensor {name!r} is missing, which modules_to_save of {CONFIG_NAME} "
                "names"
            )
    parameters = flat_parameters(model, nnx.Param)
    values: _Whole = {}
    for name, tensor in tensors.items():
        path, number, transposed = places[name]
        shape = parameters[path].shape[0 if number is None else 1 :]
        expected = shape[::-1] if transposed else shape
        if file.shapes[tensor] != expected:
            raise InputError(
                f"{file.path}: tensor {shown(tensor)} is {file.shapes[tensor]}, and the model's is "
                f"{expected}; expected the same labels"
            )
        if not isinstance(parameters[path].get_value(), jax.Array):
            raise InputError(f"{file.path}: tensor {shown(tensor)} cannot replace a quantized one")
        read = file.read(tensor)
        values.setdefault(path, {})[number] = read.T if transposed else read
    return values


def _set_whole(
    parameter: Any, stored: dict[int | None, np.ndarray], dtype: DTypeLike | None
) -> None:
    """Replaces a parameter, or some layers of a stack of them, which keep their dtype.

    A parameter of its own gets, by default, the dtype that holds the old and the new one.
    """
    value = parameter.get_value()
    if None in stored:
        new = stored[None]
        held = jnp.asarray(new, dtype or jnp.promote_types(value.dtype, new.dtype))
    else:
        numbers = jnp.array(list(stored))
        held = value.at[numbers].set(jnp.asarray(np.stack(list(stored.values())), value.dtype))
    parameter.set_value(jax.device_put(held, value.sharding))


def _check_complete(
    file: AdapterFile,
    config: PeftConfig,
    model: nnx.Module,
    slots: dict[str, _Slot],
    contents: _Contents,
) -> None:
    if not contents.factors:
        raise InputError(f"{file.path}: holds no LoRA factors")
    wanted = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    for module, tensors in contents.factors.items():
        for factor in sorted(wanted - set(tensors)):
            embedding = isinstance(slots[module].layer, nnx.Embed)
            name = tensor_name(module, factor, embedding=embedding)
            raise InputError(f"{file.path}: tensor {name!r} is missing")
        for factor in sorted(set(tensors) - wanted):
            raise InputError(
                f"{file.path}: tensor {shown(tensors[factor])} is of DoRA, "
                f"but use_dora in {CONFIG_NAME} is not true"
            )
    heads = tuple(f"{path}." for path in getattr(model, "output_modules", ()))
    missing = []
    for name, slot in slots.items():
        linear = not isinstance(slot.layer, nnx.Embed) and not f"{slot.path}.".startswith(heads)
        if name not in contents.factors and config.is_target(name, linear=linear):
            missing.append(name)
    if missing:
        raise InputError(
            f"{file.path}: has no factors for {listed(missing)}, "
            f"which target_modules of {CONFIG_NAME} names: damaged, or for another base model"
        )


def _filled(
    file: AdapterFile,
    config: PeftConfig,
    slots: dict[str, _Slot],
    factors: dict[str, dict[str, str]],
) -> dict[str, _Filled]:
    """Reads the factors of every adapted layer of the model, stacked.

    The layers of a stack have one rank and one alpha here. If those of the file have several, the
    rank is the largest, with zeros for the others, and B is multiplied to have its scaling.
    """
    members: dict[str, dict[int, str]] = {}
    for module in factors:
        members.setdefault(slots[module].path, {})[slots[module].number] = module
    filled: dict[str, _Filled] = {}
    for path, modules in members.items():
        axes = slots[next(iter(modules.values()))].axes
        numbers = tuple(sorted(modules))
        every = numbers == tuple(range(*axes.stack or (1,)))
        own = axes if every else axes.of_layers(numbers)
        ordered = [modules[number] for number in numbers]
        rank_alphas = [config.rank_alpha(module) for module in ordered]
        rank_alpha = max(rank_alphas, key=lambda each: each.rank)
        a, b, magnitudes = [], [], []
        for module, (rank, alpha) in zip(ordered, rank_alphas, strict=True):
            more = rank_alpha.rank - rank
            tensors = factors[module]
            matrix = _matrix(file, tensors["A"], (rank, axes.fan_in)).T
            a.append(np.pad(matrix, ((0, 0), (0, more))))
            matrix = _matrix(file, tensors["B"], (axes.fan_out, rank)).T
            ratio = product_scaling(rank, alpha, config.use_rslora) / product_scaling(
                *rank_alpha, config.use_rslora
            )
            if ratio != 1:
                matrix = matrix.astype(np.promote_types(np.float32, matrix.dtype)) * ratio
            b.append(np.pad(matrix, ((0, more), (0, 0))))
            if config.use_dora:
                magnitudes.append(_matrix(file, tensors["magnitude"], (axes.fan_out,)))
        arrays = {
            "lora_a": _stacked(a).reshape(own.a_shape(rank_alpha.rank)),
            "lora_b": _stacked(b).reshape(own.b_shape(rank_alpha.rank)),
        }
        if config.use_dora:
            arrays["lora_magnitude"] = _stacked(magnitudes).reshape(*own.stack, axes.fan_out)
        filled[path] = _Filled(rank_alpha, None if every else numbers, arrays)
    return filled


def _matrix(file: AdapterFile, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a tensor of a known shape."""
    if file.shapes[tensor] != shape:
        raise InputError(
            f"{file.path}: tensor {shown(tensor)} is {file.shapes[tensor]}, expected {shape} "
            f"by the model's weight and the rank in {CONFIG_NAME}"
        )
    return file.read(tensor)


def _stacked(layers: list[np.ndarray]) -> np.ndarray:
    """Stacks arrays in a dtype that holds all of them."""
    dtype = functools.reduce(jnp.promote_types, (layer.dtype for layer in layers))
    return np.stack([layer.astype(dtype) for layer in layers])


def _check_same_layers(
    file: AdapterFile, config: PeftConfig, existing: dict[str, Any], filled: dict[str, _Filled]
) -> None:
    for verb, paths in (
        ("does not adapt", [path for path in existing if path not in filled]),
        ("also adapts", [path for path in filled if path not in existing]),
    ):
        if paths:
            raise InputError(f"{file.path}: {verb} {listed(paths)}, unlike the model's LoRA")
    for path, layer in existing.items():
        if layer.lora_numbers != filled[path].numbers:
            raise InputError(
                f"{file.path}: adapts {_layers(filled[path].numbers)} of {path}, "
                f"the model's LoRA {_layers(layer.lora_numbers)}"
            )
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
        own, found = RankAlpha(layer.lora_rank, layer.lora_alpha), filled[path].rank_alpha
        if own != found:
            raise InputError(
                f"{file.path}: {path} has rank {found.rank} and alpha {found.alpha:g}, "
                f"the model has rank {own.rank} and alpha {own.alpha:g} there"
            )


def _layers(numbers: tuple[int, ...] | None) -> str:
    return "all layers" if numbers is None else f"layers {list(numbers)}"


def _values(
    file: AdapterFile, layer: Any, filled: _Filled, dtype: DTypeLike | None
) -> dict[str, jax.Array]:
    """Converts factors to JAX arrays, with the shardings of those that they replace."""
    values = {}
    for name, array in filled.arrays.items():
        old = None if layer is None else getattr(layer, name)[...]
        # As JAX and PEFT read float64, unless JAX is told to hold it.
        own = jax.dtypes.canonicalize_dtype(array.dtype)
        wanted = jnp.dtype(dtype or (own if old is None else old.dtype))
        if dtype is None and jnp.promote_types(wanted, own) != wanted:
            raise InputError(
                f"{file.path}: factors are {own}, which the model's {wanted} cannot hold; "
                f"pass dtype to round them"
            )
        value = jnp.asarray(array.astype(wanted))
        values[name] = value if old is None else jax.device_put(value, old.sharding)
    return values
