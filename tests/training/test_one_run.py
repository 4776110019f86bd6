import fcntl
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loft_jax.errors import InputError
from loft_jax.training.one_run import only_run

HOLD = """
import sys
from pathlib import Path
from loft_jax.training.one_run import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_living_process_holds_its_folder_and_a_dead_one_does_not(tmp_path):
    folder = tmp_path / "run"
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout.readline() == b"held\n"
    holder = f"by process {held.pid} on {re.escape(socket.gethostname())}, since 20..-"
    for _ in range(2):  # being refused gives nothing away
        with pytest.raises(InputError, match=holder), only_run(folder):
            pass
    held.send_signal(signal.SIGKILL)
    held.communicate()
    with only_run(folder):
        pass
    with only_run(folder):
        pass


def test_without_locks_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    with only_run(tmp_path):
        assert "this file system has no locks" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold a run"), only_run(tmp_path / "file"):
        pass


def test_of_several_processes_all_fail_if_the_first_does(tmp_path, monkeypatch):
    monkeypatch.setattr("loft_jax.training.one_run.is_main", lambda: False)
    monkeypatch.setattr("loft_jax.training.one_run.all_agree", lambda ok: False)
    with pytest.raises(InputError, match="the first process cannot have it"), only_run(tmp_path):
        pass


@pytest.mark.parametrize("name", ["victim", "missing"])
def test_a_link_in_place_of_the_lock_is_refused(tmp_path, name):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=r"\.lock: is a link"), only_run(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    ("before", "written", "stays"),
    [
        (False, ["checkpoints/"], False),
        (False, [], False),
        (True, [], True),
        (False, ["config.yaml"], True),
        (False, ["checkpoints/4/"], True),
    ],
)
def test_a_refused_run_leaves_no_folder_that_it_has_made(tmp_path, before, written, stays):
    folder = tmp_path / "run"
    if before:
        folder.mkdir()

    def refused():
        for name in written:
            if name.endswith("/"):
                (folder / name).mkdir(parents=True)
            else:
                (folder / name).touch()
        raise InputError("wrong targets")

    with pytest.raises(InputError, match="wrong targets"), only_run(folder):
        refused()
    assert folder.exists() == stays
    assert all((folder / name).exists() for name in written) == (stays or not written)
