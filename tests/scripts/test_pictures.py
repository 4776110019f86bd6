"""The pictures of the pages on concepts show what the pages say."""

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scripts.pictures import __main__ as pictures
from scripts.pictures import calibration, rates, reflora, step, subspace, whole_step


@pytest.fixture(autouse=True, scope="module")
def _own_style():
    with plt.rc_context():
        yield


def test_the_pictures_that_are_shown_are_those_that_are_made():
    shown = {
        name
        for page in (*pictures.FOLDER.rglob("*.md"), pictures.FOLDER.parents[1] / "README.md")
        for name in re.findall(r"!\[.*\]\((?:docs/concepts/)?([\w-]+\.svg)\)", page.read_text())
    }
    assert shown == {file.name for file in pictures.FOLDER.glob("*.svg")} == set(pictures.PICTURES)


def test_lofts_step_is_more_like_adamws_than_loras():
    steps = step.compute()
    of_held, of_loft, of_lora = (step.cosine(x, steps.adamw) for x in steps[1:])
    assert of_held > of_loft > of_lora + 0.2
    lengths = [np.linalg.norm(x) for x in steps]
    assert lengths[3] > 2 * lengths[2]
    step.draw(steps)


def test_rates_are_those_of_the_readme():
    losses = rates.compute()
    full, lora, loft = losses.values()
    assert min(full, key=full.get) == min(loft, key=loft.get) < min(lora, key=lora.get)
    assert min(loft.values()) < min(lora.values())
    rates.draw(losses)


@pytest.mark.slow
def test_loft_has_one_path_from_three_splits():
    found = subspace.compute()
    assert np.ptp(found.loft, axis=0).max() < 1e-4
    assert np.ptp(found.adam[:, -1]) > 0.05
    kept, formula = found.shares
    np.testing.assert_allclose(kept, formula, atol=0.02)


@pytest.mark.slow
def test_carried_moments_are_right():
    found = calibration.compute()
    assert max(found.first["carried"].max(), found.second["full, carried"].max()) < 1e-5
    for still in (found.first["left as it is"], found.second["full, left as it is"]):
        assert still[0] < 1e-5
        assert still[1:].min() > 0.1
    assert np.ptp(found.second["factored"]) < 1e-5
    of_full, of_factored, of_lora = (
        found.numbers[name][4] for name in ("LoFT, full", "LoFT, factored", "LoRA with AdamW")
    )
    assert (round(of_full), round(of_factored), round(of_lora)) == (168, 33, 32)


@pytest.mark.slow
def test_the_whole_step_alone_is_adamws():
    found = whole_step.compute()
    twice, alternate, tangent = found.distances.values()
    assert tangent.max() < 1e-4
    assert min(twice.min(), alternate.min()) > 0.1
    one, other, both = found.lengths.values()
    assert (both >= np.maximum(one, other) - 1e-6).all()
    assert both[-1] == pytest.approx(1)


def test_reflora_moves_w_alike_from_every_split():
    for moves, scalar in zip(reflora.compute(), (True, False), strict=True):
        np.testing.assert_allclose(moves.reflora, 1, atol=1e-4)
        assert (moves.scalar.max() < 1.001) == scalar
        assert 60 < moves.plain.max() < 76
