"""The configuration of a fine-tuning run: nested dataclasses, for Python, YAML and the shell.

A command-line flag has the name of its field, without the name of its section. The exceptions are
`data` and `mesh`, whose flags keep it, and fields that name their flag themselves.
"""

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from loft_jax.data import DataConfig
from loft_jax.errors import InputError, shown
from loft_jax.methods import LoFT, Method
from loft_jax.models import Quantization, Remat
from loft_jax.settings import check_settings
from loft_jax.tasks.registry import TaskName
from loft_jax.tasks.task import ClassWeights

Precision = Literal["auto", "float32", "bfloat16"]

# What a resumed run may change: fields that do not affect what is learned (free), and paths whose
# content is known to be the same (place).
_FREE = {"resume": "free"}
_PLACE = {"resume": "place"}

_FLAT = arg(name="")


def check_output(folder: str) -> None:
    """Refuses an output folder that could not be written to at the end of a run.

    Args:
        folder: As the user gives it.

    Raises:
        InputError: It is a bucket, begins with the `~` of a home folder, or its name is not UTF-8,
            which writers of weights need.

    Example:
        >>> check_output("gs://bucket/run")
        Traceback (most recent call last):
        loft_jax.errors.InputError: output is 'gs://bucket/run', expected a folder; mount the bucket
    """
    _check_name(folder)
    if folder != (home := os.path.expanduser(folder)):
        raise InputError(f"output is {shown(folder)}, and only shells read the ~; expected {home}")


def _check_name(folder: str) -> None:
    """Refuses what no run can have been written to."""
    if "://" in folder:
        raise InputError(f"output is {shown(folder)}, expected a folder; mount the bucket")
    if any("\ud800" <= letter <= "\udfff" for letter in folder):  # Python's for other bytes
        raise InputError(f"output is {shown(folder)}, expected a name in UTF-8")


@dataclass(frozen=True)
class ModelConfig:
    """The base model of a run.

    Args:
        path: A folder with config.json and safetensors, a GGUF file, or a Hugging Face hub id. If
            the model is given as an object, in Python, the name that the adapter has for its base.
        dtype: Dtype of the model's computation; "auto" is bfloat16 on accelerators, float32 on
            CPUs.
        param_dtype: Dtype that frozen weights are stored in; "auto" is `dtype`. Trained weights are
            always float32.
        quantization: Storage of the weights of the base model's linear layers: as they are, as
            8-bit integers with a scale for each output, or as QLoRA's 4-bit NormalFloats with a
            scale for every 64 inputs. Needs the extra `quantized`; not for method "full".
        remat: What the backward pass recomputes: "none", "dots" (all but the outputs of linear
            layers) or "full" (whole layers). More recomputation takes less memory and more time.

    Raises:
        InputError: A value is out of its range.
    """

    path: Annotated[str, arg(name="model")] = field(default="", metadata=_PLACE)
    dtype: Precision = "auto"
    param_dtype: Precision = "auto"
    quantization: Quantization = "none"
    remat: Remat = field(default="dots", metadata=_FREE)

    def __post_init__(self) -> None:
        check_settings(self, "model")


