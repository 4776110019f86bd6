"""Commands whose readers leave, or were never there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loft_jax.streams import readers_may_leave


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def full_disk():
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")


def test_a_reader_who_has_left_is_no_failure(monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken_pipe())
    monkeypatch.setattr(sys, "stderr", broken_pipe())
    with readers_may_leave():
        print("x" * 100_000)
        print("x" * 100_000, file=sys.stderr, flush=True)
        print("x")
    sys.stdout.close()  # as when Python ends: nothing is left that would fail
    sys.stderr.close()


def test_a_result_that_cannot_be_kept_is_a_failure(monkeypatch):
    monkeypatch.setattr(sys, "stdout", full_disk())
    message = "No space left on device: 'standard output'"
    with pytest.raises(OSError, match=message), readers_may_leave():
        print("x", flush=True)
    sys.stdout.close()


def test_progress_that_cannot_be_kept_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", full_disk())
    with readers_may_leave():
        print("x", file=sys.stderr, flush=True)
    sys.stderr.close()


@pytest.mark.parametrize(
    "streams", ["2>&- | true", pytest.param(">&- 2>&-", marks=pytest.mark.slow)]
)
def test_a_real_command(streams):
    code = "import sys, loft_jax.cli as cli; sys.exit(cli.main(['--help']))"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" {streams}; exit ${{PIPESTATUS[0]}}'],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_letter_that_the_encoding_lacks_is_written_as_its_escape(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with readers_may_leave():
            print("caf\xe9")
    assert (tmp_path / "out").read_text() == "caf\\xe9\n"
