"""Metrics of a run: one JSON line for each step that is logged, and the same for TensorBoard."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from loft_jax.errors import InputError


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
            InputError: Weights & Biases is asked for and not installed.
        """
        self.path = Path(folder) / "metrics.jsonl"
        last = -1 if resumed_at is None else resumed_at
        kept = [row for row in read_metrics(self.path) if row["step"] <= last]
        partial = self.path.with_suffix(".partial")
        with self._writable():
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(partial, self.path)
            self._file = self.path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=last + 1)
        self._wandb = _wandb_run(Path(folder), wandb) if wandb else None

    def write(self, step: int, **values: float) -> None:
        """Adds the values of a step by name; those that are infinite or no number stay out."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        with self._writable():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Writes out what is buffered."""
        with self._writable():
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path.parent}: cannot write metrics: {error}") from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to the first that is none, as one cut off by a kill."""
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
            break
        rows.append(row)
    return rows


def _wandb_run(folder: Path, project: str) -> Any:
    """The run of this folder, gone on with if there is one."""
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            "wandb, which Weights & Biases reports need, is not installed; expected: "
            "pip install 'loft-jax[wandb]'"
        ) from error
    known = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return wandb.init(project=project, name=folder.name, dir=folder, id=known, resume="allow")