_LAYERS = re.compile(r"(-?\d{1,6})(?:-(-?\d{1,6}))?")
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class AdapterConfig:
    """The adapters of a run; the method may set further options of them.

    Args:
        adapter: Folder of a PEFT adapter to go on from. It decides on rank, alpha, modules and
            layers, rsLoRA and DoRA; of the settings below, `dropout` remains.
        rank: Rank of the adapters, by default 16.
        alpha: LoRA's alpha; the scaling is alpha / rank. By default the rank, for a scaling of 1.
            LoFT does not depend on it.
        target_modules: Names of the modules that get an adapter, one regular expression, or
            "all-linear".
        exclude_modules: Names of modules that get no adapter.
        layers: Numbers of the layers that get an adapter, such as "0-5,-1": the first six and the
            last. Negative numbers count from the last layer. By default all.
        dropout: Dropout on the input of the adapters.
        rank_pattern: Ranks of modules whose name matches a pattern.
        alpha_pattern: Alphas of modules whose name matches a pattern.
        init: Initial factors: A uniform ("kaiming_uniform") or normal ("gaussian") and B zero; or
            both uniform and of similar size ("balanced"), with their initial product subtracted, so
            that RefLoRA needs no warmup.

    Raises:
        InputError: A value is out of its range.
    """

    adapter: str = field(default="", metadata=_PLACE)
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    layers: str = ""
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: Literal["kaiming_uniform", "gaussian", "balanced"] = "kaiming_uniform"

    def __post_init__(self) -> None:
        check_settings(self, "lora", fractions=["dropout"])
        # The command line builds a configuration before it has parsed its values.
        if isinstance(self.layers, str):
            self.layer_numbers()

    def layer_numbers(self) -> tuple[int, ...] | None:
        """Reads the numbers of `layers`.

        Returns:
            Each number, of ranges too; None if all layers get an adapter.

        Raises:
            InputError: The text is not of numbers and ranges.

        Example:
            >>> AdapterConfig(layers="0-3,-1").layer_numbers()
            (0, 1, 2, 3, -1)
        """
        numbers: list[int] = []
        for part in self.layers.split(",") if self.layers else ():
            found = _LAYERS.fullmatch(part.strip())
            first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
            if first > last or (first < 0) != (last < 0) or last - first > _MOST_LAYERS:
                raise InputError(
                    f"lora.layers is {shown(self.layers)}, expected numbers and ranges such as "
                    "'0-5,-1'"
                )
            numbers += range(first, last + 1)
        return tuple(numbers) or None


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings that the optimizers of all methods have in common.

    Args:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay; it is multiplied by the learning rate.
        max_grad_norm: Clips gradients to this global norm; 0 does not clip. With LoFT, it is the
            norm of the projected gradients of the full weights.
        offload: Keep the optimizer state in host memory between updates.
        max_skipped_steps: Stop with an error after this many consecutive steps whose loss or
            gradient is not finite. Such a step changes nothing but this count.

    Raises:
        InputError: A value is out of its range.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    offload: Annotated[bool, arg(name="offload-optimizer")] = field(default=False, metadata=_FREE)
    max_skipped_steps: int = field(default=10, metadata=_FREE)

    def __post_init__(self) -> None:
        least = {"eps": 0, "weight_decay": 0, "max_grad_norm": 0, "max_skipped_steps": 1}
        check_settings(self, "optimizer", at_least=least, fractions=["b1", "b2"])


