"""The notebooks run, and print what is kept in them."""

import json
import logging
import re

import pytest

from scripts.notebooks import outputs
from tests.pages import ROOT

FLOAT = r"\d+\.\d+"


def texts(of_cell):
    """What a cell printed: the words, and its decimal numbers apart."""
    text = "".join(line for output in of_cell for line in output.get("text", ()))
    return re.sub(FLOAT, "#", text), [float(number) for number in re.findall(FLOAT, text)]


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "docs/start").glob("*.ipynb"))
)
def test_a_notebook_prints_what_it_keeps(name, tmp_path, monkeypatch, caplog):
    notebook = json.loads((ROOT / "docs/start" / name).read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR, logger="loft_jax")  # which a notebook sets, and the test resets
    kept = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for expected, found in zip(kept, outputs(notebook), strict=True):
        words, numbers = texts(found)
        expected_words, expected_numbers = texts(expected)
        assert words == expected_words
        assert numbers == pytest.approx(expected_numbers, abs=0.03, rel=0.05)
        assert [o["output_type"] for o in found] == [o["output_type"] for o in expected]
