"""The log of a comparison, and what is read from it."""

import logging
import math

import numpy as np
import pytest

from experiments.log import (
    Cell,
    Result,
    ResultLog,
    Setting,
    grid,
    steps_to_match,
    summarize,
)
from loft_jax.errors import InputError


def result(rate=0.1, seed=0, loss=1.0, test=None, **cell):
    where = {"task": "toy", "method": "loft", "rank": 4, **cell}
    measured = {} if test is None else {"loss": test, "accuracy": 1 - test}
    return Result(
        Cell(**where, learning_rate=rate, seed=seed),
        train=(3.0, 2.0, loss),
        validation={"loss": loss},
        test=measured,
        cost={"step_seconds": 0.1},
        made_with={"jax": "1", "steps": 30},
    )


def test_a_grid_is_the_same_for_all_methods():
    cells = grid("toy", ["loft", "lora", "full"], [1, 4], [0.1, 0.3], [0, 1], without_rank=["full"])
    rates = {}
    for cell in cells:
        rates.setdefault((cell.method, cell.rank), set()).add((cell.learning_rate, cell.seed))
    everything = {(rate, seed) for rate in (0.1, 0.3) for seed in (0, 1)}
    assert rates == dict.fromkeys(
        [("loft", 1), ("loft", 4), ("lora", 1), ("lora", 4), ("full", 0)], everything
    )
    assert len(cells) == len(set(cells)) == 5 * 4
    assert [cell.seed for cell in cells] == [0] * 10 + [1] * 10


def test_a_log_gives_back_what_it_was_given(tmp_path):
    log = ResultLog(tmp_path / "logs" / "toy.jsonl")
    assert log.read() == []
    given = [result(seed=0, test=0.5), result(seed=1, loss=math.inf), result(alpha=2.0)]
    for one in given:
        log.append(one)
    assert log.read() == given
    assert all(line.startswith('{"task": "toy"') for line in log.path.read_text().splitlines())


def test_of_a_cell_the_tested_run_counts(tmp_path):
    log = ResultLog(tmp_path / "toy.jsonl")
    tested = result(loss=1.0, test=0.5)
    for one in (result(loss=1.1), tested, result(loss=1.2)):
        log.append(one)
    assert log.read() == [tested]


def test_a_line_that_was_cut_off_does_not_count(tmp_path, caplog):
    log = ResultLog(tmp_path / "toy.jsonl")
    for seed in (0, 1):
        log.append(result(seed=seed))
    log.path.write_bytes(log.path.read_bytes()[:-40])
    with caplog.at_level(logging.WARNING, logger="loft_jax"):
        assert log.read() == [result(seed=0)]
    assert "toy.jsonl: line 2 is unfinished" in caplog.text
    log.append(result(seed=2))
    assert log.read() == [result(seed=0), result(seed=2)]


@pytest.mark.parametrize("line", ["[]", '{"task": "toy"}', '{"train": 3}', "3"])
def test_a_line_that_is_no_result_is_named(tmp_path, line):
    log = ResultLog(tmp_path / "toy.jsonl")
    log.append(result())
    log.path.write_text(log.path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"toy\.jsonl: line 2 is no result .* remove it"):
        log.read()


def test_the_rate_is_chosen_by_validation_and_never_by_the_test():
    found = summarize(
        [
            result(rate=0.1, loss=1.0, test=0.1),
            result(rate=0.3, loss=0.8, test=0.9),
            result(rate=1.0, loss=math.inf),
        ]
    )
    (summary,) = found.values()
    assert (summary.learning_rate, summary.at_edge) == (0.3, False)
    assert summary.rates == {0.1: 1.0, 0.3: 0.8, 1.0: math.inf}
    assert summary.mean("loss") == 0.9
    assert math.isnan(summary.spread("loss"))


def test_rates_are_compared_on_the_seeds_that_all_have():
    # Seeds 1 and 2 are of the best rate alone: their losses must not take it away again.
    found = summarize(
        [
            result(rate=0.1, seed=0, loss=1.0, test=0.5),
            result(rate=0.1, seed=1, loss=9.0, test=0.6),
            result(rate=0.1, seed=2, loss=9.0, test=0.7),
            result(rate=0.3, seed=0, loss=1.1),
        ]
    )
    (summary,) = found.values()
    assert summary.learning_rate == 0.1
    assert summary.at_edge
    assert summary.mean("loss") == pytest.approx(0.6)
    assert summary.spread("loss") == pytest.approx(0.1)
    assert summary.curve() == [3.0, 2.0, pytest.approx(19 / 3)]
    assert summary.curve([0, 1]) == [3.0, 2.0, 5.0]