@dataclass(frozen=True)
class ScheduleConfig:
    """The number of steps of a run, their rows and their learning rates.

    Args:
        learning_rate: Peak learning rate.
        shape: The learning rate after the warmup: cosine or linear decay to zero, or constant.
        warmup_steps: Number of steps of linear warmup, the first of which has
            `learning_rate / warmup_steps`; at most those of the run.
        steps: Number of optimizer steps; with 0 it follows from `epochs`.
        epochs: Number of passes over the data, if `steps` is 0.
        batch_size: Number of rows in a step.
        accumulation_steps: Number of parts of a batch, computed one after another to save memory.

    Raises:
        InputError: A value is out of its range.
    """

    learning_rate: float = 3e-4
    shape: Annotated[Literal["cosine", "linear", "constant"], arg(name="schedule")] = "cosine"
    warmup_steps: int = 0
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 16
    accumulation_steps: int = field(default=1, metadata=_FREE)

    def __post_init__(self) -> None:
        least = {"warmup_steps": 0, "steps": 0, "batch_size": 1, "accumulation_steps": 1}
        check_settings(self, "schedule", at_least=least, positive=["learning_rate", "epochs"])
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                f"schedule.batch_size is {shown(self.batch_size)}, not a multiple of "
                f"accumulation_steps {shown(self.accumulation_steps)}"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """The evaluation of a run on held-out examples.

    Args:
        path: Held-out examples, in the format of the training data. If it is empty, there is no
            evaluation, unless the data are the folder of a preset, which has them.
        split: Split of the held-out examples; by default "train", or that which the preset is
            evaluated on.
        choices: Answers to compare on the held-out examples; evaluation then also reports the
            accuracy of the likeliest answer. For tasks with one answer from a fixed set of labels.
        batch_size: Number of rows computed at once in evaluation.
        every: Number of steps between evaluations; 0 evaluates only before and after training.
        patience: End the run after this many evaluations in a row that are no better than the best
            one before, by `best_metric` of the checkpoints; 0 never does.
        sample_prompts: Prompts that the model continues at every evaluation; the texts are logged
            and written to `samples.jsonl`.

    Raises:
        InputError: A value is out of its range.
    """

    path: Annotated[str, arg(name="eval-path")] = field(default="", metadata=_PLACE)
    split: Annotated[str | None, arg(name="eval-split")] = field(default=None, metadata=_PLACE)
    choices: tuple[str, ...] = ()
    batch_size: Annotated[int, arg(name="eval-batch-size")] = field(default=16, metadata=_FREE)
    every: Annotated[int, arg(name="eval-every")] = 0
    patience: int = 0
    sample_prompts: tuple[str, ...] = field(default=(), metadata=_FREE)

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "every": 0, "patience": 0}
        check_settings(self, "evaluation", at_least=least)
        if self.patience and not self.every:
            raise InputError(
                f"evaluation.patience is {shown(self.patience)}, but evaluation.every is 0; "
                "expected a number of steps between evaluations"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints of a run are saved and kept.

    Args:
        save_every: Number of steps between checkpoints.
        keep_last: Number of the newest checkpoints to keep.
        keep_best: Number of checkpoints with the best evaluations to keep in addition. If it is not
            0, each evaluation saves a checkpoint.
        best_metric: The metrics whose mean decides which evaluation is the best: the lowest loss,
            or the highest value of others. By default those of the preset, or else accuracy for
            classification and the loss for other tasks.

    Raises:
        InputError: A value is out of its range.
    """

    save_every: int = field(default=100, metadata=_FREE)
    keep_last: int = field(default=2, metadata=_FREE)
    keep_best: int = field(default=1, metadata=_FREE)
    best_metric: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"save_every": 1, "keep_last": 1, "keep_best": 0}
        check_settings(self, "checkpoint", at_least=least)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one of them may be -1 for all remaining devices.

    Args:
        data: Number of copies of the model.
        fsdp: Number of devices over which the weights and the rows of one copy are split.
        tensor: Number of devices over which each product with a weight is split.

    Raises:
        InputError: A size that is neither positive nor -1, or more than one -1.

    Example:
        >>> MeshConfig(tensor=2).sizes(8)
        (1, 4, 2)
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_settings(self, "mesh")
        given = dataclasses.asdict(self)
        for name, size in given.items():
            if size != -1 and size < 1:
                raise InputError(f"mesh: {name} is {shown(size)}, expected a positive number or -1")
        if (open_ := [name for name, size in given.items() if size == -1])[1:]:
            raise InputError(f"mesh: {' and '.join(open_)} are -1, expected one of them at most")

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Gives the sizes of (data, fsdp, tensor) on a number of devices.

        Raises:
            InputError: The sizes do not make up that number.
        """
        given = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in given if size != -1)
        filled = tuple(devices // known if size == -1 else size for size in given)
        if math.prod(filled) != devices:
            raise InputError(
                f"mesh: data {self.data}, fsdp {self.fsdp}, tensor {self.tensor} do not make up "
                f"{devices} devices"
            )
        return filled  # type: ignore[return-value]  # as many as were given


@dataclass(frozen=True)
class LoggingConfig:
    """What a run logs.

    Args:
        log_every: Number of steps between lines of metrics.
        wandb: Weights & Biases project to report to in addition; empty for none. Needs the extra
            `wandb`.
        profile_steps: First and last step of a JAX trace, written to `profile/`; empty for none.

    Raises:
        InputError: A value is out of its range.
    """

    log_every: int = 10
    wandb: str = ""
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self, "logging", at_least={"log_every": 1})
        steps = self.profile_steps
        if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise InputError(
                f"logging.profile_steps is {shown(list(steps))}, expected a first and a last step"
            )


@dataclass(frozen=True)
class ExportConfig:
    """How the trained adapter or model is written at the end of a run.

    Args:
        base_model_name: Name of the base model in the adapter, for PEFT to find it; by default the
            path of the model. Of use where that is a GGUF file or a folder of this machine.
        push_to_hub: Repository of the Hugging Face hub, such as "org/name", to upload the folder
            to; empty for none. A new repository is private.
    """

    base_model_name: str = ""
    push_to_hub: str = ""

    def __post_init__(self) -> None:
        check_settings(self, "export")


