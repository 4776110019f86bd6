"""A slice whose hosts are folders: what was called, what was started, and what to do next.

`stand_ins/` has the gcloud, the Python and the loft-jax in use there.
"""

import itertools
import json
import sys

import pytest

from tests.scripts.tpu.pod import SLICE, pod

# Where the hosts of a slice are stood in for by folders, the shell commands for them really run.
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="runs what is meant for the hosts")


def calls(cloud, *verbs):
    found = [json.loads(line) for line in (cloud / "calls").read_text().splitlines()]
    return [words for words in found if words[3] in verbs or not verbs]


def started(cloud, host="host0"):
    """The words of each start of the run on a host."""
    file = cloud / f"started.{host}"
    words = file.read_bytes().decode().split("\0")[:-1] if file.exists() else []
    starts = [i for i, word in enumerate(words) if word == host] + [len(words)]
    return [words[a + 1 : b] for a, b in itertools.pairwise(starts)]


def act(cloud, command, *rest, flags=()):
    source = ("--source", str(cloud / "source"))
    return pod(command, *SLICE, *source, "--poll", "0.05", *flags, *rest)


def ready(cloud, plan=""):
    """A slice with everything installed."""
    assert act(cloud, "up").returncode == 0
    assert act(cloud, "install").returncode == 0
    (cloud / "plan").write_text(plan)
