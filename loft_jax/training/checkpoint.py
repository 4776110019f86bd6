"""Checkpoints of a run: trained parameters, optimizer, streams, data position; no base weights.

Each has three items: "params", which is all that an export needs; "optimizer", the rest of the
state; and "run", plain values.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from loft_jax.errors import InputError, explained, reason
from loft_jax.files import read_json, read_text, replacing
from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.training.checksum import json_checksum, tree_checksum
from loft_jax.training.distributed import all_agree, is_main, is_of_another_process, wait_for_all
from loft_jax.training.step import TrainState

_log = logging.getLogger(__name__)


class _Manager(ocp.CheckpointManager):  # type: ignore[misc]  # which has no types
    """Orbax's manager, without its own check for preemptions: the training loop has one.

    Orbax's check runs in another thread and asks JAX about steps that the loop has already passed,
    which would set back what JAX regards as the current step of this process.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The newest and the best checkpoints of one run.

    A checkpoint is complete or absent: Orbax writes it in the background under a temporary name,
    and renames it. It holds a checksum of its arrays, so that damage is found when it is read. With
    several processes, all of them make the same calls.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
    ) -> None:
        """Opens the folder, and removes checkpoints that a kill left unfinished.

        Args:
            folder: Folder of the checkpoints; made if missing.
            keep_last: Number of the newest checkpoints to keep.
            keep_best: Number of checkpoints with the best evaluations to keep in addition.
            read_only: Change nothing, since a run may be writing there.

        Raises:
            InputError: The folder cannot be made or read; or all its checkpoints, or with
                `read_only` any of them, hold something that must not be opened.
        """
        self.folder = Path(folder).resolve()
        policies: list[Any] = [LatestN(keep_last)]
        if keep_best:
            policies.append(
                BestN(
                    get_metric_fn=_score,
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        with explained(f"{self.folder}: cannot hold checkpoints"):
            if read_only:
                for _, problem in self._unopenable():
                    raise problem
            else:
                self._prepare()
            self._manager = _Manager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=AnyPreservationPolicy(policies),
                    best_fn=_score,  # stores the scores on disk, for a resumed run
                    best_mode="min",
                    create=False,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
                item_names=("params", "optimizer", "run"),
            )

    def _prepare(self) -> None:
        """Checks and repairs the folder now, rather than at the first save."""
        seen = self.folder / "seen-by-all"
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            seen.unlink(missing_ok=True)
            seen.touch(exist_ok=False)  # refuses a link there
            self._put_unopenable_aside()
            self._mend_scores()
        wait_for_all("checkpoint folder made")
        if not all_agree(seen.exists()):
            raise InputError(
                f"{self.folder}: is not the same folder on every host; expected storage they share"
            )
        wait_for_all("checkpoint folder seen")
        if is_main():
            seen.unlink()

    def _unopenable(self) -> list[tuple[int, InputError]]:
        """Finds the steps of checkpoints that Orbax must not open, and why."""
        found = []
        for step in self._on_disk():
            try:
                _check_entries(self.folder / str(step))
            except InputError as error:
                found.append((step, error))
        return found

    def _on_disk(self) -> list[int]:
        return [int(name) for name in os.listdir(self.folder) if re.fullmatch("[0-9]+", name)]

    def _put_unopenable_aside(self) -> None:
        """Renames the checkpoints that must not be opened; raises if there are no others."""
        found = self._unopenable()
        if found and len(found) == len(self._on_disk()):
            raise found[0][1]
        for step, problem in found:
            _log.warning("%s", problem)
            self._put_aside(step)

    def _mend_scores(self) -> None:
        """Rewrites the scores that Orbax reads and that differ from our own copies.

        Orbax cannot be opened while a score is damaged, even that of an old checkpoint.
        """
        for file in self.folder.glob("*/metrics/metrics"):
            step, score = file.parts[-3], None
            if not step.isdigit():  # unfinished: Orbax removes it
                continue
            with contextlib.suppress(InputError):
                score = self.run_of(int(step))["score"]
            text, found = json.dumps({"score": score}), ""
            with contextlib.suppress(InputError):
                found = read_text(file, "a score", most_bytes=1000)
            if found == text and score is not None:
                continue
            file.unlink()
            if score is not None:
                file.write_text(text, encoding="utf-8")
            known = "not known" if score is None else score
            _log.warning(
                "%s: damaged; the score of its evaluation is %s", self.folder / step, known
            )

    def save(self, state: TrainState, run: dict[str, Any], score: float | None) -> None:
        """Starts to save a checkpoint, which is written in the background.

        The previous checkpoint is complete when this returns. With several processes, all of them
        call this at the same step, and each writes its part. Where there is a checkpoint of this
        step, its plain values are replaced: its evaluation was left to the resumed run.

        Args:
            state: What to save; it may be donated afterwards.
            run: Plain values to save with the state: configuration and data position.
            score: Score of the evaluation at this step, if there is one; lower is better.

        Raises:
            InputError: This checkpoint or the previous one cannot be written; earlier ones are
                intact.
        """
        step = int(gather_to_host(state.step))
        if step in self._manager.all_steps():
            self._replace_values(step, run, score)
            return
        items = _items(state)
        checksums = {name: tree_checksum(item) for name, item in items.items()}
        with self._writable():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    run=ocp.args.JsonSave(_with_checksum(run, score, checksums)),
                ),
                metrics=None if score is None else {"score": score},
            )

    def _replace_values(self, step: int, run: dict[str, Any], score: float | None) -> None:
        """Replaces the plain values and the score of a checkpoint; its arrays stay."""
        folder = self.folder / str(step)
        digest = self.run_of(step)["digest"]
        wait_for_all("values of the checkpoint read")
        with self._writable():
            if is_main():
                if score is not None:
                    (folder / "metrics").mkdir(exist_ok=True)
                    _write_json(folder / "metrics" / "metrics", {"score": score})
                _write_json(folder / "run" / "metadata", _with_checksum(run, score, digest))
            wait_for_all("values of the checkpoint replaced")
            self._manager.reload()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            InputError: It cannot be written; earlier ones are intact.
        """
        with self._writable():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore wrap what the disk says in their own
            if isinstance(error, jax.errors.JaxRuntimeError) or is_of_another_process(error):
                raise
            complete = sorted(self._on_disk())
            raise InputError(
                f"{self.folder}: cannot write a checkpoint: {_why(error)}; those of steps "
                f"{complete} are complete"
            ) from error

    def steps(self) -> list[int]:
        """Lists the complete checkpoints, after waiting for one that is being written.

        Returns:
            Their steps, newest first.

        Raises:
            InputError: The last one cannot be written.
        """
        self.wait()
        return sorted(self._manager.all_steps(), reverse=True)

    def best_step(self) -> int | None:
        """Finds the checkpoint with the best score, among those whose plain values can be read.

        Returns:
            The step of the checkpoint with the lowest score; None if no checkpoint has a score.
        """
        scores = {}
        for step in self.steps():
            with contextlib.suppress(InputError):
                scores[step] = self.run_of(step)["score"]
        evaluated = [step for step, score in scores.items() if score is not None]
        return min(evaluated, key=lambda step: scores[step], default=None)

    def newest_run(self) -> dict[str, Any] | None:
        """Reads the plain values of the newest checkpoint whose values can be read.

        Returns:
            As from `run_of`; None if there is no such checkpoint.
        """
        for step in self.steps():
            with contextlib.suppress(InputError):
                return self.run_of(step)
        return None

    def run_of(self, step: int) -> dict[str, Any]:
        """Reads the plain values that were saved with a checkpoint.

        Args:
            step: One of `steps()`.

        Returns:
            The values given to `save`, with `score` and the checksums of the arrays.

        Raises:
            InputError: They cannot be read, or differ from those that were saved.
        """
        folder = self.folder / str(step)
        run = read_json(folder / "run" / "metadata")
        checksum = run.pop("checksum", None)
        with explained(f"{folder}: damaged"):
            if checksum != json_checksum(run):
                raise InputError(f"{folder}: damaged: its values are not those that were saved")
            if run["score"] is not None:
                run["score"] = float(run["score"])
        return run

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads a checkpoint onto the mesh of a given state, which may differ from the saved one.

        Args:
            step: One of `steps()`.
            like: A state with the expected shapes, dtypes and shardings.

        Returns:
            The state as it was saved, and the plain values.

        Raises:
            InputError: The checkpoint cannot be read, does not fit, or is damaged. The error is
                raised on every process.
        """
        found, run = self._restored(step, _items(like))
        return TrainState(params=found["params"], **found["optimizer"]), run

    def restore_params(self, step: int, like: Any) -> Any:
        """Reads only the trained parameters of a checkpoint.

        Args:
            step: One of `steps()`.
            like: Parameters with the expected shapes, dtypes and shardings.

        Returns:
            The parameters as they were saved.

        Raises:
            InputError: As from `restore`.
        """
        return self._restored(step, {"params": like})[0]["params"]

    def _restored(self, step: int, likes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads some items of a checkpoint, and its plain values."""
        folder = self.folder / str(step)
        found: tuple[dict[str, Any], dict[str, Any]] | None = None
        problem = InputError(f"{folder}: cannot be read by another process")
        try:
            run = self.run_of(step)
            # Not by the manager, which would wait for processes that found the checkpoint damaged.
            with explained(f"{folder}: cannot be read"):
                _check_entries(folder)
                items = {
                    name: ocp.StandardCheckpointHandler().restore(
                        folder / name,
                        args=ocp.args.StandardRestore(jax.tree.map(_abstract, like)),
                    )
                    for name, like in likes.items()
                }
            found = items, run
        except InputError as error:
            problem = error
        if not all_agree(found is not None) or found is None:
            raise problem
        items, run = found
        with explained(f"{folder}: damaged"):
            saved = [run["digest"][name] for name in items]
        if [tree_checksum(item) for item in items.values()] != saved:
            raise InputError(f"{folder}: damaged: its arrays are not those that were saved")
        return found

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Reads the newest intact checkpoint, and renames the damaged ones that are newer.

        Damaged ones stay in the folder, under the name of their step with the suffix "-damaged":
        this run will write its own in their place.

        Args:
            like: A state with the expected shapes and dtypes.

        Returns:
            The state, and the plain values saved with it.

        Raises:
            InputError: There is no intact checkpoint; then none is renamed.
        """
        damaged: list[int] = []
        for step in self.steps():
            try:
                found = self.restore(step, like)
            except InputError as error:
                _log.warning("%s", error)
                damaged.append(step)
                continue
            if damaged:
                _log.warning("falling back to the checkpoint of step %d", step)
                if is_main():
                    for each in damaged:
                        self._put_aside(each)
                wait_for_all("damaged checkpoints put aside")
                self._manager.reload()
            return found
        which = f": none of those of steps {damaged} can be read" if damaged else ""
        raise InputError(f"{self.folder}: no checkpoint to resume from{which}")

    def _put_aside(self, step: int) -> None:
        aside = self.folder / f"{step}-damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)

    def close(self) -> None:
        """Releases the manager; `wait` has already raised if something could not be written."""
        with contextlib.suppress(Exception):
            self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    """Splits a state into items: the trained parameters, and what only training needs."""
    rest = state._asdict()
    return {"params": rest.pop("params"), "optimizer": rest}


def _check_entries(folder: Path) -> None:
    """Refuses entries of a checkpoint that are neither files nor folders.

    Orbax would open them: a pipe would block if nobody writes to it, and a link may lead anywhere.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            entry = Path(place, name)
            try:
                mode = entry.lstat().st_mode
            except FileNotFoundError:  # a run that is training removes its older ones
                continue
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "a pipe or a device"
                raise InputError(f"{entry}: is {kind}, expected a file or a folder")


def _score(metrics: Any) -> float:
    return metrics["score"]


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _why(error: Exception) -> str:
    """Gives the disk's error, which TensorStore puts after long paths, or else the error's text."""
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else reason(error)


def _with_checksum(run: dict[str, Any], score: float | None, digest: Any) -> dict[str, Any]:
    """Gives the plain values of a checkpoint, with the checksum of what will be read of them."""
    plain = json.loads(json.dumps({**run, "score": score, "digest": digest}))
    return {**plain, "checksum": json_checksum(plain)}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(values), encoding="utf-8")