@dataclass(frozen=True)
class TaskConfig:
    """What is learned.

    Args:
        name: "causal-lm" predicts the next token. "choice" does too, and its evaluation asks which
            of several answers is the likeliest. "classification" predicts one of several labels,
            "regression" a number, "image-classification" a label of an image. "auto" is the only
            task that fits both the rows and the model.
        label_names: Names of the labels for classification, in the order of the logits; by default
            those of the training rows.
        class_weights: Weights of the labels in the training loss of classification, in the same
            order. The loss is the sum of weighted losses over the sum of weights, as in torch's
            `CrossEntropyLoss`. "balanced" weighs a label by n / (labels * n_label) for its n_label
            of n training rows, as scikit-learn does. Evaluation weighs all rows alike.

    Raises:
        InputError: A value is out of its range.
    """

    name: Annotated[TaskName, arg(name="task")] = "auto"
    label_names: tuple[str, ...] = ()
    class_weights: ClassWeights = ()

    def __post_init__(self) -> None:
        check_settings(self, "task")
        if self.class_weights != "balanced" and any(x <= 0 for x in self.class_weights):
            raise InputError(
                f"task.class_weights are {shown(list(self.class_weights))}, expected positive "
                "numbers, or balanced"
            )


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run.

    Args:
        model: The base model.
        data: The training examples.
        output: Folder of the run: configuration, metrics, plot, checkpoints, adapter.
        task: What is learned.
        method: What is trained and how: one of `loft_jax.methods`, with its own settings.
            docs/how-to/methods.md describes them all.
        lora: The adapters.
        optimizer: Settings that all methods have in common.
        schedule: Number of steps, rows and learning rates.
        evaluation: The held-out examples.
        checkpoint: Which checkpoints are kept.
        mesh: How the work is split over devices.
        logging: What is logged.
        export: How the result is written.
        seed: Seed of initial factors, data order and dropout.

    Raises:
        InputError: A value is out of its range; the message names the field.

    Example:
        >>> config = FinetuneConfig(
        ...     ModelConfig("org/model"),
        ...     DataConfig("rows.jsonl"),
        ...     "runs/first",
        ...     method=LoFT(second_moment="full"),
        ...     lora=AdapterConfig(rank=8),
        ... )
        >>> config.method.name, config.schedule.learning_rate
        ('loft', 0.0003)
    """

    model: Annotated[ModelConfig, _FLAT]
    data: DataConfig = field(metadata={"places": ("path", "name", "split")})
    output: str = field(metadata=_FREE)
    task: Annotated[TaskConfig, _FLAT] = field(default_factory=TaskConfig)
    method: Annotated[Method, _FLAT] = field(default_factory=LoFT)
    lora: Annotated[AdapterConfig, _FLAT] = field(default_factory=AdapterConfig)
    optimizer: Annotated[OptimizerConfig, _FLAT] = field(default_factory=OptimizerConfig)
    schedule: Annotated[ScheduleConfig, _FLAT] = field(default_factory=ScheduleConfig)
    evaluation: Annotated[EvaluationConfig, _FLAT] = field(default_factory=EvaluationConfig)
    checkpoint: Annotated[CheckpointConfig, _FLAT] = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=_FREE)
    logging: Annotated[LoggingConfig, _FLAT] = field(default_factory=LoggingConfig, metadata=_FREE)
    export: Annotated[ExportConfig, _FLAT] = field(default_factory=ExportConfig, metadata=_FREE)
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, at_least={"seed": 0}, largest=2**32 - 1)
        starts = "init" in self.method.lora or not self.method.adapts
        if starts and self.lora.init != AdapterConfig.init:
            raise InputError(
                f"lora.init is {shown(self.lora.init)}, but method {self.method.name} has a start "
                "of its own"
            )
        if self.lora.adapter and (starts or self.lora.init != AdapterConfig.init):
            why = "has a start of its own" if self.method.adapts else "trains no adapter"
            setting = f"method {self.method.name} {why}" if starts else "lora.init is set too"
            raise InputError(
                f"lora.adapter is {shown(self.lora.adapter)}, but {setting}; expected one of the "
                "two"
            )
        if not self.method.adapts and self.model.quantization != "none":
            raise InputError(
                f"model.quantization is {shown(self.model.quantization)}, but method "
                f"{self.method.name} trains the weights; expected none"
            )
        # The command line builds a configuration before it has parsed the value of `output`.
        if isinstance(self.output, str):
            _check_name(self.output)
