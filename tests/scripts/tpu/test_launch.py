"""`launch`, `resume`, `logs`, `status` and `stop` of one run on two hosts."""

from tests.scripts.tpu.cloud import act, on_linux, ready, started
from tests.scripts.tpu.pod import HOSTILE

pytestmark = on_linux


def test_a_run_from_launch_to_its_end(cloud):
    ready(cloud)
    for host in ("host0", "host1"):
        (cloud / host / "loft-jax" / "env").write_text("TOKEN=hidden\n")
    (cloud / "connection_failures").write_text("2")  # after the command was run
    assert act(cloud, "launch", "--", *HOSTILE).returncode == 0
    for host in ("host0", "host1"):
        assert started(cloud, host) == [["finetune", *HOSTILE]]  # once, though asked for twice
    found = act(cloud, "logs")
    assert found.returncode == 0
    assert found.stdout == "step 1 on host0, TOKEN=hidden\ndone\n"
    assert act(cloud, "logs", flags=("--worker", "1")).stdout.startswith("step 1 on host1")
    assert "ended 0" in act(cloud, "status").stdout
    assert act(cloud, "resume", "--", "--output", "o").returncode == 0
    assert started(cloud)[-1] == ["finetune", "--output", "o", "--resume"]


def test_logs_end_with_the_status_of_the_run(cloud):
    ready(cloud, "fail")
    found = act(cloud, "logs")
    assert found.returncode == 1
    assert "no run was launched" in found.stderr
    assert act(cloud, "launch", "--", "--output", "o").returncode == 0
    (cloud / "connection_failures").write_text("1")
    found = act(cloud, "logs")
    assert found.returncode == 7
    assert found.stdout.count("step 1") == 1  # what was shown is not shown again


def test_one_run_at_a_time_and_stop_saves(cloud):
    ready(cloud, "wait")
    assert act(cloud, "launch", "--", "--output", "o").returncode == 0
    for words in (("launch", "--", "x"), ("resume", "--", "x"), ("install",), ("run", "--", "x")):
        assert act(cloud, *words).returncode == 4
    assert len(started(cloud)) == len(started(cloud, "host1")) == 1
    status = act(cloud, "status").stdout
    assert "tuning: READY" in status
    assert status.count("running") == 2
    (cloud / "connection_failures").write_text("1")  # the signal must not be sent twice
    assert act(cloud, "stop").returncode == 0
    for host in ("host0", "host1"):
        log = (cloud / host / "loft-jax" / "run.log").read_text()
        assert log.count("saving") == log.count("saved") == 1
    assert act(cloud, "logs").returncode == 130
    assert act(cloud, "status").stdout.count("ended 130 stopped") == 2
    assert act(cloud, "stop").returncode == 0
