"""Turns Ctrl-C, termination signals and preemption notices into requests to stop after a step."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Takes the first SIGINT or SIGTERM as a request to stop; a second one acts as usual.

    In a run of several processes, JAX handles SIGTERM, with which a cluster also announces a
    preemption: whichever process gets it, JAX chooses a step after which all of them can stop.
    There a second one does nothing.

    Outside the main thread Python does not allow signal handlers; a single process then gets no
    requests.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.reached(step=3)
        True
    """

    def __init__(self) -> None:
        self._several = jax.process_count() > 1
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # In several processes SIGTERM has the handler that JAX set when they joined.
            for number in [signal.SIGINT, *([] if self._several else [signal.SIGTERM])]:
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; called after every step, on every process."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()
        if self._several:
            signal.raise_signal(signal.SIGTERM)  # JAX passes it on to the other processes

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
