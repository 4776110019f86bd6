"""The runs of a comparison, and the log that keeps them."""

import logging
import math

import pytest

from experiments.log import Cell, ResultLog, grid
from loft_jax.errors import InputError
from tests.experiments.made import result


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


def test_a_setting_gives_back_its_cells():
    cell = Cell("toy", "lora", 4, 0.3, 2, 1e-4, 8.0)
    assert cell.setting.cell(0.3, 2) == cell


def test_a_log_gives_back_what_it_was_given(tmp_path):
    log = ResultLog(tmp_path / "toy.jsonl")
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
