"""How the cost of updates grows: floors, slopes, and the command from its flags to its page."""

import pytest

from benchmarks.growth import measure
from benchmarks.growth.__main__ import main
from benchmarks.growth.measure import Options, sweep
from benchmarks.growth.page import latest, page, slope
from benchmarks.growth.sizes import OPTIMIZERS, Point, floor
from benchmarks.history import RESULTS, History
from benchmarks.optimizer.contestants import make_optimizer
from benchmarks.optimizer.shapes import pair_shapes
from loft_jax import state_bytes
from tests.pages import ROOT


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_floor_of_the_state_is_what_an_optimizer_keeps(name):
    point = Point(rank=3, width=24, layers=2)
    shapes = pair_shapes(24, 24, 3, 2, stacked=True)
    numbers = state_bytes(make_optimizer(name), shapes) / 4
    scalars = numbers - floor(name, point)[1]
    assert scalars in (1, 6)  # AdamW's counter; those of LoFT's links, the last norm and the bound


def test_floors_grow_as_their_terms_do():
    def grows(name, **sizes):
        (key, few), *_ = sizes.items()
        points = [Point(**{"rank": 16, "width": 1024, key: few * k}) for k in (1, 2)]
        return slope([1, 2], [floor(name, point)[0] for point in points])

    assert grows("loft", width=2**20) == pytest.approx(2, abs=1e-3)
    assert grows("loft", rank=2**40) == pytest.approx(3, abs=1e-3)
    assert grows("loft-factored", rank=16) == pytest.approx(2)
    for name in OPTIMIZERS:
        assert grows(name, layers=3) == pytest.approx(1)
    exact, alternating = (floor(name, Point(16, 2**20))[0] for name in ("loft", "loft-alternate"))
    assert exact / alternating == pytest.approx(2, abs=1e-3)  # two directions and one


def test_a_point_that_would_take_too_long_is_left_out(monkeypatch):
    def took(point, names, options):
        return {name: {"seconds": 1e-9 * floor(name, point)[0]} for name in names}

    monkeypatch.setattr(measure, "measured", took)
    rows = list(sweep("width", Options(most_seconds=1.0)))
    late = [(point.width, name) for point, name, row in rows if "seconds" not in row]
    # An element of W takes 2 · (136 + 2 · 16) operations, or twice as many: 2048² are over 1e9.
    exact = ("loft", "loft-alternate")
    assert sorted(late) == [(w, name) for w in (2048, 4096, 8192) for name in exact]
    reasons = {row["skipped"] for _, _, row in rows if "skipped" in row}
    assert "would take about 2.9 s, over the 1 s allowed" in reasons


@pytest.mark.slow
def test_measures_and_writes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "OPTIMIZERS", ("adamw", "loft-factored"))
    flags = ["--quick", "--against", "rank", "--seconds", "0.1", "--results", str(tmp_path)]
    assert main(flags) == 0
    entries = History(tmp_path, "growth").read()
    assert [entry.case["rank"] for entry in entries] == [1, 1, 2, 2, 4, 4]
    assert all(entry.measured["seconds"] > 0 for entry in entries)
    adamw = [entry.measured["state_bytes"] for entry in entries][::2]
    assert adamw == [4 * (4 * 32 * rank + 1) for rank in (1, 2, 4)]
    text = (tmp_path / "growth.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "\n| adamw | 1 to 4 | " in text
    assert (tmp_path / "growth-rank.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "growth-width.png").exists()


@pytest.mark.slow
def test_devices_share_the_state_and_send_little(tmp_path):
    assert main(["--quick", "--against", "devices", "--results", str(tmp_path)]) == 0
    entries = History(tmp_path, "growth").read()
    found = {(e.case["devices"], e.case["optimizer"]): e.measured for e in entries}
    for name in OPTIMIZERS:
        one, two = found[1, name], found[2, name]
        assert one["sent_bytes"] == 0 < two["sent_bytes"]
        if name != "loft-factored":
            assert one["state_bytes"] == two["state_bytes"]


def test_the_page_is_what_its_rows_say():
    text = (ROOT / "docs" / "evidence" / "growth.md").read_text(encoding="utf-8")
    assert text == page(latest(History(ROOT / RESULTS, "growth").read()), "growth")
