"""Runs in processes of their own, as from the command line, to be killed and to be joined."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from loft_jax.hub.safetensors_io import Safetensors
from loft_jax.training.config_io import save_config
from loft_jax.training.metrics import read_metrics

# As on a machine without PyTorch: other libraries import it where it is, and take seconds to.
_CODE = """
import importlib.machinery, sys
class WithoutTorch(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = WithoutTorch
from loft_jax.cli import main
sys.exit(main())
"""


def losses(folder):
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}


def adapter(folder):
    file = Safetensors(Path(folder) / "adapter" / "adapter_model.safetensors")
    return {name: np.asarray(file.read(name)) for name in file.shapes}


def start(config, *flags, devices=1, before=()):
    """One process, on so many CPU devices, started by way of the command `before`."""
    folder = Path(config.output).parent / "start"
    folder.mkdir(exist_ok=True)
    file = folder / f"{Path(config.output).name}.yaml"
    save_config(config, file)
    command = [*before, sys.executable, "-c", _CODE, "finetune", "--config", str(file), *flags]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    # To files: a full pipe would stop a process that nobody reads.
    log = (folder / f"{Path(config.output).name}-{time.monotonic_ns()}.log").open("w+")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    process.log = log
    return process


def start_together(config, count, *flags, devices=2, last=()):
    """Several processes of one run; the last one has some more flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--coordinator-address", f"127.0.0.1:{port}", "--process-count", str(count))
    own = [()] * (count - 1) + [last]
    return [
        start(config, *flags, *more, *meet, "--process-id", str(index), devices=devices)
        for index, more in enumerate(own)
    ]


def output(process):
    """What a process has said."""
    process.log.seek(0)
    return process.log.read()


def finish(*processes, timeout=240):
    """Exit codes of processes, when they have ended."""
    return [process.wait(timeout) for process in processes]


def wait_for_step(folder, step, process):
    """Until the run has logged a step."""
    deadline = time.monotonic() + 240
    while max(losses(folder), default=0) < step:
        assert process.poll() is None, output(process)
        assert time.monotonic() < deadline, output(process)
        time.sleep(0.02)
