"""Calls `tpu_pod.sh`, and takes apart the commands that it prints."""

import shlex
import subprocess
from pathlib import Path

POD = Path(__file__).parents[3] / "scripts" / "tpu_pod.sh"
HOSTS = ("--name", "tuning", "--zone", "us-west4-a", "--project", "mine")
SLICE = (*HOSTS, "--type", "v5litepod-16", "--version", "v2-alpha-tpuv5-lite")
HOSTILE = ("--model", """it's "x" $HOME `id` \\ * ; & | > ~ !""", "--data.path", "", "--x", "ä b")


def pod(*words, **options):
    return subprocess.run(
        [str(POD), *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


def dry(*words):
    """The commands that would run, as lists of words."""
    found = pod(words[0], "--dry-run", *words[1:])
    assert (found.returncode, found.stderr) == (0, "")
    return [shlex.split(line) for line in found.stdout.splitlines()]


def option(command, flag):
    (value,) = (word.removeprefix(flag + "=") for word in command if word.startswith(flag + "="))
    return value


def remote(command):
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "tuning"]
    assert "--zone=us-west4-a" in command
    assert "--project=mine" in command
    return option(command, "--worker"), option(command, "--command")


def run_words(script):
    """The words after `set --` in a shell command for a host."""
    words = shlex.split(script)
    start = words.index("--") + 1
    assert words[start - 2] == "set"
    end = next(i for i in range(start, len(words)) if words[i].endswith(";"))
    return [*words[start:end], words[end].removesuffix(";")]
