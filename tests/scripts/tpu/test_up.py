"""`up` leaves one slice that is ready, whatever was there before."""

import pytest

from tests.scripts.tpu.cloud import act, calls, on_linux

pytestmark = on_linux


def test_up_uses_a_slice_that_is_there(cloud):
    assert act(cloud, "up").returncode == 0
    assert act(cloud, "up").returncode == 0
    assert len(calls(cloud, "create")) == 1
    assert not calls(cloud, "delete")


@pytest.mark.parametrize(
    ("state", "queued"),
    [
        ("PREEMPTED", ()),
        ("TERMINATED", ("--queued",)),
        pytest.param("PREEMPTED", ("--queued",), marks=pytest.mark.slow),
        pytest.param("TERMINATED", (), marks=pytest.mark.slow),
    ],
)
def test_up_replaces_a_slice_that_is_lost(cloud, state, queued):
    (cloud / "state").write_text(state)
    if queued:
        (cloud / "queue").write_text("ACTIVE")
    assert act(cloud, "up", flags=queued).returncode == 0
    verbs = [(words[2], words[3]) for words in calls(cloud, "create", "delete")]
    kind = "queued-resources" if queued else "tpu-vm"
    assert verbs == [(kind, "delete"), (kind, "create")]


def test_up_deletes_a_suspended_request(cloud):
    (cloud / "queue").write_text("SUSPENDING SUSPENDED")
    assert act(cloud, "up", flags=("--queued",)).returncode == 0
    assert [words[3] for words in calls(cloud, "create", "delete")] == ["delete", "create"]


@pytest.mark.parametrize("state", ["STOPPED", "HIDDEN"])
def test_up_leaves_other_slices_alone(cloud, state):
    (cloud / "state").write_text(state)
    found = act(cloud, "up")
    assert found.returncode == 1
    assert f"tuning is {state}" in found.stderr
    assert not calls(cloud, "create", "delete")


def test_up_asks_again_without_capacity_or_answer(cloud):
    (cloud / "stockouts").write_text("2")
    (cloud / "api_failures").write_text("2")
    assert act(cloud, "up").returncode == 0
    assert len(calls(cloud, "create")) == 3
    (cloud / "api_failures").write_text("9")
    found = act(cloud, "up")
    assert found.returncode == 1
    assert "UNAVAILABLE" in found.stderr
    assert "cannot tell the state of tuning" in found.stderr
    assert len(calls(cloud, "create")) == 3


def test_up_ends_when_it_is_refused(cloud):
    (cloud / "refusals").write_text("1")
    found = act(cloud, "up")
    assert found.returncode == 1
    assert "PERMISSION_DENIED" in found.stderr
    assert "cannot create tuning" in found.stderr
