"""Writes LoRA adapters as folders of Hugging Face PEFT."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import locked, replacing
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.hub.peft_config import RankAlpha, peft_settings
from loft_jax.hub.peft_factors import Alpha, factor_modules, factor_rank_alphas, factor_tensors
from loft_jax.hub.peft_names import (
    CONFIG_NAME,
    LABELS_NAME,
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
from loft_jax.hub.safetensors_io import write_safetensors
from loft_jax.lora import lora_layers
from loft_jax.lora.foreign import foreign_lora
from loft_jax.lora.layers import weight_axes
from loft_jax.lora.targets import is_adaptable, named_modules, refuse_linen
from loft_jax.models.family import LanguageModel, PretrainedModel, flat_parameters
from loft_jax.optim.pairs import DEFAULT_SPEC, FactorSpec

Bias = Literal["none", "all", "lora_only"]
"""Which biases an adapter holds, as PEFT names them."""


def save_peft_adapter(
    folder: str | os.PathLike[str],
    model: Any,
    *,
    base_model: str | None = None,
    hf_name: NameRule | str | None = None,
    task_type: str | None = "auto",
    modules_to_save: Sequence[str] = (),
    bias: Bias = "none",
    labels: Sequence[str] = (),
    rank: int | None = None,
    alpha: Alpha | None = None,
    embeddings: Sequence[str] = (),
    spec: FactorSpec = DEFAULT_SPEC,
) -> None:
    """Writes LoRA factors as an adapter that PEFT loads: those of a model, or a tree of factors.

    The adapted layers of a stack are written one by one, and weights of more than two axes as
    matrices: A as `lora_A.weight (rank, in)` and B as `lora_B.weight (out, rank)`, in their dtype,
    and DoRA's magnitude as `lora_magnitude_vector (out,)`. `adapter_config.json` is written last,
    so that an incomplete folder is not an adapter. With several processes, all of them call this,
    and the first one writes.

    A layer whose initial product was not zero ("balanced", "pissa") is written as plain LoRA of
    twice its rank, `A B - A0 B0 = (A - A0) B + A0 (B - B0)`, with an alpha that keeps the scaling.
    So any reader computes the same from the unchanged base weights. Such an adapter is loaded as
    plain LoRA.

    What else of the model is not its base's is written whole: the head of a classifier, modules
    that were drawn because the checkpoint lacks them, and what `load_peft_adapter` read whole.

    Factors that `add_lora` did not make are found by their names, as the optimizers find them
    (`find_pairs`): Flax's `nnx.LoRA`, Qwix's, those of hand-written dicts. A tree holds them at
    any depth, beside other leaves, which are ignored. Their values are written as they are: where
    the base weights of the tree differ from PyTorch's by the order or the scale of features, so do
    its factors, and both have to be converted.

    Args:
        folder: Folder to write to; made if missing. An existing adapter is replaced.
        model: A model with LoRA layers; or a tree of factors, such as nested dicts, an `nnx.State`
            or the parameters of a Linen model.
        base_model: Name or path of the base model, for PEFT to find it.
        hf_name: Maps the dotted path of a module and its number in a stack, or None, to its name in
            PyTorch; or the `model_type` of a family, if the paths are those of its model in this
            library. By default `model.hf_name` if the model has it, and else the path itself.
            In a tree, the path of `"a/q/lora_a"` is `"a.q"`, and so are those of
            `"a/q/kernel_lora_a"` (also for `w`, `weight` and `embedding`) and `"a/q/lora/lora_a"`.
        task_type: PEFT's task; None for a base model that is not a transformer. "auto" is that of
            the model's head, and CAUSAL_LM for models that are not of this library.
        modules_to_save: Paths of other modules without LoRA that are written whole.
        bias: Which biases of the model are written too, for a model whose biases are not those of
            its base: `"all"`, or those of the layers with LoRA.
        labels: Names of the labels of a classifier, by default those of its configuration, for a
            file that only this library reads.
        rank: For factors that `add_lora` did not make: the rank that all of them should have. By
            default they have the ranks of their shapes.
        alpha: For these factors, required: the forward pass scales by `alpha / rank`. A number, or
            a function of the dotted path. Flax's `nnx.LoRA` does not scale, so that for it alone
            alpha is known: the rank.
        embeddings: For these factors: the modules, by name in PyTorch, that are embeddings. Those
            of a family are known, and so are factors beside a weight `embedding`.
        spec: For these factors: their names and the axes of stacks; a scaling other than 1 has to
            be `alpha / rank`.

    Raises:
        InputError: The model has no LoRA layer, or one that PEFT's format cannot hold (a stack
            without `hf_name`, a batch axis); only some of its LoRA layers have DoRA or rsLoRA; rank
            or alpha are not those of the factors; a module to save has LoRA; or the folder cannot
            be written. The message names the path.
        ValueError: Half a pair, or shapes that are not those of a pair, as for `find_pairs`.

    Example:
        >>> import tempfile
        >>> from loft_jax import LoRAConfig, add_lora
        >>> folder = Path(tempfile.mkdtemp())
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
        >>> model = add_lora(model, LoRAConfig(rank=2), rngs=nnx.Rngs(1))
        >>> save_peft_adapter(folder, model, base_model="my/base")
        >>> sorted(path.name for path in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
        >>> pair = {"lora_a": np.ones((3, 4, 2)), "lora_b": np.ones((3, 2, 8))}
        >>> save_peft_adapter(
        ...     folder, {"up": pair}, alpha=4, hf_name=lambda path, layer: f"layers.{layer}.{path}"
        ... )

    Source:
        PEFT's checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint.
    """
    refuse_linen(model)
    layers = lora_layers(model) if isinstance(model, nnx.Module) else {}
    rule = name_rule(hf_name)
    if layers:
        _check_no_others(model, rank=rank, alpha=alpha, embeddings=embeddings, spec=spec)
        adapter = _of_layers(model, layers, rule)
    else:
        adapter = _of_factors(model, rank, alpha, rule, embeddings, spec)
    tensors, modules = adapter.tensors, adapter.modules
    heads: dict[str, None] = {}  # in order
    known: PretrainedModel | None = model if isinstance(model, PretrainedModel) else None
    if known is not None:
        modules_to_save = _outermost((*_own_modules(known), *modules_to_save))
        bias = _with_replaced(bias, known, modules)
        if not labels and not isinstance(known, LanguageModel):
            labels = known.config.labels
    if modules_to_save or bias != "none" or (known is not None and known.replaced):
        if not isinstance(model, nnx.Module):
            raise InputError("modules_to_save and bias need the model, and this is a tree")
        whole, heads = _whole(model, modules, modules_to_save, bias)
        tensors |= whole
    if task_type == "auto":
        task_type = "CAUSAL_LM" if known is None else known.task_type
    settings = peft_settings(
        modules,
        adapter.others,
        base_model=base_model,
        task_type=task_type,
        dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        modules_to_save=list(heads),
        bias=bias,
        fan_in_fan_out=_fan_in_fan_out(model, adapter.linear),
    )
    if jax.process_index() == 0:
        write_adapter(Path(folder), settings, tensors, labels)


class _Adapter(NamedTuple):
    """The factors of an adapter, named as PEFT does.

    `others` are the modules without an adapter, None if they are not known, and `linear` the paths
    of those with one that are not embeddings.
    """

    tensors: dict[str, np.ndarray]
    modules: dict[str, RankAlpha]
    others: list[str] | None
    linear: list[str]
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False


def _of_layers(model: nnx.Module, layers: dict[str, Any], hf_name: NameRule | None) -> _Adapter:
    """Names the factors of the layers that `add_lora` made."""
    use_dora = _on_all(layers, "DoRA", lambda layer: layer.lora_magnitude is not None)
    use_rslora = _on_all(layers, "rsLoRA", lambda layer: layer.lora_rslora)
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, RankAlpha] = {}
    for path, layer in layers.items():
        axes = layer.lora_axes(layer)
        names = module_names(model, path, axes, hf_name)
        if layer.lora_numbers is not None:
            names = tuple(names[number] for number in layer.lora_numbers)
        factors = layer.lora_factors()
        rank_alpha = _rank_alpha(layer, factors[0].shape[-1])
        a = gather_to_host(factors[0]).reshape(len(names), axes.fan_in, rank_alpha.rank)
        b = gather_to_host(factors[1]).reshape(len(names), rank_alpha.rank, axes.fan_out)
        embedding = isinstance(layer, nnx.Embed)
        if use_dora:
            magnitude = gather_to_host(layer.lora_magnitude[...]).reshape(len(names), axes.fan_out)
        for index, name in enumerate(names):
            if name in modules:
                raise InputError(f"{path}: its name {name!r} is another layer's too")
            modules[name] = rank_alpha
            for factor, matrix in (("A", a[index].T), ("B", b[index].T)):
                tensor = tensor_name(name, factor, embedding=embedding)
                tensors[tensor] = np.ascontiguousarray(matrix)
            if use_dora:
                tensor = tensor_name(name, "magnitude", embedding=embedding)
                tensors[tensor] = magnitude[index]
    adapted = {id(layer) for layer in layers.values() if layer.lora_numbers is None}
    others = [
        name
        for path, module in named_modules(model).items()
        if id(module) not in adapted
        for name in _names_or_path(model, path, module, hf_name)
        if name not in modules
    ]
    linear = [path for path, layer in layers.items() if not isinstance(layer, nnx.Embed)]
    dropout = max(_dropout_rate(layer) for layer in layers.values())
    return _Adapter(tensors, modules, others, linear, dropout, use_rslora, use_dora)


def _of_factors(
    model: Any,
    rank: int | None,
    alpha: Alpha | None,
    hf_name: NameRule | None,
    embeddings: Sequence[str],
    spec: FactorSpec,
) -> _Adapter:
    """Names the factors of a tree, or of a model that has them of another library."""
    tree = model
    if isinstance(model, nnx.Module):
        if spec == DEFAULT_SPEC and not foreign_lora(model):
            raise InputError("the model has no LoRA layer to save")
        tree = nnx.state(model)
    modules = factor_modules(tree, hf_name or getattr(model, "hf_name", None), spec, embeddings)
    rank_alphas = factor_rank_alphas(model, modules, rank, alpha, spec)
    linear = [module.path for module in modules if not module.embedding]
    return _Adapter(factor_tensors(tree, modules), rank_alphas, None, linear)


def _check_no_others(model: nnx.Module, **given: Any) -> None:
    """Refuses settings and factors that are not of the layers that `add_lora` made."""
    defaults = {"rank": None, "alpha": None, "embeddings": (), "spec": DEFAULT_SPEC}
    for name, value in given.items():
        if value != defaults[name]:
            raise InputError(
                f"{name}: is for factors that add_lora did not make; the LoRA layers of this model "
                "have their own"
            )
    for path, kind in foreign_lora(model).items():
        raise InputError(
            f"{path or 'the model'}: is {kind}, beside LoRA layers of add_lora; expected one of "
            "the two"
        )


def _whole(
    model: nnx.Module, modules: Collection[str], modules_to_save: Sequence[str], bias: str
) -> tuple[dict[str, np.ndarray], dict[str, None]]:
    """Gives the tensors that are written whole, and the names of the modules to save."""
    tensors: dict[str, np.ndarray] = {}
    heads: dict[str, None] = {}
    places, parameters = tensor_places(model), flat_parameters(model, nnx.Param)
    for module in modules_to_save:
        inside = [name for name, place in places.items() if place.path.startswith(f"{module}.")]
        if not inside:
            raise InputError(f"modules_to_save: {shown(module)} has no parameters in the model")
        for name in inside:
            if (adapted := name.rpartition(".")[0]) in modules:
                raise InputError(
                    f"modules_to_save: {shown(module)} has an adapter, on {adapted}; expected "
                    "modules without"
                )
            tensors[PREFIX + name] = _value(parameters, places[name])
            below = places[name].path.count(".") - module.count(".")  # names after the module's
            heads[name.rsplit(".", below)[0]] = None
    for name, place in _replaced(model, places).items():
        module, _, last = name.rpartition(".")
        if last == "bias" or PREFIX + name in tensors:
            continue
        if module in modules:
            name_written = f"{module}.base_layer.{last}"
        else:
            name_written, heads[module] = name, None
        tensors[PREFIX + name_written] = _value(parameters, place)
    for name, place in places.items():
        module, _, last = name.rpartition(".")
        if last == "bias" and module in heads:
            tensors[PREFIX + name] = _value(parameters, place)
        held = module in modules or bias == "all"
        if bias != "none" and last == "bias" and held and PREFIX + name not in tensors:
            layer_name = f"{module}.base_layer" if module in modules else module
            tensors[f"{PREFIX}{layer_name}.bias"] = _value(parameters, place)
    return tensors, heads


def _own_modules(model: PretrainedModel) -> tuple[str, ...]:
    """Gives the paths of the modules that are not the base's: new ones, and a classifier's head."""
    if not isinstance(model, LanguageModel):
        return model.output_modules
    return tuple(path.rpartition(".")[0] for path in model.drawn)


def _outermost(modules: Iterable[str]) -> list[str]:
    """Gives each module once, without those that are part of another."""
    found = dict.fromkeys(modules)
    return [m for m in found if not any(m.startswith(f"{other}.") for other in found)]


def _replaced(model: nnx.Module, places: dict[str, Place]) -> dict[str, Place]:
    """Finds the tensors that an adapter held whole, and heads that are tied to one of them."""
    if not isinstance(model, PretrainedModel):
        return {}
    found = {name: places[name] for name in model.replaced}
    tied = {tensor.name: tensor.tied for tensor in model.table.tensors.values() if tensor.tied}
    return found | {tied[name]: place for name, place in found.items() if name in tied}


def _with_replaced(bias: Bias, model: PretrainedModel, modules: Collection[str]) -> Bias:
    """Gives PEFT's setting for the biases that an adapter held, beside those that are asked for."""
    owners = {name.removesuffix(".bias") for name in model.replaced if name.endswith(".bias")}
    whole = {name.rpartition(".")[0] for name in model.replaced if not name.endswith(".bias")}
    if bias == "all" or owners - whole - set(modules):
        return "all"
    return "lora_only" if owners - whole else bias


def _value(parameters: dict[str, Any], place: Place) -> np.ndarray:
    """Gives a parameter, or one of a stack of them, as PyTorch has it."""
    value = parameters[place.path].get_value()
    value = gather_to_host(value if place.number is None else value[place.number])
    return np.ascontiguousarray(value.T if place.transposed else value)


def _fan_in_fan_out(model: Any, linear: Sequence[str]) -> bool:
    """Whether the adapted weights have the shape `(in, out)` in PyTorch, a setting of PEFT."""
    table = getattr(model, "table", None)
    if table is None or not linear:
        return False
    return not any(table.tensor(table.weight(path)).transposed for path in linear)


def _names_or_path(
    model: nnx.Module, path: str, module: nnx.Module, hf_name: NameRule | None
) -> tuple[str, ...]:
    """Gives the names of a module without LoRA, or its path if it has none in PyTorch."""
    if is_adaptable(module):
        try:
            return module_names(model, path, weight_axes(module), hf_name)
        except InputError:
            pass
    return (path,)


def _on_all(layers: dict[str, Any], feature: str, has: Callable[[Any], bool]) -> bool:
    """Whether the layers have a feature, which must be on all of them or on none."""
    having = [path for path, layer in layers.items() if has(layer)]
    without = [path for path in layers if path not in having]
    if having and without:
        raise InputError(
            f"{feature} is on {listed(having)} and not on {listed(without)}; "
            f"expected it on all LoRA layers or on none, which is all that PEFT's format can say"
        )
    return bool(having)


def _rank_alpha(layer: Any, rank: int) -> RankAlpha:
    """Gives rank and alpha as written: twice the rank, at the same scaling, if there is a start."""
    more = rank // layer.lora_rank
    return RankAlpha(rank, layer.lora_alpha * (math.sqrt(more) if layer.lora_rslora else more))


def _dropout_rate(layer: Any) -> float:
    return 0.0 if layer.lora_dropout is None else layer.lora_dropout.rate


def write_adapter(
    folder: Path,
    settings: dict[str, Any],
    tensors: dict[str, np.ndarray],
    labels: Sequence[str] = (),
) -> None:
    """Writes the files of an adapter, its configuration last.

    Args:
        folder: Made if missing; an existing adapter is replaced.
        settings: Content of `adapter_config.json`.
        tensors: By PEFT's names.
        labels: Names of the labels of a classifier.

    Raises:
        InputError: The folder cannot be written.
    """
    config = folder / CONFIG_NAME
    with explained(f"{folder}: cannot write the adapter"), contextlib.ExitStack() as held:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(locked(folder))
        except BlockingIOError as error:
            raise InputError(f"{folder}: another process is writing an adapter there") from error
        except OSError:  # a file system without locks
            pass
        # An old configuration must not be beside new weights, if this is interrupted or the folder
        # is read meanwhile.
        config.unlink(missing_ok=True)
        write_safetensors(folder / WEIGHTS_NAME, tensors)
        (folder / LABELS_NAME).unlink(missing_ok=True)
        if labels:
            with replacing(folder / LABELS_NAME) as partial:
                partial.write_text(json.dumps(list(labels), ensure_ascii=False) + "\n", "utf-8")
        with replacing(config) as partial:
            partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
