"""The pages of results come out of the kept logs, and a run of the logs out of its command."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from experiments.log import Cell, ResultLog
from experiments.registry import TASKS, read_results, runs_of
from experiments.report import write_report

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "experiments" / "results"
ASSETS = ROOT / "assets"
needs_experiments = pytest.mark.skipif(
    not (ASSETS / "experiments").is_dir(), reason="python -m experiments.prepare has not run"
)


def test_the_pages_are_what_the_logs_come_to(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda _, file, **how: Path(file).touch())
    write_report(LOGS, tmp_path / "results.md")
    made, kept = (
        {file.relative_to(folder): file for file in folder.glob("results*/**/*.*")}
        | {Path("results.md"): folder / "results.md"}
        for folder in (tmp_path, ROOT / "docs/evidence")
    )
    assert made.keys() == kept.keys()
    texts = {name: file.read_text("utf-8") for name, file in kept.items() if name.suffix == ".md"}
    assert {name: made[name].read_text("utf-8") for name in texts} == texts
    assert all(any(name.name in text for text in texts.values()) for name in kept.keys() - texts)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(Cell("matrix", "lora", 8, 0.03, 1, 1e-4), marks=pytest.mark.slow),
        pytest.param(Cell("matrix", "loft", 8, 0.3, 0, 1e-4), marks=pytest.mark.slow),
        Cell("square", "loft", 13, 1e-2, 2),
        pytest.param(
            Cell("stories", "lora", 4, 3e-3, 0), marks=[needs_experiments, pytest.mark.slow]
        ),
        pytest.param(
            Cell("stories", "loft", 4, 3e-3, 1), marks=[needs_experiments, pytest.mark.slow]
        ),
    ],
    ids=lambda c: f"{c.task}-{c.method}",
)
def test_a_run_of_the_logs_is_made_again(cell):
    task = TASKS[cell.task]
    kept = {r.cell: r for r in read_results(ResultLog(LOGS / f"{cell.task}.jsonl"), task)}[cell]
    again = runs_of(task, ASSETS)(cell, test=True)
    assert again.test["loss"] == pytest.approx(kept.test["loss"], rel=1e-2)
    assert again.train == pytest.approx(kept.train, rel=2e-2)
