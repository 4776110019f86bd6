"""What was measured is kept with what it was made with, and two runs can be compared."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import history
from benchmarks.history import History, main

CASE = {"shape": "8x8", "optimizer": "loft"}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Two runs of a benchmark; the later one is twice as fast, and has a case more."""

    def run(revision, date, seconds, cases):
        made_with = {"date": date, "revision": revision, "machine": "m", "cores": 2}
        made_with |= {"device": "cpu", "jax": "1"}
        monkeypatch.setattr(history, "made_with", lambda: made_with)
        log = History(tmp_path, "speed")
        for case in cases:
            log.append(case, {"seconds": seconds, "note": "text"})

    run("aaa1", "2026-01-01T10:00:00", 4.0, [CASE])
    run("bbb2", "2026-02-01T10:00:00", 2.0, [CASE, {**CASE, "optimizer": "adamw"}])
    return tmp_path


def test_a_line_says_when_where_and_with_what(tmp_path):
    log = History(tmp_path, "speed")
    log.append(CASE, {"seconds": 1.0})
    log.append(CASE, {"seconds": 2.0})
    first, second = log.read()
    assert (first.case, first.measured) == (CASE, {"seconds": 1.0})
    assert first.made_with == second.made_with
    assert {"date", "revision", "machine", "cores", "device", "python", "jax", "optax"} <= set(
        first.made_with
    )


def test_the_revision_is_the_commit_and_whether_it_was_edited():
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-C", str(root), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    revision = history.made_with()["revision"]
    assert commit.startswith(revision.removesuffix("-dirty"))
    assert len(revision.removesuffix("-dirty")) >= 10


def test_what_a_killed_run_left_unfinished_gives_way(tmp_path):
    log = History(tmp_path, "speed")
    log.append(CASE, {"seconds": 1.0})
    whole = log.path.read_text()
    log.path.write_text(whole + whole[:20])
    assert len(log.read()) == 1
    log.append(CASE, {"seconds": 2.0})
    assert [json.loads(line)["measured"]["seconds"] for line in log.path.open()] == [1.0, 2.0]


def test_runs_are_listed(measured, capsys):
    assert main(["speed", "--results", str(measured)]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "| 2026-01-01T10:00:00 | aaa1 | m | 2 | cpu | 1 | 1 |"
    assert second == "| 2026-02-01T10:00:00 | bbb2 | m | 2 | cpu | 1 | 2 |"


@pytest.mark.parametrize("names", [("aaa", "bbb"), ("2026-01", "2026-02"), ("2026-01", "b")])
def test_two_runs_are_compared_where_both_have_measured(measured, names, capsys):
    assert main(["speed", "--results", str(measured), "--compare", *names]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == f"| case | measure | {names[0]} | {names[1]} | after / before |"
    assert rows == ["| shape 8x8, optimizer loft | seconds | 4 | 2 | 0.5 |"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sped"], "sped.jsonl has no results"),
        (["speed", "--compare", "aaa", "ccc"], "date or revision begins with 'ccc'"),
    ],
)
def test_mistakes_are_named(measured, arguments, message, capsys):
    assert main([*arguments, "--results", str(measured)]) == 2
    assert message in capsys.readouterr().err
