"""The command line: loft-jax finetune | evaluate | generate | export | merge | plan."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import tyro

import loft_jax
from loft_jax.data import DataConfig
from loft_jax.errors import InputError, shown
from loft_jax.models import Quantization, Remat
from loft_jax.streams import readers_may_leave
from loft_jax.training.config import (
    FinetuneConfig,
    MeshConfig,
    Method,
    SecondMoment,
    StateDtype,
    check_output,
)
from loft_jax.training.config_io import config_from_dict, load_config
from loft_jax.training.distributed import (
    DistributedConfig,
    is_main,
    is_of_another_process,
    join,
    leave,
)

if TYPE_CHECKING:
    from loft_jax.models.family import LanguageModel
    from loft_jax.training.loop import RunResult

# Models, optimizers and data are imported by the commands that use them: help comes at once.

_EXIT_INPUT = 2
_EXIT_FAILED = 1
_EXIT_INTERRUPTED = 130
_EXIT_OTHERS = 3


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a model; see the output folder for metrics, plot, checkpoints and adapter."""

    run: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    config: Annotated[str, tyro.conf.arg(metavar="FILE.yaml")] = ""
    """Read settings from a YAML file, as a run's config.yaml; flags go before it."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    distributed: Annotated[DistributedConfig, tyro.conf.arg(name="")] = field(
        default_factory=DistributedConfig
    )
    """Of several processes: where they meet."""

    def __call__(self) -> int:
        """Runs the command; of several processes the first one speaks."""
        from loft_jax.training.loop import finetune

        join(self.distributed)
        if not is_main():
            logging.getLogger("loft_jax").setLevel(logging.ERROR)
        result = finetune(self.run, resume=self.resume)
        return self._report(result) if is_main() else self._code(result)

    def _report(self, result: "RunResult") -> int:
        for name, values in (("before", result.before), ("after", result.after)):
            if values:
                print(f"{name + ':':8}" + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        if result.interrupted:
            print(f"stopped at step {result.steps}; go on with --resume", file=sys.stderr)
        else:
            print(f"trained: {result.trained}")
        return self._code(result)

    def _code(self, result: "RunResult") -> int:
        return _EXIT_INTERRUPTED if result.interrupted else 0


@dataclass(frozen=True)
class Source:
    """A base model, with or without an adapter."""

    model: str = ""
    """Folder, GGUF file or hub id; by default what the adapter's configuration names."""
    adapter: str = ""
    """Folder of a PEFT adapter."""

    @functools.cached_property
    def base(self) -> str:
        """The base model, as it is given or as the adapter named it at first."""
        from loft_jax.hub.peft_load import base_model_of

        if not (self.model or self.adapter):
            raise InputError("neither model nor adapter is given; expected one at least")
        return self.model or base_model_of(self.adapter)

    def load(
        self, *, param_dtype: str = "float32", quantization: Quantization = "none"
    ) -> tuple["LanguageModel", Any]:
        """Loads the base model and puts the adapter on it.

        Args:
            param_dtype: What weights are stored in.
            quantization: What the kernels of the base model are stored in.

        Returns:
            The model, to evaluate, and its tokenizer.

        Raises:
            InputError: One of them cannot be read, they do not fit, or the adapter was replaced by
                one for another base model meanwhile.
        """
        from loft_jax.hub import load_peft_adapter, load_pretrained, load_tokenizer
        from loft_jax.hub.peft_load import base_model_of

        base = self.base
        model = load_pretrained(base, param_dtype=param_dtype, quantization=quantization)
        if self.adapter:
            load_peft_adapter(self.adapter, model)
            if not self.model and (now := base_model_of(self.adapter)) != base:
                raise InputError(
                    f"{self.adapter}: names the base model {shown(now)}, and {shown(base)} before "
                    "that was loaded; expected an adapter that is not being replaced"
                )
        model.eval()
        return model, load_tokenizer(base)


