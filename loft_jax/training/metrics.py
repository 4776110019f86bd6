"""Writes, reads and checks the metrics of a run."""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from loft_jax.errors import InputError, explained
from loft_jax.files import own_file, read_text, regular_file, replacing

_LAST = 5  # number of logged losses that the end of a run is judged by; one would be noisy
_MOST_BYTES = 2**30  # of a metrics file: three million rows


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and `tensorboard/` in a run's folder."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resumed_at: int | None = None,
        measures_again: bool = False,
        wandb: str = "",
    ) -> None:
        """Opens the log.

        Args:
            folder: The run's folder.
            resumed_at: The step that a run is resumed at; later rows are removed, since the run
                will write them again. None removes all rows.
            measures_again: Whether the run evaluates at that step; an evaluation there is removed.
            wandb: Weights & Biases project to report to in addition.

        Raises:
            InputError: The folder cannot be written.
        """
        self.path = Path(folder) / "metrics.jsonl"
        last = -1 if resumed_at is None else resumed_at
        kept = [row for row in read_metrics(self.path) if row["step"] <= last]
        if measures_again:
            kept = [row for row in kept if row["step"] < last or not any(map(_is_measured, row))]
        with self._writable():
            with replacing(self.path) as partial:
                text = "".join(json.dumps(row) + "\n" for row in kept)
                partial.write_text(text, encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8")
            (Path(folder) / "tensorboard").mkdir(exist_ok=True)
            # Not a SummaryWriter: once the disk is full, its thread leaves its callers waiting.
            self._events = EventsWriter(str(Path(folder) / "tensorboard" / "events"))
            begin = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=last + 1, session_log=begin))
        self._wandb = _wandb_run(Path(folder), wandb, last) if wandb else None

    def write(self, step: int, **values: float) -> None:
        """Adds the values of a step.

        Args:
            step: The step after which they were measured.
            values: Values by name; infinite values and NaN are left out.

        Raises:
            InputError: The folder cannot be written.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with self._writable():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                summary = scalar(tensorboard_tag(name), value)
                event = Event(wall_time=time.time(), step=step, summary=summary)
                self._events.write_event(event)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Flushes and closes the log."""
        with contextlib.ExitStack() as closing:
            if self._wandb is not None:
                closing.callback(self._wandb.finish)
            closing.enter_context(self._writable())
            closing.callback(self._events.close)
            closing.callback(self._file.close)

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"{self.path.parent}: cannot write metrics")


def evaluation_at(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Gives the metrics of the evaluation after a step, by name; empty if there was none."""
    measured = [item for row in rows if row["step"] == step for item in row.items()]
    return {name.removeprefix("eval_"): x for name, x in measured if _is_measured(name)}


def _is_measured(name: str) -> bool:
    """Whether a value of a row is of an evaluation."""
    return name.startswith("eval_")


_GROUPS = {
    "optimizer": ("learning_rate", "grad_norm", "update_norm", "gram_condition", "skipped_steps"),
    "memory": ("device_bytes", "host_bytes"),
}


def tensorboard_tag(name: str) -> str:
    """Gives the tag of a metric in TensorBoard, which shows what is before the slash as a group.

    Args:
        name: As in `metrics.jsonl`.

    Returns:
        The tag, in the group "train", "eval", "optimizer", "memory" or "speed".

    Example:
        >>> tensorboard_tag("eval_loss"), tensorboard_tag("grad_norm"), tensorboard_tag("mfu")
        ('eval/loss', 'optimizer/grad_norm', 'speed/mfu')
    """
    first, _, rest = name.partition("_")
    if first in ("train", "eval"):
        return f"{first}/{rest}"
    group = next((group for group, names in _GROUPS.items() if name in names), "speed")
    return f"{group}/{name}"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a metrics file, up to the first invalid row (one cut off by a kill, say).

    Args:
        path: Path of `metrics.jsonl`, which need not exist.

    Returns:
        Numbers by name, `step` among them.

    Raises:
        InputError: It is not a file, or larger than any run makes it.
    """
    if not Path(path).exists():
        return []
    rows = []
    file = regular_file(path, "the metrics of a run", most_bytes=_MOST_BYTES)
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # ValueError of a number of too many digits, too
                break
            if not _is_row(row):
                break
            rows.append(row)
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) and abs(value) < 1e300 for value in row.values())
    )


def rise_of_loss(rows: Sequence[dict[str, Any]], *, held_out: bool) -> str:
    """Describes the losses that ended far above their start, or as no finite number.

    Far above means above `min(1.5 l + 0.5, max(3 l, l + 0.1))` nats, for a first loss of `l`. The
    losses of batches scatter less than that around a loss that stays constant, large or small, and
    the loss of a run that diverges rises more.

    Args:
        rows: Rows of the `metrics.jsonl` of a finished run; infinite values and NaN are missing in
            them.
        held_out: Whether the run has held-out examples, so that rows without values of training are
            evaluations of it.

    Returns:
        For each loss that rose, its start and its end: the first and the median of the last 5
        training losses, and the held-out losses before and after training. Empty if neither rose.

    Example:
        >>> rise_of_loss([{"step": 1, "learning_rate": 0.1, "train_loss": 2.0},
        ...               {"step": 9, "learning_rate": 0.1, "train_loss": 7.5}],
        ...              held_out=False)
        'the training loss was 2.0000 at first and 7.5000 at the end'
    """
    trained = [row.get("train_loss", math.inf) for row in rows if "learning_rate" in row]
    measured = [row.get("eval_loss", math.inf) for row in rows if "learning_rate" not in row]
    risen = []
    kinds = [("training", trained, _LAST), ("held-out", measured, 1)]
    for name, losses, count in kinds if held_out else kinds[:1]:
        first, later = losses[:1], losses[1:][-count:]
        if first and later and _rose(first[0], median(later)):
            figures = f"{_figure(first[0])} at first and {_figure(median(later))} at the end"
            risen.append(f"the {name} loss was {figures}")
    return ", ".join(risen)


def _rose(first: float, last: float) -> bool:
    return last == math.inf or last > min(1.5 * first + 0.5, max(3 * first, first + 0.1))


def _figure(loss: float) -> str:
    return "no finite number" if loss == math.inf else f"{loss:.4f}"


def check_wandb(project: str) -> None:
    """Refuses a Weights & Biases project if `wandb` is not installed.

    Args:
        project: Name of the project; empty for none.

    Raises:
        InputError: `wandb` is not installed.
    """
    if project:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise InputError(
                "wandb, which Weights & Biases reports need, is not installed; expected: "
                "pip install 'loft-jax[wandb]'"
            ) from error


def _wandb_run(folder: Path, project: str, last: int) -> Any:
    """Opens the Weights & Biases run of a folder; a resumed run continues it."""
    import wandb

    file = folder / "wandb_id"
    if last < 0 or not file.exists():
        with replacing(file) as partial:
            partial.write_text(secrets.token_hex(8), encoding="utf-8")
    known = read_text(own_file(file), "the name of a run of Weights & Biases", most_bytes=100)
    run = wandb.init(project=project, name=folder.name, dir=folder, id=known, resume="allow")
    # We define our own step: W&B refuses rows before its last step, which a resumed run may write.
    run.define_metric("*", step_metric="step")
    return run
