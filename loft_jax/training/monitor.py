"""Metrics of a run apart from its loss: speed, memory, condition numbers."""

import contextlib
import logging
import math
import resource
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from loft_jax.hub.host_arrays import gather_to_host
from loft_jax.models.activations import gathered
from loft_jax.optim import factor_grams
from loft_jax.training.flops import ModelFlops, peak_flops

_PARTS = ("data", "compile", "eval", "save")

_log = logging.getLogger(__name__)


class Speedometer:
    """Measures how the time since the last log line was spent, and the speed of training in it.

    JAX computes asynchronously, so single steps cannot be timed: the time of the steps is the
    interval without the time spent on data, compilation, evaluation and saving. Steps that compile
    are not among them.
    """

    def __init__(self, flops: ModelFlops | None, *, full: bool, devices: int) -> None:
        """Starts the clock.

        Args:
            flops: Model FLOPs of a token; None if they are not known.
            full: Whether all weights are trained.
            devices: Number of devices of the run.
        """
        self._model_flops, self._full, self._devices = flops, full, devices
        self._peak = peak_flops(jax.local_devices()[0])
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self._start = time.perf_counter()
        self._spent = dict.fromkeys(_PARTS, 0.0)
        self._steps, self._tokens, self._flops = 0, 0, 0.0

    @contextlib.contextmanager
    def spent_on(self, part: str) -> Iterator[None]:
        """Adds the time spent inside to "data", "compile", "eval" or "save"."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - start

    def count(self, tokens: int, length: int) -> None:
        """Counts a step of `tokens` tokens without padding, in rows of `length`."""
        self._steps += 1
        self._tokens += tokens
        if self._model_flops is not None:
            self._flops += tokens * self._model_flops.per_token(length, full=self._full)

    def read(self) -> dict[str, float]:
        """Ends the interval and gives its metrics; its computations must have finished.

        Returns:
            `seconds_data`, `seconds_compile`, `seconds_eval` and `seconds_save` for the whole
            interval; where steps were counted, `tokens_per_second` and `seconds_per_step` for their
            time; and on known chips `mfu`, the ratio of model FLOPs per second to the peak of the
            chips.
        """
        training = time.perf_counter() - self._start - sum(self._spent.values())
        values = {f"seconds_{part}": seconds for part, seconds in self._spent.items()}
        if self._steps:
            values["tokens_per_second"] = self._tokens / training
            values["seconds_per_step"] = training / self._steps
            if self._peak is not None and self._model_flops is not None:
                values["mfu"] = self._flops / training / (self._peak * self._devices)
        self.restart()
        return values


class Compilations:
    """Says on the bar, in the log and to the speedometer when the step is compiled.

    JAX compiles a program for each shape of batches, when the first one comes.
    """

    def __init__(
        self, bar: "tqdm[Any]", name: str, speed: Speedometer, ahead: Collection[Any] = ()
    ) -> None:
        """Starts with no program.

        Args:
            bar: Of the steps.
            name: Its usual description.
            speed: Of the run; counts the time as "compile".
            ahead: Results of steps that may still be computed, whose time is no compilation's.
        """
        self._bar, self._name, self._speed, self._ahead = bar, name, speed, ahead
        self._shapes: set[tuple[Any, ...]] = set()

    @contextlib.contextmanager
    def of(self, batch: Mapping[str, jax.Array]) -> Iterator[bool]:
        """Surrounds a step with a batch; gives whether its shape is new, and so is the program."""
        shapes = tuple(x.shape for x in batch.values())
        if shapes in self._shapes:
            yield False
            return
        self._shapes.add(shapes)
        named: dict[tuple[int, ...], str] = {}  # arrays of one shape are told once
        for name, shape in zip(batch, shapes, strict=True):
            named.setdefault(shape, name)
        size = ", ".join(f"{name} {' x '.join(map(str, shape))}" for shape, name in named.items())
        self._bar.set_description(f"{self._name}: compiling for batches of {size} ...")
        jax.block_until_ready(list(self._ahead))
        start = time.perf_counter()
        with self._speed.spent_on("compile"):
            yield True
        self._bar.set_description(self._name, refresh=False)
        self._bar.clear()
        seconds = time.perf_counter() - start
        _log.info("compiled the step for batches of %s in %.1f s", size, seconds)


def memory_in_use() -> dict[str, float]:
    """Gives the peak memory of this process, and the largest of its devices, in bytes.

    Returns:
        `host_bytes`, and `device_bytes` if the devices report it.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    values = {"host_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        values["device_bytes"] = float(max(each["peak_bytes_in_use"] for each in stats if each))
    return values


def largest_condition(params: Any) -> float:
    """Computes the largest condition number of the factors' Gram matrices.

    Args:
        params: Parameters with LoRA pairs.

    Returns:
        The largest `lambda_max / lambda_min` of all `AᵀA` and `B Bᵀ`. It is infinite if one is
        singular or not finite; factors of zeros, as an initial B, are ignored.
    """
    most = 1.0
    for gram in _grams(params).values():
        matrices = gather_to_host(gram).astype(np.float64)
        if not np.isfinite(matrices).all():
            return math.inf
        values = np.linalg.eigvalsh(matrices)  # (stack, r), ascending
        least, largest = values[:, 0], values[:, -1]
        for low, high in zip(least[largest > 0], largest[largest > 0], strict=True):
            most = max(most, high / low if low > 0 else math.inf)
    return float(most)


@jax.jit
def _grams(params: Any) -> dict[str, jax.Array]:
    return jax.tree.map(gathered, factor_grams(params))
