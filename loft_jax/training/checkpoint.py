"""Checkpoints of a run: trained parameters, optimizer, streams, data position; never the base."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from loft_jax.errors import InputError
from loft_jax.training.step import TrainState

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, the newest ones and the best.

    Each is complete or absent: Orbax writes to a temporary name and renames. Each carries a digest
    of its arrays, so that a damaged one is known when it is read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens the folder, and removes what a kill left unfinished.

        Args:
            folder: Of the checkpoints; made if missing.
            keep_last: Newest checkpoints to keep.
            keep_best: Checkpoints of the lowest evaluation loss to keep besides.
            read_only: Change nothing: a run may be writing there.

        Raises:
            InputError: The folder cannot be made or read.
        """
        self.folder = Path(folder).resolve()
        policies: list[Any] = [LatestN(keep_last)]
        if keep_best:
            policies.append(
                BestN(
                    get_metric_fn=_loss,
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        try:
            if read_only:
                os.listdir(self.folder)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(policies),
                    create=False,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
                item_names=("state", "run"),
            )
        except OSError as error:
            raise InputError(f"{self.folder}: cannot hold checkpoints: {error}") from error

    def save(self, state: TrainState, run: dict[str, Any], eval_loss: float | None) -> None:
        """Writes a checkpoint and waits until it is complete.

        Args:
            state: What to save.
            run: Plain values to save with it: configuration and data position.
            eval_loss: The evaluation loss at this step, if there is one: the best are kept by it.
        """
        host = jax.tree.map(np.asarray, state)
        step = int(host.step)
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(host),
                run=ocp.args.JsonSave({**run, "eval_loss": eval_loss, "digest": _digest(host)}),
            ),
            metrics=None if eval_loss is None else {"loss": eval_loss},
        )
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best_step(self) -> int | None:
        """Step of the readable checkpoint with the lowest evaluation loss; None without one."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(InputError):
                losses[step] = self.run_of(step)["eval_loss"]
        evaluated = [step for step, loss in losses.items() if loss is not None]
        return min(evaluated, key=lambda step: losses[step], default=None)

    def newest_run(self) -> dict[str, Any] | None:
        """The plain values of the newest checkpoint that they can be read of; None without one."""
        for step in self.steps():
            with contextlib.suppress(InputError):
                return self.run_of(step)
        return None

    def run_of(self, step: int) -> dict[str, Any]:
        """The plain values that were saved with a checkpoint."""
        with _readable(self.folder / str(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
            )
        return restored["run"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a checkpoint.

        Args:
            step: One of `steps()`.
            like: A state with the shapes and dtypes to expect.

        Returns:
            The state as it was saved.

        Raises:
            InputError: The checkpoint cannot be read, does not fit, or is damaged.
        """
        abstract = jax.tree.map(_abstract, like)
        with _readable(self.folder / str(step)):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), run=ocp.args.JsonRestore()
                ),
            )
        if _digest(jax.tree.map(np.asarray, restored["state"])) != restored["run"]["digest"]:
            raise InputError(
                f"{self.folder / str(step)}: damaged: its arrays are not those that were saved"
            )
        return restored["state"]

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest checkpoint that is whole, and removes damaged ones above it.

        Args:
            like: A state with the shapes and dtypes to expect.

        Returns:
            The state, and the plain values saved with it.

        Raises:
            InputError: There is none; those that are damaged stay.
        """
        damaged: list[int] = []
        for step in self.steps():
            try:
                state = self.restore(step, like)
                run = self.run_of(step)
            except InputError as error:
                _log.warning("%s", error)
                damaged.append(step)
                continue
            if damaged:
                _log.warning("falling back to the checkpoint of step %d", step)
            for newer in damaged:  # they stand where this run will write again
                self._manager.delete(newer)
            return state, run
        found = f": none of those of steps {damaged} can be read" if damaged else ""
        raise InputError(f"{self.folder}: no checkpoint to resume from{found}")

    def close(self) -> None:
        """Releases what the manager holds."""
        self._manager.close()


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise what the damage happens to touch.
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{folder}: cannot be read: {reason}") from error


def _digest(tree: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = np.asarray(leaf)
        digest.update(
            json.dumps([jax.tree_util.keystr(path), array.shape, str(array.dtype)]).encode()
        )
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
