"""`python -m experiments`: runs what is missing, tests the best rates, and reports."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import registry
from experiments.__main__ import main
from experiments.log import Cell, Result, ResultLog
from experiments.registry import TASKS
from experiments.summary import summarize


def run(results, assets, *arguments):
    """Makes the runs, with the steps that other tests have compiled."""
    folders = ["--results", str(results), "--assets", str(assets)]
    cache = ["--cache", jax.config.jax_compilation_cache_dir]
    return main(["run", *arguments, *folders, *cache])


def report(results, page):
    return main(["report", "--results", str(results), "--page", str(page)])


@pytest.fixture(scope="module")
def half_swept(assets, tiny, tmp_path_factory):
    """The log of the tiny task after the first of two processes."""
    results = tmp_path_factory.mktemp("half_swept")
    assert run(results, assets, "tiny", "--share", "1/2") == 0
    return results / "tiny.jsonl"


@pytest.fixture(scope="module")
def swept(assets, half_swept, tmp_path_factory):
    """The same after the whole sweep."""
    results = tmp_path_factory.mktemp("swept")
    shutil.copy(half_swept, results)
    assert run(results, assets, "tiny") == 0
    return results / "tiny.jsonl"


@pytest.fixture(scope="module")
def tested(assets, swept, tmp_path_factory):
    """The same with a test of the model before training, and of the best rates."""
    results = tmp_path_factory.mktemp("tested")
    shutil.copy(swept, results)
    assert run(results, assets, "tiny", "--methods", "before") == 0
    assert run(results, assets, "tiny", "--best") == 0
    return results / "tiny.jsonl"


@pytest.fixture(scope="module")
def reported(assets, tested, tmp_path_factory):
    """A folder of logs and their page `results.md`; whatever has run can be reported on."""
    results = tmp_path_factory.mktemp("reported")
    shutil.copy(tested, results)
    matrix = ("matrix", "--rates", "1", "3", "--methods")
    with pytest.MonkeyPatch.context() as patch:  # one test draws
        patch.setattr(Figure, "savefig", lambda _, file, **how: Path(file).touch())
        for methods in (
            ["full"],  # alone
            ["loft-without-scaling"],  # a part is missing, and there is no whole
            ["loft-factored", "loft", "lora"],
            ["lora", "loft", "--alpha", "1"],
        ):
            assert run(results, assets, *matrix, *methods) == 0
            assert report(results, results / "results.md") == 0
    return results


def test_a_share_of_the_work_is_whole_settings(half_swept):
    assert {r.cell.method for r in ResultLog(half_swept).read()} == {"lora"}


def test_a_sweep_that_was_stopped_goes_on(swept):
    found = ResultLog(swept).read()
    assert [(r.cell.method, r.cell.learning_rate) for r in found] == [
        ("lora", 1e-3),
        ("lora", 1e-2),
        ("full", 1e-3),
        ("full", 1e-2),
    ]
    assert not any(r.test for r in found)


def test_what_has_run_is_not_run_again(assets, swept, tmp_path):
    log = ResultLog(shutil.copy(swept, tmp_path))
    before = log.path.read_bytes()
    assert run(tmp_path, assets, "tiny") == 0
    assert log.path.read_bytes() == before


def test_the_best_rates_are_tested_with_every_final_seed(tiny, tested):
    found = ResultLog(tested).read()
    (before,) = (result for result in found if result.cell.method == "before")
    assert before.test["loss"] > 2
    best = registry.summaries_of(tiny, found)
    assert [len(s.results) for s in best.values()] == [2, 2]
    assert all(r.test for s in best.values() for r in s.results)


@pytest.mark.parametrize(
    "expected",
    [
        "# Tiny",
        "All that was planned of the sweep has run.",
        "Before training, test loss ",
        "| LoFT is better than LoRA at equal rank |",
        "loft-without-scaling",
        "| full | ",
        "By alpha (a scaling that",
        "| RefLoRA is better than LoRA at equal rank | not tested |",
    ],
)
def test_the_pages_say_what_has_run(reported, expected):
    pages = (reported / "results.md", *(reported / "results").glob("*.md"))
    assert any(expected in page.read_text().replace("\n", " ") for page in pages)


def test_the_same_logs_make_the_same_pages(reported, tmp_path):
    assert report(reported, tmp_path / "results.md") == 0
    pages = ("results.md", "results/tiny.md", "results/matrix.md")
    for page in pages:
        assert (tmp_path / page).read_text() == (reported / page).read_text()
    made = {file.name for file in (tmp_path / "results").iterdir()}
    assert made == {"tiny.png", "matrix.png", "tiny.md", "matrix.md"}


def test_loft_knows_no_alpha(reported):
    # Another one is another start all the same, since the product is not zero there.
    of_matrix = summarize(ResultLog(reported / "matrix.jsonl").read())
    apart = {}
    for method in ("lora", "loft"):
        usual, other = (s.mean("loss") for x, s in of_matrix.items() if x.method == method)
        apart[method] = abs(np.log(usual / other))
    assert apart["loft"] < apart["lora"] / 5


def test_a_log_that_has_only_begun_can_be_reported_on(tmp_path):
    """Ranks beside the task's, rates that others have not run, a seed of no sweep."""
    task = TASKS["sentiment"]
    cells = [
        *(Cell("sentiment", "full", 0, rate, 0) for rate in (1e-3, 3e-3)),
        *(Cell("sentiment", "lora", 8, rate, 0) for rate in (3e-5, 1e-4)),
        Cell("sentiment", "lora", 8, 1e-2, 7),
        Cell("sentiment", "loft", 4, 1e-4, 0),
        Cell("sentiment", "lora", 16, 1e-4, 0),
    ]
    log = ResultLog(tmp_path / "sentiment.jsonl")
    costs = ("step_seconds", "trained_parameters", "state_bytes", "temporary_bytes")
    packages = dict.fromkeys(("loft-jax", "jax", "flax", "optax"), "1")
    for cell in cells:
        made_with = {**packages, "task": task.digest}
        values = {"loss": 1.0 + cell.learning_rate}
        log.append(Result(cell, (1.0,) * 20, values, {}, dict.fromkeys(costs, 1.0), made_with))
    page = tmp_path / "page.md"
    assert report(tmp_path, page) == 0
    of_task = (tmp_path / "page/sentiment.md").read_text()
    assert "At rank 8:" in of_task
    assert "| lora | 3e-05* |" in of_task
    assert "| sentiment | r 8 | 0.001 |  |  |  |" in page.read_text()


