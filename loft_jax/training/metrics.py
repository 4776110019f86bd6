"""Metrics of a run: written as JSON lines and for TensorBoard, read again, drawn, and judged."""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from loft_jax.errors import InputError, explained
from loft_jax.files import own_file, read_text, regular_file, replacing

_LAST = 5  # logged losses that the end of a run is judged by: one alone is of one batch
_MOST_BYTES = 2**30  # of a metrics file: three million rows


class MetricsLog:
    """Writes metrics to `metrics.jsonl` and `tensorboard/` in a run's folder."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resumed_at: int | None = None,
        wandb: str = "",
    ) -> None:
        """Opens the log.

        Args:
            folder: The run's folder.
            resumed_at: The step a run goes on from: later rows are forgotten, as it makes them
                again. None forgets all.
            wandb: Weights & Biases project to report to besides.

        Raises:
            InputError: The folder cannot be written.
        """
        self.path = Path(folder) / "metrics.jsonl"
        last = -1 if resumed_at is None else resumed_at
        kept = [row for row in read_metrics(self.path) if row["step"] <= last]
        with self._writable():
            with replacing(self.path) as partial:
                text = "".join(json.dumps(row) + "\n" for row in kept)
                partial.write_text(text, encoding="utf-8")
            self._file = self.path.open("a", encoding="utf-8")
            (Path(folder) / "tensorboard").mkdir(exist_ok=True)
            # Not a SummaryWriter: its thread, once the disk was full, leaves its callers waiting.
            self._events = EventsWriter(str(Path(folder) / "tensorboard" / "events"))
            begin = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=last + 1, session_log=begin))
        self._wandb = _wandb_run(Path(folder), wandb, last) if wandb else None

    def write(self, step: int, **values: float) -> None:
        """Adds the values of a step.

        Args:
            step: Behind which they were measured.
            values: By name; those that are infinite or no number stay out.

        Raises:
            InputError: The folder cannot be written.
        """
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with self._writable():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                told = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._events.write_event(told)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Writes out what is buffered."""
        with contextlib.ExitStack() as closing:
            if self._wandb is not None:
                closing.callback(self._wandb.finish)
            closing.enter_context(self._writable())
            closing.callback(self._events.close)
            closing.callback(self._file.close)

    def _writable(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"{self.path.parent}: cannot write metrics")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to the first that is none, as one cut off by a kill.

    Args:
        path: Of `metrics.jsonl`, which need not exist.

    Returns:
        Numbers by name, `step` among them.

    Raises:
        InputError: It is no file, or larger than any run makes it.
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


def plot_losses(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> bool:
    """Draws training and evaluation loss by step.

    Args:
        rows: Rows of `metrics.jsonl`.
        path: PNG file to write.

    Returns:
        Whether it was drawn: False when matplotlib, the extra `plot`, is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("train_loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as partial:
        FigureCanvasAgg(figure).print_png(partial)
    return True


def rise_of_loss(rows: Sequence[dict[str, Any]], *, held_out: bool) -> str:
    """What to tell of a run whose loss ended far above its start, or as no number.

    Far is half of the first loss and half a nat above it, or three times the first loss and a tenth
    of a nat above it: batches scatter by less around a loss that stays as it is, be it large or
    small, and a run that diverged has lost more.

    Args:
        rows: Of the `metrics.jsonl` of a run that is at its end; what was infinite or no number is
            missing in them.
        held_out: Whether the run has held-out examples: rows without training's values are then
            theirs, and otherwise none of this run.

    Returns:
        Of the training loss the first and the median of the last 5, and of the held-out loss those
        before and after training: of whichever rose. Empty if neither did.

    Example:
        >>> rise_of_loss([{"step": 1, "learning_rate": 0.1, "train_loss": 2.0},
        ...               {"step": 9, "learning_rate": 0.1, "train_loss": 7.5}],
        ...              held_out=False)
        'the training loss was 2.0000 at first and 7.5000 at the end'
    """
    trained = [row.get("train_loss", math.inf) for row in rows if "learning_rate" in row]
    measured = [row.get("eval_loss", math.inf) for row in rows if "learning_rate" not in row]
    told = []
    kinds = [("training", trained, _LAST), ("held-out", measured, 1)]
    for name, losses, count in kinds if held_out else kinds[:1]:
        first, later = losses[:1], losses[1:][-count:]
        if first and later and _rose(first[0], median(later)):
            figures = f"{_figure(first[0])} at first and {_figure(median(later))} at the end"
            told.append(f"the {name} loss was {figures}")
    return ", ".join(told)


def _rose(first: float, last: float) -> bool:
    return last == math.inf or last > min(1.5 * first + 0.5, max(3 * first, first + 0.1))


def _figure(loss: float) -> str:
    return "no finite number" if loss == math.inf else f"{loss:.4f}"


def check_wandb(project: str) -> None:
    """Says before any work if Weights & Biases is asked for and not there.

    Args:
        project: Empty if it is not asked for.

    Raises:
        InputError: It is not installed.
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
    """The run of this folder, gone on with if this one is."""
    import wandb

    file = folder / "wandb_id"
    if last < 0 or not file.exists():
        with replacing(file) as partial:
            partial.write_text(secrets.token_hex(8), encoding="utf-8")
    known = read_text(own_file(file), "the name of a run of Weights & Biases", most_bytes=100)
    run = wandb.init(project=project, name=folder.name, dir=folder, id=known, resume="allow")
    # By a step of our own: W&B takes no row that lies before its last one, as a resumed run's may.
    run.define_metric("*", step_metric="step")
    return run
