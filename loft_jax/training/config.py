"""All that decides a fine-tuning run, in one dataclass for the command line and YAML files."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from loft_jax.data import DataConfig
from loft_jax.errors import InputError, shown
from loft_jax.models import Quantization, Remat

Method = Literal[
    "loft",
    "loft-muon",
    "lora",
    "lora-plus",
    "rslora",
    "dora",
    "lora-fa",
    "pissa",
    "riemannian",
    "altlora-plus",
    "reflora",
    "reflora-s",
    "full",
]
Init = Literal["kaiming_uniform", "gaussian", "balanced"]
Precision = Literal["auto", "float32", "bfloat16"]
SecondMoment = Literal["full", "factored", "diagonal"]
Move = Literal["tangent", "alternate"]
StateDtype = Literal["float32", "bfloat16"]


def check_output(folder: str) -> None:
    """Refuses before any work a folder that nothing could be written to at its end.

    Args:
        folder: As the user gives it.

    Raises:
        InputError: It is a bucket, or its name is no UTF-8, which writers of weights need.

    Example:
        >>> check_output("gs://bucket/run")
        Traceback (most recent call last):
        loft_jax.errors.InputError: output is 'gs://bucket/run', expected a folder; mount the bucket
    """
    if "://" in folder:
        raise InputError(f"output is {shown(folder)}, expected a folder; mount the bucket")
    if any("\ud800" <= letter <= "\udfff" for letter in folder):  # Python's for other bytes
        raise InputError(f"output is {shown(folder)}, expected a name in UTF-8")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh; one of them may be -1 and takes the devices that the others leave.

    Args:
        data: Copies of the model.
        fsdp: Devices that share the weights of one copy and split its rows.
        tensor: Devices that split each product with a weight.

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
        given = dataclasses.asdict(self)
        for name, size in given.items():
            if size != -1 and size < 1:
                raise InputError(f"mesh: {name} is {shown(size)}, expected a positive number or -1")
        if (open_ := [name for name, size in given.items() if size == -1])[1:]:
            raise InputError(f"mesh: {' and '.join(open_)} are -1, expected one of them at most")

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """The sizes of (data, fsdp, tensor) on a number of devices.

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
class FinetuneConfig:
    """A fine-tuning run.

    Args:
        model: A folder with config.json and safetensors, a GGUF file, or a Hugging Face hub id.
        data: The training examples.
        output: Folder of the run: configuration, metrics, plot, checkpoints, adapter.
        eval_path: Held-out examples, in the form of `data`; empty for no evaluation.
        eval_split: Their split.
        choices: Answers to compare on the held-out examples: with them, evaluation also reports the
            accuracy of the likeliest answer. For single-answer tasks with a fixed set of labels.
        method: "loft"; "loft-muon" is LoFT with Muon's direction; "lora" is AdamW on the factors;
            "lora-plus" moves B faster; "rslora" scales by alpha / sqrt(rank); "dora" trains
            magnitudes of the weights' columns besides; "lora-fa" trains B alone; "pissa" starts
            from the largest singular values of the weights; "riemannian" and "altlora-plus"
            precondition the factors' gradients; "reflora" and "reflora-s" balance the factors;
            "full" is AdamW on all weights. docs/methods.md has them all.
        second_moment: LoFT's second moment: "factored" costs next to nothing, in memory and in
            time; "full" is Adam's own, exactly; "diagonal" is Adam's of the factors.
        move: How LoFT's factors move: "tangent" moves both at every step, counting what both can do
            once; "alternate" moves one a step.
        state_dtype: What LoFT's second moment is stored in.
        balance: Whether LoFT keeps the factors balanced, `AᵀA = B Bᵀ`; their product moves as
            without.
        lora_plus_ratio: B's learning rate over A's, for method "lora-plus".
        damping: Added to the Gram matrices that method "riemannian" divides by.
        reflora_warmup_steps: Steps of plain LoRA before methods "reflora" and "reflora-s" balance:
            until then B gets its rank. By default 100, and none with init "balanced".
        init: How factors start: A uniform ("kaiming_uniform") or normal ("gaussian") and B zero; or
            both uniform and alike in size ("balanced"), with the start of their product taken off
            again, as RefLoRA can begin without warmup.
        rank: Rank of the adapters.
        alpha: LoRA's alpha, scaling = alpha / rank; by default the rank, so a scaling of 1. LoFT
            does not depend on it.
        target_modules: Names of the modules that get an adapter, one regular expression, or
            "all-linear".
        exclude_modules: Names of modules that get none.
        dropout: Dropout on the input of the adapters.
        rank_pattern: Ranks of modules whose name matches a pattern.
        alpha_pattern: Alphas of modules whose name matches a pattern.
        learning_rate: Peak learning rate.
        schedule: Course of the learning rate behind the warmup: down to zero by a cosine or a line,
            or constant.
        warmup_steps: Steps of linear warmup from zero.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Adam's epsilon.
        weight_decay: Decoupled weight decay, times the learning rate.
        max_grad_norm: Clips gradients to this global norm; 0 does not clip. With LoFT, the norm of
            the projected gradients of the full weights.
        steps: Optimizer steps; 0 takes as many as `epochs` need.
        epochs: Passes over the data, if `steps` is 0.
        batch_size: Rows in a step.
        accumulation_steps: Parts that the rows of a step are computed in, one after the other.
        eval_batch_size: Rows computed at once in evaluation.
        eval_every: Steps between evaluations; 0 evaluates before and after training only.
        save_every: Steps between checkpoints.
        keep_last: Newest checkpoints to keep.
        keep_best: Checkpoints of the lowest evaluation loss to keep besides; each evaluation then
            saves one.
        log_every: Steps between lines of metrics.
        dtype: What the model computes in; "auto" is bfloat16 on accelerators, float32 on CPUs.
        param_dtype: What frozen weights are stored in; "auto" is `dtype`. Trained weights are
            always float32.
        quantization: What the weights of the base model's linear layers are stored in: as they are,
            8-bit integers with a scale for each output, or 4-bit NormalFloats (QLoRA's) with a
            scale for each 64 inputs. Needs the extra `quantized`; not for method "full".
        remat: What the backward pass computes again: "none", "dots" (all but the outputs of linear
            layers), or "full" (each layer as a whole): less memory, more time.
        mesh: How devices share the work.
        offload_optimizer: Keep the optimizer's state in the memory of the hosts between updates.
        max_skipped_steps: Give up after this many steps in a row whose loss or gradient is not
            finite. Such a step changes nothing but this count.
        profile_steps: First and last step to write a JAX trace of, to `profile/`; empty for none.
        wandb: Weights & Biases project to report to besides; empty for none. Needs the extra
            `wandb`.
        seed: Of initial factors, data order and dropout.

    Raises:
        InputError: A value out of its range; the message names the field.

    Example:
        >>> config = FinetuneConfig("org/model", DataConfig("rows.jsonl"), "runs/first", rank=16)
        >>> config.method, config.learning_rate
        ('loft', 0.0003)
    """

    model: str
    data: DataConfig
    output: str
    eval_path: str = ""
    eval_split: str = "train"
    choices: tuple[str, ...] = ()
    method: Method = "loft"
    second_moment: SecondMoment = "factored"
    move: Move = "tangent"
    state_dtype: StateDtype = "float32"
    balance: bool = False
    lora_plus_ratio: float = 16.0
    damping: float = 1e-6
    reflora_warmup_steps: int | None = None
    init: Init = "kaiming_uniform"
    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 16
    accumulation_steps: int = 1
    eval_batch_size: int = 16
    eval_every: int = 0
    save_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    log_every: int = 10
    dtype: Precision = "auto"
    param_dtype: Precision = "auto"
    quantization: Quantization = "none"
    remat: Remat = "dots"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    offload_optimizer: bool = False
    max_skipped_steps: int = 10
    profile_steps: tuple[int, ...] = ()
    wandb: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "warmup_steps": 0, "steps": 0, "batch_size": 1, "accumulation_steps": 1,
            "eval_batch_size": 1, "eval_every": 0, "save_every": 1, "keep_last": 1, "keep_best": 0,
            "log_every": 1, "max_skipped_steps": 1, "seed": 0, "weight_decay": 0,
            "max_grad_norm": 0, "eps": 0, "reflora_warmup_steps": 0,
        }  # fmt: skip
        for name, known in _NAMED.items():
            if (given := getattr(self, name)) not in known:
                raise InputError(f"{name} is {shown(given)}, expected one of {', '.join(known)}")
        for name, given in _numbers(dataclasses.asdict(self)):
            most = 2**32 - 1 if name == "seed" else 2**31 - 1
            if isinstance(given, int) and abs(given) > most:
                limit = f"at most {most}" if given > 0 else f"at least {-most}"
                raise InputError(f"{name} is {shown(given)}, expected {limit}")
            if isinstance(given, float) and not math.isfinite(given):
                raise InputError(f"{name} is {shown(given)}, expected a finite number")
        for name, low in least.items():
            if (given := getattr(self, name)) is not None and not given >= low:
                raise InputError(f"{name} is {shown(given)}, expected at least {low}")
        for name in ("b1", "b2", "dropout"):
            if not 0 <= (given := getattr(self, name)) < 1:
                raise InputError(f"{name} is {shown(given)}, expected a number in [0, 1)")
        for name in ("learning_rate", "epochs", "lora_plus_ratio", "damping"):
            if not (given := getattr(self, name)) > 0:
                raise InputError(f"{name} is {shown(given)}, expected a positive number")
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                f"batch_size is {shown(self.batch_size)}, not a multiple of accumulation_steps "
                f"{shown(self.accumulation_steps)}"
            )
        for names, methods in _OF_METHODS.items():
            for name in names if self.method not in methods else ():
                if (given := getattr(self, name)) != getattr(type(self), name):
                    raise InputError(
                        f"{name} is {shown(given)}, but only method {' or '.join(methods)} has it"
                    )
        if self.init != "kaiming_uniform" and self.method in ("pissa", "full"):
            raise InputError(
                f"init is {shown(self.init)}, but method {self.method} has a start of its own"
            )
        if self.method == "full" and self.quantization != "none":
            raise InputError(
                f"quantization is {shown(self.quantization)}, but method full trains the weights; "
                "expected none"
            )
        # The command line makes a run before it has read what it is called.
        if isinstance(self.output, str):
            check_output(self.output)
        if self.profile_steps and not (
            len(self.profile_steps) == 2 and 1 <= self.profile_steps[0] <= self.profile_steps[1]
        ):
            raise InputError(
                f"profile_steps is {shown(list(self.profile_steps))}, expected a first and a last "
                "step"
            )
        if self.choices and not self.eval_path:
            raise InputError("choices are given without eval_path, the examples to compare them on")

    @property
    def reflora_warmup(self) -> int:
        """Steps before RefLoRA balances, as they are or by default."""
        if self.reflora_warmup_steps is not None:
            return self.reflora_warmup_steps
        return 0 if self.init == "balanced" else 100


def _numbers(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in the fields of a dataclass, by their names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        else:
            for each in value if isinstance(value, tuple) else (value,):
                if isinstance(each, (int, float)):
                    yield f"{prefix}{name}", each


_OF_METHODS: dict[tuple[str, ...], tuple[Method, ...]] = {
    ("second_moment", "state_dtype", "balance"): ("loft",),
    ("move",): ("loft", "loft-muon"),
    ("lora_plus_ratio",): ("lora-plus",),
    ("damping",): ("riemannian",),
    ("reflora_warmup_steps",): ("reflora", "reflora-s"),
}
"""Settings that the other methods would ignore."""

_NAMED = {
    name: get_args(kind)
    for name, kind in get_type_hints(FinetuneConfig).items()
    if get_origin(kind) is Literal
}
"""Settings that are one of some names, and these."""
