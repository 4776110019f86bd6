"""What a run is given as objects in Python, in place of what its configuration names."""

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from loft_jax.data import DataConfig, load_examples
from loft_jax.data.source import GivenData, given_examples
from loft_jax.errors import InputError, shown
from loft_jax.hub import load_model_config, load_processor
from loft_jax.hub.tokenizer_folder import with_template_of
from loft_jax.lora import lora_layers
from loft_jax.models.family import Family, PretrainedConfig, PretrainedModel, flat_parameters
from loft_jax.models.registry import FAMILIES
from loft_jax.tasks.own_loss import RowLoss
from loft_jax.tasks.task import Task
from loft_jax.training.config import FinetuneConfig, ModelConfig
from loft_jax.training.held_out import held_out_data
from loft_jax.training.model import load_base, with_precision
from loft_jax.training.shardings import parameter_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loft_jax.hub.image_processor import ImageProcessor


@dataclass(frozen=True)
class Objects:
    """The objects that a run is given; None for what its configuration names.

    Attributes:
        model: A model without adapters. It is not changed.
        tokenizer: Tokenizer or image processor of the model.
        data: The training examples, as for `loft_jax.data.source.given_examples`.
        held_out: The held-out examples.
        loss: A loss of one's own, for any model.
    """

    model: nnx.Module | None = None
    tokenizer: "PreTrainedTokenizerBase | ImageProcessor | None" = None
    data: "GivenData | None" = None
    held_out: "GivenData | None" = None
    loss: RowLoss | None = None

    def settled(self, config: FinetuneConfig) -> FinetuneConfig:
        """Checks that everything is given once, and resolves the precision of a run.

        Args:
            config: Of the run.

        Returns:
            The configuration; with a model of a family its dtypes are those of the model.

        Raises:
            InputError: Something is missing or given twice, or does not fit the objects.
        """
        if self.loss is not None and self.model is None:
            raise InputError("loss is given without a model; expected an NNX model, as an object")
        _once("data.path", config.data.path, "data", self.data)
        if self.held_out is not None and config.evaluation.path:
            _once("evaluation.path", config.evaluation.path, "held_out", self.held_out)
        if self.model is None:
            _once("model.path", config.model.path, "model", None)
            return with_precision(config)
        if not isinstance(self.model, nnx.Module):
            raise InputError(f"model is {shown(self.model)}, expected an NNX model")
        if layers := lora_layers(self.model):
            raise InputError(
                f"model has an adapter at {next(iter(layers))}, expected one without adapters "
                "(loft_jax.merge_lora or loft_jax.remove_lora)"
            )
        for field in ("dtype", "param_dtype", "quantization", "remat"):
            if (value := getattr(config.model, field)) != getattr(ModelConfig, field):
                raise InputError(
                    f"model.{field} is {shown(value)}, but the model is given as an object, which "
                    "has its own"
                )
        if self.loss is not None:
            return self._with_own_loss(config)
        if not isinstance(self.model, PretrainedModel):
            raise InputError(
                f"model is a {type(self.model).__name__}, which belongs to no family of "
                "loft_jax.models; expected a loss too"
            )
        if not config.model.path and self.tokenizer is None:
            raise InputError(
                "model is given as an object without a tokenizer; expected one, or model.path for "
                "the name of the model that it is of"
            )
        return with_precision(_with_dtypes(config, self.model))

    def _with_own_loss(self, config: FinetuneConfig) -> FinetuneConfig:
        """Refuses what a loss of one's own does not use."""
        task, evaluation = config.task, config.evaluation
        unused = {
            "tokenizer": self.tokenizer,
            "task.name": None if task.name == "auto" else task.name,
            "task.label_names": task.label_names,
            "task.class_weights": task.class_weights,
            "data.preset": config.data.preset,
            "evaluation.choices": evaluation.choices,
            "evaluation.sample_prompts": evaluation.sample_prompts,
        }
        for name, value in unused.items():
            if value is not None and value != ():
                raise InputError(f"{name} is {shown(value)}, and is not used with a loss")
        for field in dataclasses.fields(config.data):
            value = getattr(config.data, field.name)
            of_texts = field.name in ("prompt", "completion", "chat", "max_length")
            if (of_texts or field.name.endswith("_field")) and value != field.default:
                raise InputError(
                    f"data.{field.name} is {shown(value)}, and is not used with a loss; expected "
                    f"{shown(field.default)}, the default"
                )
        if not config.method.adapts and not isinstance(self.model, PretrainedModel):
            raise InputError(
                f"method {config.method.name} writes whole models, of the families of "
                f"loft_jax.models only; model is a {type(self.model).__name__}"
            )
        return with_precision(config)

    def known_model(self, config: FinetuneConfig) -> tuple[Family, PretrainedConfig] | None:
        """Gives the family and the sizes of the model; None with a loss of one's own.

        Args:
            config: Of the run.

        Raises:
            InputError: The model cannot be read, or its class is of no family.
        """
        if self.loss is not None:
            return None
        if self.model is None:
            return load_model_config(config.model.path)
        for family in FAMILIES.values():
            for head, cls in family.models.items():
                if type(self.model) is cls:
                    only = dataclasses.replace(family, models={head: cls})
                    return only, self.model.config
        raise InputError(
            f"model is a {type(self.model).__name__}, expected a model of one of the families "
            f"{', '.join(FAMILIES)}, or a loss too"
        )

    def processor(self, config: FinetuneConfig) -> Any:
        """Gives the tokenizer or image processor; None with a loss of one's own.

        A tokenizer that is not given has the chat template of the adapter that the run goes on
        from, if the adapter has one.
        """
        if isinstance(self.tokenizer, str | os.PathLike):
            raise InputError(
                f"tokenizer is {shown(self.tokenizer)}, expected an object: "
                f"loft_jax.load_tokenizer({str(self.tokenizer)!r})"
            )
        if self.loss is not None or self.tokenizer is not None:
            return self.tokenizer
        processor = load_processor(config.model.path)
        return with_template_of(processor, config.lora.adapter, training=True)

    def examples(self, config: FinetuneConfig, data: DataConfig) -> tuple[Any, Any]:
        """Reads the training examples and the held-out examples.

        Args:
            config: Of the run.
            data: Its data, within the limits of the model.

        Returns:
            Both; None in place of held-out examples that are not there.

        Raises:
            InputError: They cannot be read.
        """
        rows = load_examples(data) if self.data is None else given_examples(self.data, data)
        if self.held_out is not None:
            own = dataclasses.replace(data, split=config.evaluation.split)
            return rows, given_examples(self.held_out, own, "held_out")
        if self.data is not None and not config.evaluation.path:
            return rows, None
        evaluated = held_out_data(config)
        return rows, load_examples(evaluated) if evaluated else None

    def base(self, config: FinetuneConfig, task: Task, mesh: Mesh) -> Any:
        """Gives the base model, on the mesh.

        Args:
            config: Of the run.
            task: Of the run.
            mesh: Of the run.

        Returns:
            A loaded model, or a copy of the given one that shares its arrays.

        Raises:
            InputError: The given model has other labels than the task.
        """
        if self.model is None:
            return load_base(config, task, mesh)
        labels = tuple(getattr(getattr(self.model, "config", None), "labels", ()))
        if task.labels is not None and task.labels != labels:
            raise InputError(
                f"model has the labels {shown(list(labels))}, and the task "
                f"{shown(list(task.labels))}; expected load_pretrained(..., labels=) with these"
            )
        model = nnx.clone(self.model)
        table = getattr(model, "table", None)
        for path, parameter in flat_parameters(model, nnx.Param).items():
            value = parameter.get_value()
            if not config.method.adapts:
                value = jax.tree.map(lambda x: x.astype(jnp.float32), value)
            spec = parameter_spec(path, parameter.shape, table, mesh)
            parameter.set_value(jax.device_put(value, NamedSharding(mesh, spec)))
        return model


def _once(field: str, path: str, name: str, given: Any) -> None:
    """Refuses what is given neither as a path nor as an object, or as both."""
    if not path and given is None:
        raise InputError(f"{field} is empty, expected it, or {name} as an object (in Python)")
    if path and given is not None:
        raise InputError(
            f"{field} is {shown(path)}, and {name} is given as an object; expected one of them"
        )


def _with_dtypes(config: FinetuneConfig, model: Any) -> FinetuneConfig:
    """Gives a configuration the dtypes of a model."""
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    largest = max(
        (x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)), key=lambda x: x.size
    )
    named = dataclasses.replace(
        config.model, dtype=jnp.dtype(model.dtype).name, param_dtype=largest.dtype.name
    )
    return dataclasses.replace(config, model=named)
