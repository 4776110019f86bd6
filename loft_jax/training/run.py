"""Sets up a run from its configuration: data, model, optimizer, compiled step."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from loft_jax.data import Batch, TokenizedData, train_stream
from loft_jax.data.presets import find_preset
from loft_jax.data.row_formats import are_chats
from loft_jax.errors import InputError, NotFiniteError, explained, shown, size_of
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.lora.targets import scaling_of, stack_axis_of
from loft_jax.models.family import PretrainedModel
from loft_jax.optim import state_bytes
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.tasks.own_loss import OwnLoss
from loft_jax.tasks.task import Measured, Task, within
from loft_jax.training.callbacks import Callback, Callbacks
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import EvaluationConfig, FinetuneConfig
from loft_jax.training.config_io import config_to_dict
from loft_jax.training.distributed import check_same
from loft_jax.training.early_stopping import EarlyStopping
from loft_jax.training.export import export_trained, publish
from loft_jax.training.flops import ModelFlops
from loft_jax.training.held_out import rows_fingerprint
from loft_jax.training.model import (
    abstract_model,
    adapted,
    base_fingerprint,
    check_fingerprints,
    task_of,
    trained_variables,
)
from loft_jax.training.monitor import Speedometer, largest_condition, memory_in_use
from loft_jax.training.objects import Objects
from loft_jax.training.optimizer import make_optimizer, make_schedule
from loft_jax.training.partition import split_model
from loft_jax.training.sample_generations import SampleGenerations
from loft_jax.training.shardings import step_shardings
from loft_jax.training.start_adapter import check_start, start_fingerprint
from loft_jax.training.step import TrainState, initial_state, make_step

_log = logging.getLogger(__name__)


class Run:
    """The parts of a fine-tuning run, laid out on its mesh.

    Attributes:
        config: Its configuration.
        progress: Whether bars are shown.
        task: What is learned.
        steps: Number of steps.
        stream: Training batches.
        parts: The partition of the model; current values of its trained parameters are in a state.
        schedule: Learning rate by step.
        processor: Tokenizer or image processor; None with a loss of one's own.
        chats: Whether examples are conversations, by the chat template.
        callbacks: Those of the configuration and of the user.
        step: The compiled step.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        mesh: Mesh,
        objects: Objects,
        callbacks: Sequence[Callback],
        *,
        progress: bool,
    ) -> None:
        """Loads data and model and places them on the mesh; every process of a run does this.

        Args:
            config: Of the run.
            mesh: Of all devices of the run.
            objects: What is given in place of what the configuration names.
            callbacks: Of the user, called after those of the configuration.
            progress: Show bars.

        Raises:
            InputError: Model, data or targets are not what they should be.
        """
        schedule = config.schedule
        check_start(config)
        self.config = config
        self.progress = progress
        self._mesh = mesh
        self.processor = objects.processor(config)
        known, evaluation = objects.known_model(config), config.evaluation
        self._sizes: Any = known[1] if known else None
        sizes = self._sizes
        vocab_size = sizes.vocab_size if sizes else None
        data = within(config.data, sizes) if sizes else config.data
        rows, held_out = objects.examples(config, data)
        self.task: Task
        if objects.loss is not None:
            self.task = OwnLoss(objects.loss)
        elif known is not None:
            self.task = task_of(config, *known, rows, held_out)
        if evaluation.patience and held_out is None:
            raise InputError(
                f"evaluation.patience is {shown(evaluation.patience)}, but there are no held-out "
                "examples to measure; expected an evaluation.path"
            )
        self._best_metric = config.checkpoint.best_metric
        if self._best_metric and held_out is None:
            raise InputError(
                f"checkpoint.best_metric is {shown(list(self._best_metric))}, but there are no "
                "held-out examples to measure it on; expected an evaluation.path"
            )
        if not self._best_metric and data.preset:
            self._best_metric = find_preset(data.preset).best_metrics
        self.task.check_metrics(self._best_metric)
        if known and config.method.adapts and not config.lora.adapter:
            # Wrong targets are refused before the work of tokenizing.
            abstract_model(*known, config, self.task)
        tokens = self.task.tokenize(rows, self.processor, data, vocab_size=vocab_size)
        if isinstance(tokens, TokenizedData):
            _warn_of_far_positions(int(tokens.lengths.max()), sizes)
        self.stream = train_stream(tokens, data, batch_size=schedule.batch_size, seed=config.seed)
        most = 2**31 - 1  # steps are counted in 32 bits
        self.steps = schedule.steps or math.ceil(
            min(schedule.epochs * self.stream.rows_per_epoch / schedule.batch_size, most + 1)
        )
        if self.steps > most:
            raise InputError(
                f"schedule.epochs is {schedule.epochs}, expected at most {most} steps of them"
            )
        config.method.check_steps(self.steps, config.lora.init)
        self._measure = None
        if held_out is not None:
            self._measure = self.task.evaluation(
                held_out,
                self.processor,
                data,
                batch_size=evaluation.batch_size,
                vocab_size=vocab_size,
                progress=progress,
            )
        self.chats = False
        if isinstance(self.task, CausalLM):
            self.chats = are_chats(rows, self.processor, data)
        if isinstance(callbacks, Callback):
            raise InputError(f"callbacks is a {type(callbacks).__name__}, expected a list")
        own = _callbacks_of(evaluation, self.task, self.processor, sizes, chats=self.chats)
        called = [*own, *callbacks]
        if evaluation.every and held_out is None and not called:
            raise InputError(
                f"evaluation.every is {evaluation.every}, but there are no held-out examples to "
                "measure; expected an evaluation.path"
            )
        self.callbacks = Callbacks(called)
        examples = {
            "data.path": self.stream.get_state()["fingerprint"],
            "evaluation.path": "" if held_out is None else rows_fingerprint(held_out),
        }
        check_same({**_contents(examples), "the number of steps": self.steps})
        base = objects.base(config, self.task, mesh)
        self._fingerprints = {"model": base_fingerprint(base), **examples}
        self._flops = ModelFlops.of(base) if isinstance(base, PretrainedModel) else None
        model = adapted(base, config, self.task)
        start = start_fingerprint(model) if config.lora.adapter else ""
        self._fingerprints["lora.adapter"] = start
        check_same(_contents(self._fingerprints))
        self.schedule = make_schedule(schedule, self.steps)
        tx = make_optimizer(config, self.schedule, scaling_of(model), stack_axis_of(model))
        heads = self.task.head_modules(model)
        parts = split_model(model, trained_variables(config.method, heads))
        if objects.model is not None:  # its arrays are not to be donated
            copied = jax.tree.map(jnp.copy, (parts.params, parts.streams))
            parts = parts._replace(params=copied[0], streams=copied[1])
        table = getattr(model, "table", None)
        self._shardings = step_shardings(
            parts, tx, table, mesh, offload_optimizer=config.optimizer.offload
        )
        layout = self._shardings.state
        self._own: Any = (
            jax.device_put(parts.params, layout.params),
            jax.device_put(parts.streams, layout.streams),
        )
        params, streams = jax.eval_shape(lambda: self._own)
        self.parts = parts._replace(
            params=params,
            streams=streams,
            frozen=jax.tree.map(_placed, parts.frozen, self._shardings.frozen),
        )
        self._initial = jax.jit(
            lambda params, streams: initial_state(
                self.parts._replace(params=params, streams=streams), tx
            ),
            out_shardings=layout,
            donate_argnums=(0, 1),
        )
        self.step = make_step(
            self.parts,
            self.task.loss,
            tx,
            schedule.accumulation_steps,
            self._shardings,
            max_skipped_steps=config.optimizer.max_skipped_steps,
        )
        _log.info(
            "%s: %s trained parameters, optimizer state of %s",
            config.method.name,
            f"{sum(x.size for x in jax.tree.leaves(params)):,}",
            size_of(state_bytes(tx, params)),
        )

    def close(self) -> None:
        """Stops the threads that prepare batches."""
        self.stream.close()

    def begin(self, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any]]:
        """Gives the state to start from, and moves the stream and the callbacks to theirs.

        Args:
            checkpoints: Of the run; if there are none, the state is the one before the first step.

        Returns:
            The state of the newest intact checkpoint, of which the run does not keep a copy, and
            the plain values beside it; none at the start.

        Raises:
            InputError: There are checkpoints but none is intact, or they belong to another model or
                other examples, or the number of steps is less than was done.
        """
        own, self._own = self._own, None
        if not checkpoints.steps():
            return self._initial(*own), {}
        with explained(f"{checkpoints.folder}: does not say what the run was started with"):
            saved = (checkpoints.newest_run() or {})["fingerprints"]
            check_fingerprints(saved, self._fingerprints, doing="resume")
        shapes = jax.eval_shape(self._initial, *own)
        del own  # what is read needs its memory
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self._shardings.state,
        )
        state, plain = checkpoints.restore_newest(like)
        self._check_steps(int(gather_to_host(state.step)), plain)
        with explained(f"{checkpoints.folder}: has no position in the data to resume from"):
            self.stream.set_state(plain["data"])
            self.callbacks.set_state(plain["callbacks"])
        _log.info("resumed at step %d of %d", int(gather_to_host(state.step)), self.steps)
        return state, plain

    def _check_steps(self, done: int, plain: Mapping[str, Any]) -> None:
        """Refuses another number of steps where what was done would have been something else."""
        if done > self.steps:
            raise InputError(
                f"schedule.steps is {self.steps}, but the run is at step {done} already; expected "
                "that many at least"
            )
        warmup, before = self.config.schedule.warmup_steps, plain.get("steps", self.steps)
        if min(warmup, before) != min(warmup, self.steps):
            raise InputError(
                f"cannot resume with {self.steps} steps: the run was started with {before}, fewer "
                f"than its warmup_steps {warmup}, and had a shorter warmup; expected a new run"
            )

    def placed(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts a batch of the stream on the devices.

        Args:
            batch: Of this process.

        Returns:
            The arrays by name, as the step takes them; a process copies only the rows of its own
            devices.
        """
        return {
            name: jax.make_array_from_callback(rows.shape, self._shardings.batch, rows.__getitem__)
            for name, rows in self.task.inputs(batch).items()
        }

    def tokens(self, batch: Batch) -> tuple[int, int]:
        """Counts the tokens of a batch; see `Task.tokens`."""
        return self.task.tokens(batch, self._sizes)

    def speedometer(self) -> Speedometer:
        """Starts a `Speedometer` for the steps of this run.

        Returns:
            One that knows the size of the model and what the method trains.
        """
        full = not self.config.method.adapts
        return Speedometer(self._flops, full=full, devices=self._mesh.size)

    def report(
        self, state: TrainState, metrics: Mapping[str, jax.Array], skipped: int
    ) -> dict[str, float]:
        """Gives the metrics of the last step and of memory, for a line of the log.

        Args:
            state: After the step.
            metrics: As the step returned them.
            skipped: Number of steps skipped so far.

        Returns:
            Values by name.
        """
        values = {
            name: float(gather_to_host(metrics[name])) for name in ("grad_norm", "update_norm")
        }
        if self.config.method.adapts:
            values["gram_condition"] = largest_condition(state.params)
        rate = self.schedule(int(gather_to_host(state.step)) - 1 - skipped)
        return {
            "train_loss": float(gather_to_host(metrics["loss"])),
            **values,
            "learning_rate": float(gather_to_host(rate)),
            "skipped_steps": skipped,
            **memory_in_use(),
        }

    def save(
        self,
        checkpoints: Checkpoints,
        state: TrainState,
        measured: Measured | None,
        *,
        stopped: str = "",
        postponed: bool = False,
    ) -> None:
        """Saves a checkpoint with all that a resumed run needs.

        Args:
            checkpoints: Of the run.
            state: After the step to save.
            measured: The evaluation at this step, if there is one.
            stopped: Why a callback ended the run at this step; empty if none did.
            postponed: Whether an evaluation that is due at this step was left to the resumed run.

        Raises:
            NotFiniteError: Parameters are not finite.
            InputError: Nothing can be written.
        """
        if not gather_to_host(_all_finite(state.params)):
            step = int(gather_to_host(state.step))
            raise NotFiniteError(
                f"parameters are not finite at step {step}; the last checkpoint is kept. Expected "
                "a smaller learning_rate, or a larger eps, to train"
            )
        plain = {
            "config": config_to_dict(self.config),
            "steps": self.steps,
            "best_metrics": list(self._best_metric or self.task.best_metrics),
            "data": self.stream.get_state(),
            "fingerprints": self._fingerprints,
            "task": {"name": self.task.name, "settings": self.task.settings()},
            "chats": self.chats,
            "callbacks": self.callbacks.get_state(),
            "stopped": stopped,
            "postponed": postponed,
        }
        score = self.score(measured)
        checkpoints.save(state, plain, None if score is None or math.isnan(score) else score)

    def score(self, measured: Measured | None) -> float | None:
        """Gives the number by which evaluations are compared; see `Task.score`."""
        return None if measured is None else self.task.score(measured.values, self._best_metric)

    def export(self, state: TrainState) -> Path:
        """Writes the adapter, or the whole model if all weights were trained.

        Args:
            state: After the last step.

        Returns:
            The folder that was written.
        """
        folder = Path(self.config.output)
        if not self.config.method.adapts and (folder / "model").exists():
            publish(folder / "model", self.config)
            return folder / "model"  # it is complete if it exists: this run had finished before
        return export_trained(
            self.trained(state),
            self.processor,
            self.config,
            self.task,
            folder,
            step=int(gather_to_host(state.step)),
            run=folder,
            chats=self.chats,
        )

    def evaluate(self, state: TrainState) -> Measured | None:
        """Measures the model on the held-out examples.

        Args:
            state: Its parameters are used.

        Returns:
            What the task measures; None if there are no held-out examples.
        """
        return None if self._measure is None else self._measure(self.trained(state))

    @property
    def measures(self) -> bool:
        """Whether there are held-out examples."""
        return self._measure is not None

    def trained(self, state: TrainState) -> Any:
        """Gives the model with the parameters of a state."""
        return self.parts.merged(state.params, state.streams)


def _warn_of_far_positions(longest: int, sizes: Any) -> None:
    """Warns of rows that are longer than those that a model without a limit has learned from."""
    known = getattr(sizes, "max_position_embeddings", None)
    if known and longest > known:
        _log.warning(
            "the longest row has %d tokens, and max_position_embeddings of the model is %d: it may "
            "read badly what comes after that; data.max_length shortens rows",
            *(longest, known),
        )


def _callbacks_of(
    config: EvaluationConfig, task: Task, processor: Any, sizes: Any, *, chats: bool
) -> Iterator[Callback]:
    """Makes the callbacks that the configuration of a run asks for."""
    if config.sample_prompts:
        if not isinstance(task, CausalLM):
            raise InputError(
                f"evaluation.sample_prompts are {shown(list(config.sample_prompts))}, but task "
                f"{task.name} generates no text"
            )
        samples = SampleGenerations(config.sample_prompts, as_chat=chats)
        samples.check(processor, sizes)
        yield samples
    if config.patience:
        yield EarlyStopping(config.patience)


def _contents(fingerprints: Mapping[str, str]) -> dict[str, str]:
    return {f"the content of {name}": digest for name, digest in fingerprints.items()}


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Puts an array on its devices; JAX cannot put random keys on those of other processes."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(x, sharding)
    data = jax.device_put(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))
