"""The initial model of a run: base weights and adapters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from loft_jax.errors import InputError, shown
from loft_jax.hub import load_pretrained
from loft_jax.hub.peft_names import module_names
from loft_jax.lora import LoRAConfig, add_lora, lora_layers
from loft_jax.methods import Method
from loft_jax.models.family import (
    Family,
    ParameterTable,
    PretrainedConfig,
    PretrainedModel,
    flat_parameters,
    with_labels,
)
from loft_jax.models.quantized import quantize_kernels
from loft_jax.tasks.registry import find_task
from loft_jax.tasks.task import Given, Task
from loft_jax.training.checksum import json_checksum, tree_checksum
from loft_jax.training.config import FinetuneConfig
from loft_jax.training.shardings import parameter_spec
from loft_jax.training.start_adapter import known_labels, load_start

Model = TypeVar("Model", bound=nnx.Module)


def load_model(config: FinetuneConfig, task: Task, mesh: Mesh | None = None) -> PretrainedModel:
    """Loads the base model of a run and adds its initial adapters.

    Args:
        config: Its model, method and adapters are used.
        task: Of the run.
        mesh: As for `load_base`.

    Returns:
        The model, in training mode.
    """
    return adapted(load_base(config, task, mesh), config, task)


def load_base(config: FinetuneConfig, task: Task, mesh: Mesh | None = None) -> PretrainedModel:
    """Loads the base model of a run.

    Args:
        config: Its model, method and seed are used.
        task: Of the run.
        mesh: Mesh that its weights are split over; by default all are on one device.

    Returns:
        The model, without adapters.
    """

    def placement(table: ParameterTable, path: str, shape: tuple[int, ...]) -> Sharding:
        assert mesh is not None
        return NamedSharding(mesh, parameter_spec(path, shape, table, mesh))

    return load_pretrained(
        config.model.path,
        head=task.head,
        labels=task.labels,
        seed=config.seed,
        **_computation(config),
        quantization=config.model.quantization,
        placement=None if mesh is None else placement,
    )


def task_of(
    config: FinetuneConfig,
    family: Family,
    sizes: PretrainedConfig,
    rows: Any = None,
    held_out: Any = None,
) -> Task:
    """Gives the task of a run: the named one, or the one inferred from the rows.

    Args:
        config: Its task and the choices of its evaluation are used.
        family: Of its model.
        sizes: Configuration of its model.
        rows: Training examples.
        held_out: Held-out examples, or None.

    Returns:
        The task. Its labels are in the order of the model's, or of those of the adapter that the
        run goes on from, if these are the same.

    Raises:
        InputError: The rows fit several tasks, or do not fit the named one.
    """
    given = Given(
        config.data,
        rows,
        held_out,
        choices=config.evaluation.choices,
        labels=config.task.label_names,
        class_weights=config.task.class_weights,
        known=known_labels(config) or getattr(sizes, "labels", ()),
    )
    return find_task(config.task.name, family, given).make(given)


def base_fingerprint(base: nnx.Module) -> str:
    """Computes a checksum of a base model, independent of its path and its mesh.

    Args:
        base: As it was loaded; with several processes, all of them call this.

    Returns:
        32 hexadecimal digits, from every bit of its weights as they are stored, and from the
        constants of its forward pass; of a model of no family, from its weights alone.
    """
    constants: dict[str, Any] = {}
    drawn: tuple[str, ...] = ()
    if isinstance(base, PretrainedModel):
        constants, drawn = _constants(base), base.drawn
    # What was drawn trains, and is in the checkpoints; it is not the same on every platform.
    parameters = flat_parameters(base, nnx.Param)
    weights = tree_checksum(
        {path: p.get_value() for path, p in parameters.items() if path not in drawn}
    )
    return json_checksum((constants, weights))


def _constants(base: PretrainedModel) -> dict[str, Any]:
    """Gives the constants of the forward pass of a base model."""
    constants = {k: v for k, v in base.config.to_hf().items() if k not in _NOT_COMPUTED_WITH}
    # Differs with the padding token where positions are counted from it.
    constants["max_length"] = base.config.max_length
    # These may be scaled by the positions of pretraining, which are not constants otherwise.
    if scaling := getattr(base.config, "rope_scaling", None):
        constants["rope_scaling"] = dataclasses.asdict(scaling)
    if farthest := getattr(base.config, "farthest", None):
        constants["farthest"] = farthest
    return constants


_NOT_COMPUTED_WITH = (
    "architectures", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
    "max_position_embeddings",
)  # fmt: skip
"""Fields of a model's configuration that do not change its forward pass."""


def check_fingerprints(saved: Mapping[str, Any], now: Mapping[str, str], *, doing: str) -> None:
    """Refuses a model or examples whose content is not what a run was started with.

    Args:
        saved: The fingerprints in a checkpoint of the run, by field.
        now: The fingerprints of the current content, by field.
        doing: The action to be refused, for the message.

    Raises:
        InputError: A fingerprint differs; the message names its field.
    """
    for name, fingerprint in now.items():
        if saved[name] != fingerprint:
            raise InputError(
                f"cannot {doing} with another {name}: what it holds now is not what the run "
                f"was started with ({_CHANGES[name]})"
            )