@dataclass(frozen=True)
class Evaluate:
    """Measure a model on examples: loss and perplexity, or accuracy among given answers.

    Prints one line of JSON. What is too large for a number, as the perplexity of a loss of more
    than 700 nats, is null.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    data: DataConfig
    choices: tuple[str, ...] = ()
    """Answers to compare on every example, for accuracy; an example may bring its own instead."""
    batch_size: int = 16
    """Rows computed at once."""
    quantization: Quantization = "none"
    """What the base model's kernels are stored in; an adapter goes with what it was trained on."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.data import eval_batches, load_examples, tokenize
        from loft_jax.tasks.causal_lm import perplexity
        from loft_jax.tasks.choice import bring_choices, score_choices

        rows = load_examples(self.data)
        model, tokenizer = self.source.load(quantization=self.quantization)
        if self.choices or bring_choices(rows):
            scores = score_choices(
                model, tokenizer, rows, self.data, choices=self.choices, batch_size=self.batch_size
            )
            names = ("accuracy", "accuracy_norm", "nll", "count")
            found = {name: getattr(scores, name) for name in names}
        else:
            data = tokenize(rows, tokenizer, self.data, vocab_size=model.config.vocab_size)
            batches = eval_batches(data, self.data, batch_size=self.batch_size)
            measured = perplexity(model, batches)
            found = {**dataclasses.asdict(measured), "perplexity": measured.perplexity}
        if math.isnan(found["nll"]):
            raise InputError(
                "the loss is no number; expected finite weights, in the model and in the adapter"
            )
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in found.items()}))
        return 0


