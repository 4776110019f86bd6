"""Metrics of a run: one JSON line for each step that is logged, and the same for TensorBoard."""

import contextlib
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from loft_jax.errors import InputError, explained
from loft_jax.files import read_text, regular_file, replacing
from loft_jax.training.own_file import own_file

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