def test_rates_that_lack_a_seed_of_the_sweep_do_not_count():
    runs = [result(rate=0.1, seed=seed, loss=1.0) for seed in (0, 1)]
    found = summarize([*runs, result(rate=0.3, seed=0, loss=0.1)], seeds=(0, 1))
    assert [s.rates for s in found.values()] == [{0.1: 1.0}]
    assert summarize(runs, seeds=(0, 1, 2)) == {}


def test_rates_can_be_judged_by_another_measure():
    runs = [result(rate=0.1, loss=1.0), result(rate=0.3, loss=2.0)]
    for run, steps in zip(runs, (9.0, 5.0), strict=True):
        run.validation["steps"] = steps
    (summary,) = summarize(runs, by="steps").values()
    assert summary.learning_rate == 0.3
    assert summary.rates == {0.1: 1.0, 0.3: 2.0}


def test_settings_are_kept_apart():
    found = summarize([result(), result(eps=1e-4), result(alpha=8.0), result(rank=2)])
    assert list(found) == [
        Setting("toy", "loft", 4),
        Setting("toy", "loft", 4, 1e-4),
        Setting("toy", "loft", 4, alpha=8.0),
        Setting("toy", "loft", 2),
    ]


def test_a_seed_that_diverged_is_not_left_out_of_the_mean():
    (summary,) = summarize(
        [result(seed=0, test=0.5), result(seed=1, loss=math.inf), result(rate=0.3, loss=5.0)]
    ).values()
    assert summary.values("accuracy") == {0: 0.5, 1: pytest.approx(math.nan, nan_ok=True)}
    assert math.isnan(summary.mean("accuracy"))
    assert math.isnan(summary.spread("accuracy"))


def test_a_rank_below_one_is_refused():
    with pytest.raises(InputError, match="rank is 0, expected 1 or more"):
        grid("toy", ["loft"], [4, 0], [0.1], [0])


def test_alpha_of_the_rank_is_the_usual_one_and_full_has_none():
    cells = grid("toy", ["lora", "full"], [2, 4], [0.1], [0], without_rank=["full"], alpha=4.0)
    assert [(c.method, c.rank, c.alpha) for c in cells] == [
        ("lora", 2, 4.0),
        ("lora", 4, None),
        ("full", 0, None),
    ]


def test_a_sweep_without_a_common_seed_is_not_summarized():
    assert summarize([result(rate=0.1, seed=0), result(rate=0.3, seed=1)]) == {}


FALLING = np.linspace(4.0, 2.0, 20)


@pytest.mark.parametrize(
    ("curve", "steps"),
    [
        (FALLING, 100.0),
        (FALLING - 1.0, 50.0),  # a stretch is 5 steps: half of the fall is behind 10 of them
        (FALLING + 0.1, math.inf),
        (np.full(20, 1.0), 20.0),  # at once: a fifth of the run is what is looked at
    ],
)
def test_steps_to_a_loss(curve, steps):
    assert steps_to_match(curve, FALLING, steps=100) == pytest.approx(steps, abs=5)


@pytest.mark.parametrize("seed", range(5))
def test_how_hard_a_batch_is_makes_no_difference(seed):
    hard = np.random.default_rng(seed).normal(scale=0.1, size=20)
    took = steps_to_match(FALLING - 1.0 + hard, FALLING + hard, steps=100)
    assert took == pytest.approx(50, abs=10)


def test_an_easy_batch_is_no_progress():
    easy = np.full(20, 3.0)
    easy[3] = 1.5
    assert steps_to_match(easy, np.linspace(4.0, 2.4, 20), steps=100) == math.inf


def test_a_setting_gives_back_its_cells():
    cell = Cell("toy", "lora", 4, 0.3, 2, 1e-4, 8.0)
    assert cell.setting.cell(0.3, 2) == cell
