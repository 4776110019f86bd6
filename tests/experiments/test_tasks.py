"""The plan of each task: every method has the same sweep, and rates count only as planned."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from experiments import registry
from experiments.log import Cell, Result, ResultLog
from experiments.registry import TASKS
from experiments.tasks import BEFORE, Sweep

LOGS = Path(__file__).parents[2] / "experiments" / "results"
WITH_THREE_RATES = ("sst2", "cola", "rte", "vit-digits")


def test_all_methods_of_a_task_have_the_same_sweep():
    for task in TASKS.values():
        if task.name in ("wikitext-long", *WITH_THREE_RATES):
            continue
        swept = {}
        for cell in task.cells():
            if cell.method == BEFORE:
                assert (cell.learning_rate, cell.seed) == (0.0, 0)
                continue
            swept.setdefault(cell.setting, set()).add((cell.learning_rate, cell.seed))
        assert len(task.rates) >= 5, task.name
        assert (np.diff(np.log(task.rates)) < np.log(4)).all(), task.name
        sweep = {(rate, seed) for rate in task.rates for seed in task.seeds}
        for setting, cells in swept.items():
            assert sweep <= cells, setting
            # One more at most, outside.
            for rate in {rate for rate, _ in cells - sweep}:
                assert min(abs(np.log(rate / end)) for end in task.rates) > np.log(2.5), setting
                assert len(cells - sweep) == len(task.seeds), setting
        assert {s.method for s in swept} <= set(registry.methods_of(task))
        assert set(task.methods) <= {s.method for s in swept}


def test_the_longer_run_has_three_rates_of_each_method_around_its_best():
    task = TASKS["wikitext"]
    log = ResultLog(LOGS / "wikitext.jsonl")
    best = {
        setting.method: summary.learning_rate
        for setting, summary in registry.summaries_of(
            task, registry.read_results(log, task)
        ).items()
        if setting.rank in (0, 8)
    }
    rates = {}
    for cell in TASKS["wikitext-long"].cells():
        rates.setdefault(cell.method, []).append(cell.learning_rate)
    assert {method: sorted(found)[1] for method, found in rates.items()} == {
        method: best[method] for method in ("loft-factored", "lora", "full")
    }


@pytest.mark.parametrize("name", WITH_THREE_RATES)
def test_tasks_with_three_rates_of_each_method_have_them_a_factor_apart(name):
    rates = {}
    for cell in TASKS[name].cells():
        rates.setdefault((cell.method, cell.rank), []).append(cell.learning_rate)
    assert set(rates) == {("loft-factored", 8), ("lora", 8), ("reflora", 8), ("full", 0)}
    more = {("loft-factored", 8)} if name == "vit-digits" else set()
    assert all(len(found) == 3 + (method in more) for method, found in rates.items())
    assert all((np.diff(np.log(found)) > np.log(1.9)).all() for found in rates.values())


def test_a_rate_beyond_the_plan_does_not_count(tiny):
    task = dataclasses.replace(tiny, more=(Sweep(("lora",), (2,), rates=(3e-2,)),))
    losses = {1e-3: 3.0, 1e-2: 2.0, 3e-2: 1.0}

    def chosen(task, alpha=None):
        runs = [
            Result(Cell("tiny", "lora", 2, rate, 0, alpha=alpha), (), {"loss": x}, {}, {}, {})
            for rate, x in losses.items()
        ]
        return [s.learning_rate for s in registry.summaries_of(task, runs).values()]

    assert chosen(tiny) == [1e-2]
    assert chosen(task) == [3e-2]
    assert chosen(tiny, alpha=8.0) == [3e-2]  # no part of the plan
