"""Ctrl-C, termination signals and preemption notices as a request to stop behind a step."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is a request to stop; a second one acts as usual.

    In a run of several processes JAX takes SIGTERM, which is also how a cluster gives notice of a
    preemption, on whichever process gets it, and names a step that all of them can stop behind; a
    second one does nothing there.

    Outside the main thread, where Python lets nobody handle signals, one process requests nothing.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.reached(step=3)
        True
    """

    def __init__(self) -> None:
        self._together = jax.process_count() > 1
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # In several processes SIGTERM has the handler that JAX set when they joined.
            for number in [signal.SIGINT, *([] if self._together else [signal.SIGTERM])]:
                self._before[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop behind this step; asked after every one, on every process."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()
        if self._together:
            signal.raise_signal(signal.SIGTERM)  # for JAX to tell the others

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