_CHANGES = {
    "model": "its weights are others, or its configuration",
    "lora.adapter": "its factors are others, or their scaling",
    "data.path": "its examples are others, or their order or their tokens",
    "evaluation.path": "its examples are others, or their order",
}
"""What changes the fingerprint of a field."""


def abstract_model(
    family: Family, sizes: PretrainedConfig, config: FinetuneConfig, task: Task
) -> PretrainedModel:
    """Makes the model of `load_model` with shapes for arrays; nothing is read or allocated.

    Args:
        family: Of the base model.
        sizes: Configuration of the base model.
        task: Of the run.
        config: As for `load_model`.

    Returns:
        The model, with a `jax.ShapeDtypeStruct` in place of every array.
    """

    def made() -> PretrainedModel:
        labelled = sizes if task.labels is None else with_labels(sizes, task.labels)
        model = family.model(task.head)(labelled, rngs=nnx.Rngs(0), **_computation(config))
        quantize_kernels(model, config.model.quantization)
        return adapted(model, config, task)

    return nnx.eval_shape(made)


def with_precision(config: FinetuneConfig, platform: str | None = None) -> FinetuneConfig:
    """Replaces a precision of "auto" by the dtype that it means on a platform.

    Args:
        config: Its model and method are used.
        platform: JAX's name of the platform; by default that of this machine.

    Returns:
        The same run, with named dtypes, so that it is the same on another machine.
    """
    dtype, param_dtype = config.model.dtype, config.model.param_dtype
    if dtype == "auto":
        dtype = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    if param_dtype == "auto":
        param_dtype = dtype if config.method.adapts else "float32"
    model = dataclasses.replace(config.model, dtype=dtype, param_dtype=param_dtype)
    return dataclasses.replace(config, model=model)


def _computation(config: FinetuneConfig) -> dict[str, Any]:
    """Gives the options of a base model: dtypes and recomputation."""
    model = with_precision(config).model
    param_dtype = model.param_dtype if config.method.adapts else "float32"
    return {"dtype": model.dtype, "param_dtype": param_dtype, "remat": model.remat}


def adapted(model: Model, config: FinetuneConfig, task: Task) -> Model:
    """Adds the initial adapters of a run, or those that it goes on from, to its base model.

    The model is changed in place. A head that is trained beside them is cast to float32.

    Args:
        model: The base model; under `nnx.eval_shape`, of shapes only.
        config: Its method, adapters and seed are used.
        task: Of the run.

    Returns:
        The same model, in training mode; without adapters for a method that trains all weights.

    Raises:
        InputError: The targets are wrong, or inside of a head that trains whole, or the method
            cannot train them, or PEFT's format cannot hold them.
    """
    if config.method.adapts:
        if config.lora.adapter:
            if not isinstance(model, PretrainedModel):
                raise InputError(
                    f"lora.adapter is {shown(config.lora.adapter)}, but the model is of no family, "
                    "whose names adapters have; expected a new adapter"
                )
            load_start(model, config, task)
        else:
            add_lora(model, _lora_config(config), rngs=nnx.Rngs(config.seed))
        layers: dict[str, Any] = lora_layers(model)
        config.method.check_layers(layers)
        outputs = task.head_modules(model)
        for path, layer in layers.items():
            module_names(model, path, layer.lora_axes(layer), None)  # the result is written by them
            if f"{path}.".startswith(tuple(f"{head}." for head in outputs)):
                raise InputError(
                    f"target_modules: {path!r} is of the head, which trains whole; expected it in "
                    "exclude_modules"
                )
        heads = trained_variables(config.method, outputs)
        for _, variable in nnx.to_flat_state(nnx.state(model, heads)):
            variable.set_value(variable.get_value().astype(jnp.float32))
    model.train()
    return model


_RANK = 16
"""The rank of adapters, if it is not set."""


def _lora_config(config: FinetuneConfig) -> LoRAConfig:
    settings: dict[str, Any] = {**vars(config.lora), "layers": config.lora.layer_numbers()}
    del settings["adapter"]
    if config.lora.rank is None:
        settings["rank"] = _RANK
    if len(targets := config.lora.target_modules) == 1:
        settings["target_modules"] = targets[0]  # which may be a pattern
    return LoRAConfig(**{**settings, **config.method.lora})


def trained_variables(method: Method, heads: Sequence[str] = ()) -> Any:
    """Makes the filter of the variables that a run trains.

    Args:
        method: Of the run.
        heads: Paths of the modules that are trained whole beside the adapters.

    Returns:
        A filter for `nnx.split`.
    """
    if not (method.adapts and heads):
        return method.trained
    insides = tuple(f"{head}." for head in heads)

    def in_heads(path: Sequence[Any], value: Any) -> bool:
        return ".".join(map(str, path)).startswith(insides)

    return nnx.Any(method.trained, nnx.All(nnx.Param, in_heads))