def test_runs_of_another_form_of_the_task_are_not_mixed(
    assets, tiny, swept, tmp_path, monkeypatch, capsys
):
    shutil.copy(swept, tmp_path)
    monkeypatch.setitem(TASKS, "tiny", dataclasses.replace(tiny, batch_size=2))
    assert run(tmp_path, assets, "tiny", "--methods", "full") == 2
    assert "runs of another form of the task" in capsys.readouterr().err
    assert report(tmp_path, tmp_path / "page.md") == 2
    assert "runs of another form of the task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "task is 'nothing'"),
        (["tiny", "--methods", "lorra"], "tiny has no method 'lorra'"),
        (["matrix", "--methods", "dora"], "matrix has no method 'dora'"),
        (["tiny", "--share", "3/2"], "share is '3/2'"),
        (["tiny", "--ranks", "0"], "rank is 0"),
        (["tiny", "--rates", "0.1", "-1"], "rate is -1, expected a positive number"),
        (["tiny", "--best", "--rates", "0.1"], "rates are given with best"),
        (["tiny", "--best"], "4 runs of the sweep are not there yet, as lora r 2, lr 0.001"),
    ],
)
def test_mistakes_are_named(arguments, message, tiny, tmp_path, capsys):
    assert main(["run", *arguments, "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_results_that_are_not_there_or_cannot_be_kept_are_told_before_any_work(tmp_path, capsys):
    assert report(tmp_path / "none", tmp_path / "pages" / "page.md") == 2
    assert "none: holds no results, expected a log" in capsys.readouterr().err
    assert not (tmp_path / "pages").exists()
    (tmp_path / "file").touch()
    assert main(["run", "matrix", "--results", str(tmp_path / "file" / "logs")]) == 2
    assert "file/logs" in capsys.readouterr().err