@dataclass(frozen=True)
class Generate:
    """Continue prompts."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    prompt: tuple[str, ...]
    """Texts to continue; `\\n` stands for a line break."""
    max_new_tokens: int = 64
    """Tokens to add to each at the most."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher is more varied."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this much probability."""
    seed: int = 0
    """Of the sampling."""
    quantization: Quantization = "none"
    """What the base model's kernels are stored in; an adapter goes with what it was trained on."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.generation import generate_text

        model, tokenizer = self.source.load(quantization=self.quantization)
        prompts = [prompt.replace("\\n", "\n") for prompt in self.prompt]
        texts = generate_text(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        for prompt, text in zip(prompts, texts, strict=True):
            print(prompt + text)
        return 0


@dataclass(frozen=True)
class Export:
    """Write a checkpoint of a run as a PEFT adapter (or a whole model, for method "full").

    Settings are those that were saved with the checkpoint; of the run's config.yaml only `model`
    counts, the place of the base model, which may have moved.
    """

    run: tyro.conf.Positional[str]
    """Output folder of the run."""
    output: str
    """Folder that `adapter/` or `model/` is written to."""
    checkpoint: str = "last"
    """"last", "best" (lowest evaluation loss), or a step."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.hub import load_tokenizer
        from loft_jax.training.checkpoint import Checkpoints
        from loft_jax.training.model import export_trained, restore_model, trained_with

        check_output(self.output)
        now = load_config(Path(self.run) / "config.yaml")
        checkpoints = Checkpoints(Path(self.run) / "checkpoints", read_only=True)
        step = self._step(checkpoints.steps(), checkpoints.best_step())
        config = trained_with(checkpoints.run_of(step), f"{checkpoints.folder}/{step}")
        # Of what the file says now only the place is taken: the base model may have moved.
        config = dataclasses.replace(config, model=now.get("model", config.model))
        model, task = restore_model(config, checkpoints, step)
        tokenizer = load_tokenizer(config.model)
        Path(self.output).mkdir(parents=True, exist_ok=True)
        trained = export_trained(
            model, tokenizer, config.method, task, self.output, base_model=config.model
        )
        print(trained)
        return 0

    def _step(self, steps: Sequence[int], best: int | None) -> int:
        found: int | None = None
        if self.checkpoint == "last":
            found = max(steps, default=None)
        elif self.checkpoint == "best":
            found = best
        else:
            found = next((step for step in steps if str(step) == self.checkpoint), None)
        if found is None:
            raise InputError(
                f"{self.run}: no checkpoint {shown(self.checkpoint)}; there are those of steps "
                f"{sorted(steps)}, the best being {best}"
            )
        return found


@dataclass(frozen=True)
class Merge:
    """Fold an adapter into its base model and write a whole Hugging Face model."""

    source: Annotated[Source, tyro.conf.arg(name="")]
    output: str
    """Folder to write; must be empty or absent."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """What weights are stored in; "base" is what those of the base model are."""

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.hub import save_pretrained
        from loft_jax.hub.pretrained import stored_dtype
        from loft_jax.lora import merge_lora

        if not self.source.adapter:
            raise InputError("adapter is not given; expected the folder of a PEFT adapter to merge")
        check_output(self.output)
        base = self.source.base
        dtype = str(stored_dtype(base)) if self.dtype == "base" else self.dtype
        model, tokenizer = self.source.load(param_dtype=dtype)
        save_pretrained(self.output, merge_lora(model), tokenizer, base_model=base)
        print(self.output)
        return 0


@dataclass(frozen=True)
class Plan:
    """Compile the train step for TPUs that are not there, and tell what each chip would hold."""

    model: str
    """A config.json, a folder with one, a GGUF file, a hub id, or a well-known name."""
    topology: tuple[str, ...]
    """Slices: generation (v4, v5e, v5p, v6e) and grid of chips, as in v5e:2x4 v5p:2x2x4."""
    method: tuple[Method, ...] = ("lora", "loft")
    """Methods to compare."""
    rank: int = 16
    """Rank of the adapters."""
    batch: str = "16x256"
    """Rows of a step, over all chips, and tokens of a row."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter, as for finetune."""
    second_moment: SecondMoment = "factored"
    """LoFT's second moment."""
    state_dtype: StateDtype = "float32"
    """What LoFT's second moment is stored in."""
    quantization: Quantization = "none"
    """What the base model's kernels are stored in."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the chips share the work."""
    slices: int = 1
    """How many such slices, joined by a slower network."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the memory of the hosts between updates."""
    accumulation_steps: int = 1
    """Parts of the batch, computed one after the other."""
    remat: Remat = "full"
    """What the backward pass computes again: "none", "dots" or "full"."""

    def __call__(self) -> int:
        """Runs the command."""
        import jax
        from tqdm import tqdm

        from loft_jax.training.plan import PlanConfig, check_plan, plan_step, plan_table

        if not (self.topology and self.method):
            raise InputError("topology or method is empty, expected one of each at least")
        jax.config.update("jax_platforms", "cpu")  # compiling must not take a TPU that is there
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        cases = [
            PlanConfig(**{**common, "topology": topology, "method": method})
            for topology in self.topology
            for method in self.method
        ]
        for case in cases:
            check_plan(case)
        plans = []
        try:
            with tqdm(cases, unit="step", disable=len(cases) == 1) as bar:
                for case in bar:
                    bar.set_description(f"{case.topology} {case.method}")
                    plans.append(plan_step(case))
        finally:  # each has taken a minute or more: those that are there are shown
            if plans:
                print(plan_table(plans))
        return 0


_COMMANDS: dict[str, type[Callable[[], int]]] = {
    "finetune": Finetune,
    "evaluate": Evaluate,
    "generate": Generate,
    "export": Export,
    "merge": Merge,
    "plan": Plan,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; mistakes of the user end with a message and exit code 2.

    Args:
        arguments: As typed behind `loft-jax`; by default those of the process.

    Returns:
        The exit code.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with readers_may_leave():
        try:
            with _messages_shown():
                code = _run(name, rest)
            sys.stdout.flush()
            return code
        except (InputError, OSError) as error:
            message, code = str(error), _EXIT_INPUT
        except KeyboardInterrupt:
            message, code = "interrupted", _EXIT_INTERRUPTED
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            if is_of_another_process(error):
                message, code = f"stopped, since another process did: {error}", _EXIT_OTHERS
            else:
                message, code = traceback.format_exc(), _EXIT_FAILED
        print(f"loft-jax {name}: {message}", file=sys.stderr)
        if jax.distributed.is_initialized():
            leave(code)
        return code


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"loft-jax {loft_jax.__version__}")
        return 0
    if name not in _COMMANDS:
        print(_usage(), file=sys.stderr)
        raise InputError(f"unknown command, expected one of {', '.join(_COMMANDS)}")
    command = _COMMANDS[name]
    options: dict[str, Any] = {"args": arguments, "prog": f"loft-jax {name}"}
    if command is Finetune:
        options["default"] = _finetune_default(arguments)
    return tyro.cli(command, **options)()


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
    """Shows what the library reports, as it words it: other libraries set the root's format.

    Orbax and TensorStore tell of every wait, and behind a full disk of all that they raise besides
    what they raise here.
    """
    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    logger, handler = logging.getLogger("loft_jax"), logging.StreamHandler()
    before, hook = (logger.level, logger.propagate), sys.unraisablehook
    sys.unraisablehook = lambda _: None
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _usage() -> str:
    lines = [
        f"  {name:10}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in _COMMANDS.items()
    ]
    return "\n".join(["usage: loft-jax COMMAND [options]; loft-jax COMMAND --help", "", *lines])


def _finetune_default(arguments: Sequence[str]) -> Finetune:
    """Defaults of the flags: those of a --config file, and the dataclasses' own."""
    path = ""
    for flag, value in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if flag == "--config":
            path = value
        elif flag.startswith("--config="):
            path = flag.removeprefix("--config=")
    fields: dict[str, Any] = load_config(path) if path else {}
    required = {"model": tyro.MISSING, "output": tyro.MISSING}
    data = {"path": tyro.MISSING, **fields.get("data", {})}
    run = config_from_dict({**required, **fields, "data": data})
    return Finetune(run=run, config=path)
