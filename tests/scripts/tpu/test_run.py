"""`run` goes on after preemptions, and ends with the status of the run."""

import subprocess

import pytest

from tests.scripts.tpu.cloud import act, calls, on_linux, ready, started
from tests.scripts.tpu.pod import HOSTILE, POD, SLICE

pytestmark = on_linux


def test_run_goes_on_after_a_preemption(cloud):
    (cloud / "plan").write_text("preempt")
    output = cloud / "output"
    found = act(cloud, "run", "--", *HOSTILE, "--output", str(output), flags=("--spot",))
    assert found.returncode == 0, found.stderr
    words = ["finetune", *HOSTILE, "--output", str(output)]
    for host in ("host0", "host1"):
        assert started(cloud, host) == [words, [*words, "--resume"]]
    verbs = [words[3] for words in calls(cloud, "create", "delete", "scp")]
    assert verbs == ["create", "scp", "delete", "create", "scp"]
    assert found.stdout.splitlines() == [*["step 1 on host0, TOKEN="] * 2, "done"]
    assert "the slice is still there" in found.stderr
    assert (cloud / "state").read_text().startswith("READY")


@pytest.mark.slow
def test_run_starts_again_if_lost_before_it_wrote_anything(cloud):
    (cloud / "plan").write_text("early")
    output = cloud / "output"
    found = act(cloud, "run", "--", "--output", str(output))
    assert found.returncode == 0, found.stderr
    assert started(cloud) == [["finetune", "--output", str(output)]] * 2


def test_run_gives_up_after_max_restarts(cloud):
    (cloud / "plan").write_text("early")
    found = act(cloud, "run", "--", "--output", "o", flags=("--max-restarts", "0"))
    assert found.returncode == 1
    assert "cut off more than 0 times" in found.stderr
    assert len(started(cloud)) == 1


@pytest.mark.slow
def test_run_goes_on_when_another_host_was_restarted(cloud):
    (cloud / "plan").write_text("lose")
    found = act(cloud, "run", "--", "--config", "c.yaml")
    assert found.returncode == 0, found.stderr
    for host in ("host0", "host1"):
        words = ["finetune", "--config", "c.yaml"]
        assert started(cloud, host) == [words, [*words, "--resume"]]
    assert [words[3] for words in calls(cloud, "create", "delete")] == ["create"]


@pytest.mark.parametrize("plan", ["fail", pytest.param("tell", marks=pytest.mark.slow)])
def test_run_ends_with_the_status_of_a_host_that_fails(cloud, plan):
    (cloud / "plan").write_text(plan)
    found = act(cloud, "run", "--", "--output", "o")
    assert found.returncode == 7
    assert len(started(cloud)) == 1
    assert not calls(cloud, "delete")


def test_run_follows_its_run_that_is_going(cloud):
    ready(cloud, "wait")
    assert act(cloud, "launch", "--", "--output", "o").returncode == 0
    following = subprocess.Popen(
        [str(POD), "run", *SLICE, "--source", str(cloud / "source"), "--poll", "0.05", "--",
         "--output", "o", "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "step 1" in following.stdout.readline()
    assert act(cloud, "stop").returncode == 0
    _, messages = following.communicate(timeout=30)
    assert following.returncode == 130, messages
    assert "going already" in messages
    assert len(started(cloud)) == 1
