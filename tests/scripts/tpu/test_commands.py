"""The commands that `tpu_pod.sh` would run, as `--dry-run` prints them."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.scripts.tpu.pod import HOSTILE, HOSTS, SLICE, dry, option, pod, remote, run_words


def test_up_creates_a_slice():
    before, create, after = dry("up", *SLICE)
    assert before == after
    assert before[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "describe", "tuning"]
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "tuning"]
    assert {
        "--zone=us-west4-a", "--project=mine", "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite", "--quiet",
    } == set(create[6:])  # fmt: skip


def test_up_queues_spot_capacity_with_further_arguments():
    _, asked, create, _ = dry(
        "up", *SLICE, "--spot", "--queued", "--alpha", "--create-arg=--network=my net"
    )
    prefix = ["gcloud", "alpha", "compute", "tpus", "queued-resources"]
    assert asked[:6] == [*prefix, "describe"]
    assert create[:7] == [*prefix, "create", "tuning"]
    assert {"--node-id=tuning", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} < set(create)
    assert create[-1] == "--network=my net"


def test_install_sends_the_checkout(tmp_path):
    (tmp_path / ".git").mkdir()
    setup = "mountpoint -q /mnt || mount 'a b' /mnt"
    asked, mounted, stash, archive, scp, install = dry(
        "install", *HOSTS, "--source", str(tmp_path), "--setup", setup, "--extras", "tpu,wandb"
    )
    assert remote(asked)[0] == "all"
    assert remote(mounted) == ("all", setup)
    assert stash == ["git", "-C", str(tmp_path), "stash", "create"]
    sent = option(archive, "--output")
    assert archive[:4] == ["git", "-C", str(tmp_path), "archive"]
    assert archive[-1] == "HEAD"
    assert scp[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "scp", sent, "tuning:"]
    assert {"--worker=all", "--zone=us-west4-a", "--project=mine"} < set(scp)
    workers, script = remote(install)
    assert workers == "all"
    assert script.endswith(f'pip install -q "loft-jax[tpu,wandb] @ file://$HOME/{Path(sent).name}"')


def test_install_from_a_repository():
    _, install = dry("install", *HOSTS, "--repo", "https://host/a b.git", "--ref", "v1")
    words = shlex.split(remote(install)[1])
    assert words[-3:] == ["install", "-q", "loft-jax[tpu] @ git+https://host/a b.git@v1"]


@pytest.mark.parametrize("command", ["launch", "resume"])
def test_arguments_survive_two_shells(command):
    asked, start = dry(command, *HOSTS, "--", *HOSTILE)
    assert remote(asked)[0] == "all"
    workers, script = remote(start)
    assert workers == "all"
    resume = ["--resume"] if command == "resume" else []
    assert run_words(script) == ["finetune", *HOSTILE, *resume]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0


def test_resume_is_not_added_twice():
    _, start = dry("resume", *HOSTS, "--", "--resume", "--output", "o")
    assert run_words(remote(start)[1]) == ["finetune", "--resume", "--output", "o"]


def test_a_command_is_one_line_whatever_it_holds():
    _, line = pod("launch", *HOSTS, "--dry-run", "--", "a\nb\t'c'").stdout.splitlines()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    script = remote(words)[1]
    called = re.search(r"set -- .*?; rm ", script, re.DOTALL)[0].removesuffix("rm ")
    found = subprocess.run(
        ["bash", "-c", called + "printf '%s\\0' \"$@\""], capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert found[:-1] == ["finetune", "a\nb\t'c'"]


def test_logs_ask_one_host():
    log, asked = dry("logs", *HOSTS, "--worker", "3", "--connect-arg=--internal-ip")
    assert (remote(log)[0], remote(asked)[0]) == ("3", "3")
    assert "tail" in remote(log)[1]
    assert "--internal-ip" in log
    assert any("ServerAliveInterval" in word for word in log)


def test_status_stop_and_down():
    describe, status = dry("status", *HOSTS)
    assert describe[3:6] == ["tpu-vm", "describe", "tuning"]
    signalled, awaited = dry("stop", *HOSTS, "--stop-timeout", "77")
    assert [remote(c)[0] for c in (status, signalled, awaited)] == ["all"] * 3
    assert "kill -TERM" in remote(signalled)[1]
    assert "77" in remote(awaited)[1]
    prefix = ["gcloud", "compute", "tpus"]
    place = ["--zone=us-west4-a", "--project=mine"]
    assert dry("down", *HOSTS) == [[*prefix, "tpu-vm", "delete", "tuning", *place, "--quiet"]]
    assert dry("down", *HOSTS, "--queued") == [
        [*prefix, "queued-resources", "delete", "tuning", *place, "--force", "--quiet"]
    ]


def test_run_is_up_install_launch_and_logs():
    rest = ("--", *HOSTILE)
    run = dry("run", *SLICE, "--repo", "https://host/r.git", *rest)
    parts = [
        *dry("up", *SLICE),
        *dry("install", *HOSTS, "--repo", "https://host/r.git")[1:],  # nothing is going there yet
        *dry("launch", *HOSTS, *rest),
        *dry("logs", *HOSTS),
    ]
    assert [re.sub(r"\d+-\d+-\d+", "ID", " ".join(words)) for words in run] == [
        re.sub(r"\d+-\d+-\d+", "ID", " ".join(words)) for words in parts
    ]
