"""All that decides a fine-tuning run, in one dataclass for the command line and YAML files."""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from loft_jax.data import DataConfig
from loft_jax.errors import InputError

Method = Literal["loft", "lora", "full"]
Precision = Literal["auto", "float32", "bfloat16"]
SecondMoment = Literal["full", "factored", "diagonal"]
StateDtype = Literal["float32", "bfloat16"]

# A resumed run may change these: they do not change what is learned.
_FREE_ON_RESUME = {"output", "log_every", "save_every", "keep_last", "keep_best"}


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
        method: "loft"; "lora" is AdamW on the factors; "full" is AdamW on all weights.
        second_moment: LoFT's second moment: "full" is exact, "factored" takes the memory of its
            first moment and no work on whole weights, "diagonal" is Adam's of the factors.
        state_dtype: What LoFT's second moment is stored in.
        balance: Whether LoFT keeps the factors balanced, `AᵀA = B Bᵀ`; their product moves as
            without.
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
        keep_best: Checkpoints of the lowest evaluation loss to keep besides.
        log_every: Steps between lines of metrics.
        dtype: What the model computes in; "auto" is bfloat16 on accelerators, float32 on CPUs.
        param_dtype: What frozen weights are stored in; "auto" is `dtype`. Trained weights are
            always float32.
        remat: Recompute each layer in the backward pass: less memory, more time.
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
    second_moment: SecondMoment = "full"
    state_dtype: StateDtype = "float32"
    balance: bool = False
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
    remat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "warmup_steps": 0, "steps": 0, "batch_size": 1, "accumulation_steps": 1,
            "eval_batch_size": 1, "eval_every": 0, "save_every": 1, "keep_last": 1, "keep_best": 0,
            "log_every": 1, "seed": 0, "weight_decay": 0, "max_grad_norm": 0, "eps": 0,
        }  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {low}")
        for name in ("b1", "b2", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected a number in [0, 1)")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                f"batch_size is {self.batch_size}, not a multiple of accumulation_steps "
                f"{self.accumulation_steps}"
            )
        if self.method != "loft":
            for name, usual in {
                "second_moment": "full", "state_dtype": "float32", "balance": False,
            }.items():  # fmt: skip
                if (given := getattr(self, name)) != usual:
                    raise InputError(f"{name} is {given!r}, but only method loft has it")
        if self.choices and not self.eval_path:
            raise InputError("choices are given without eval_path, the examples to compare them on")


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
                raise InputError(f"mesh: {name} is {size}, expected a positive number or -1")
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


def save_config(config: FinetuneConfig, path: str | os.PathLike[str]) -> None:
    """Writes a configuration as YAML."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the fields that a YAML file sets, checked by name and type.

    Raises:
        InputError: The file cannot be read, is no mapping, sets an unknown field, or sets a field
            to a value of another type than its own.
    """
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}: holds a {type(fields).__name__}, expected fields and values")
    data = fields.get("data", {})
    if not isinstance(data, dict):
        raise InputError(f"{path}: field data is {data!r}, expected a mapping such as path: FILE")
    for name, known, given in (
        ("", FinetuneConfig, fields),
        ("data.", DataConfig, data),
    ):
        names = {f.name for f in dataclasses.fields(known)}
        if unknown := sorted(set(map(str, given)) - names):
            raise InputError(
                f"{path}: unknown field {name}{unknown[0]}; expected some of {sorted(names)}"
            )
        hints = get_type_hints(known)
        for key in given.keys() - {"data"}:
            given[key] = _typed(hints[key], given[key], where=f"{path}: field {name}{key}")
    return fields


def config_from_dict(fields: dict[str, Any]) -> FinetuneConfig:
    """Makes a configuration of plain values, as `config_to_dict` gives them.

    Raises:
        InputError: A field that has no default is missing, or a value is out of its range.
    """
    data = _made(DataConfig, fields.get("data", {}), "data.")
    return _made(FinetuneConfig, {**fields, "data": data})


def config_to_dict(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration in plain values, as JSON and YAML hold them."""
    plain = dataclasses.asdict(config)
    for fields in (plain, plain["data"]):
        fields.update({k: list(v) for k, v in fields.items() if isinstance(v, tuple)})
    return plain


def check_same_run(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with a run under settings that would have made it another one.

    Raises:
        InputError: Names the first field that differs, with both values.
    """
    for name in sorted(saved.keys() | now.keys()):
        if name in _FREE_ON_RESUME or saved.get(name) == now.get(name):
            continue
        was, became = saved.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(became, dict):
            keys = was.keys() | became.keys()
            inner = next(key for key in sorted(keys) if was.get(key) != became.get(key))
            name, was, became = f"{name}.{inner}", was.get(inner), became.get(inner)
        raise InputError(
            f"cannot resume with another {name}: the run was started with {was!r}, now it is "
            f"{became!r}"
        )


def _made(cls: Any, fields: dict[str, Any], prefix: str = "") -> Any:
    for known in dataclasses.fields(cls):
        required = known.default is known.default_factory is dataclasses.MISSING
        if required and known.name not in fields:
            raise InputError(f"field {prefix}{known.name} is missing")
    hints = get_type_hints(cls)
    tuples = {name for name, hint in hints.items() if get_origin(hint) is tuple}
    return cls(**{k: tuple(v) if k in tuples else v for k, v in fields.items()})


_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _typed(hint: Any, value: Any, *, where: str) -> Any:
    """A value that YAML gave, as the type hint of its field has it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in inner:
            return value
        expected = f"one of {list(inner)}"
    elif origin is UnionType:  # of a plain type and None
        (plain,) = set(inner) - {NoneType}
        return None if value is None else _typed(plain, value, where=where)
    elif origin is tuple:
        if isinstance(value, list):
            return [_typed(inner[0], v, where=f"{where}[{i}]") for i, v in enumerate(value)]
        expected = "a list"
    elif origin is dict:
        if isinstance(value, dict):
            return {
                _typed(inner[0], k, where=f"{where}, key {k!r},"): _typed(
                    inner[1], v, where=f"{where}[{k!r}]"
                )
                for k, v in value.items()
            }
        expected = "a mapping"
    else:
        if type(value) is hint:
            return value
        if hint is float and type(value) in (int, str):
            try:
                return float(value)  # YAML 1.1 reads 3e-4 as a text
            except ValueError:
                pass
        expected = _EXPECTED[hint]
    raise InputError(f"{where} is {value!r}, expected {expected}")
