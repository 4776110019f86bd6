"""The examples run, and print what they promise.

Those that do what a page, a notebook or another test does are slow.
"""

import ast
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from examples import (
    export_peft,
    federated,
    linen_train_state,
    nnx_optimizer,
    optax_loop,
    own_model_and_loss,
    resume_orbax,
)
from loft_jax import load_peft_adapter, load_pretrained
from tests.pages import blocks

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = {
    "optax_loop",
    "nnx_optimizer",
    "linen_train_state",
    "own_model_and_loss",
    "resume_orbax",
    "export_peft",
    "federated",
}


HUB, FOLDER_OF_RUN = "HuggingFaceTB/SmolLM2-135M", "runs/first/adapter"


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_every_example_is_tested():
    elsewhere = {"maxtext", "tunix"}  # test_maxtext.py, and tests/tunix where Tunix is
    found = {file.relative_to(FOLDER).with_suffix("").parts[0] for file in FOLDER.rglob("*.py")}
    assert found == NAMES | elsewhere


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short_and_says_its_idea(file):
    text = file.read_text()
    assert len(text.splitlines()) < 60
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.slow
def test_loft_goes_one_way_from_two_splits_of_one_product(capsys):
    optax_loop.main()
    _, *losses = capsys.readouterr().out.splitlines()
    adam, adam_split, loft, loft_split = (numbers(line)[-1] for line in losses)
    assert loft == pytest.approx(loft_split, abs=2e-4)
    assert abs(adam - adam_split) > 10 * abs(loft - loft_split)


@pytest.mark.parametrize(
    "example", [pytest.param(nnx_optimizer, marks=pytest.mark.slow), linen_train_state]
)
def test_a_model_of_your_own_learns(example, capsys):
    example.main()
    before, after, merged = numbers(capsys.readouterr().out)
    assert before < 0.5
    assert after > 0.95
    assert merged == pytest.approx(after, abs=0.005)  # rounding may turn a row


@pytest.mark.slow
def test_a_run_ends_where_its_callback_says(tmp_path, capsys):
    own_model_and_loss.main(str(tmp_path / "run"))
    said = capsys.readouterr().out
    first, last = numbers(said.splitlines()[1])
    assert last < 0.5 < first
    assert "ended early: a held-out loss of 0." in said


@pytest.mark.slow
def test_clients_learn_from_each_other(capsys, monkeypatch):
    monkeypatch.setattr(federated, "CLIENTS", range(1, 3))
    monkeypatch.setattr(federated, "ROUNDS", 2)
    monkeypatch.setattr(federated, "STEPS", 12)
    federated.main()
    products, factors = (numbers(line) for line in capsys.readouterr().out.splitlines())
    assert len(products) == len(factors) == federated.ROUNDS
    for losses in (products, factors):
        assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(capsys):
    resume_orbax.main()
    assert capsys.readouterr().out.splitlines() == [
        "restored at step 10",
        "at step 20, bit-equal: True",
    ]


def test_pytorch_gives_the_same_answers_as_the_readme_says(tmp_path, capsys):
    export_peft.main(str(tmp_path))
    first, last, *_ = numbers(capsys.readouterr().out)
    assert last < first
    ours = load_peft_adapter(tmp_path / "adapter", load_pretrained(tmp_path / "base"))
    [block] = [block for block in blocks("README.md", "python") if "PeftModel" in block]
    assert {HUB, FOLDER_OF_RUN} <= set(re.findall(r'"(.+?)"', block))
    names = {}
    block = block.replace(HUB, str(tmp_path / "base"))
    exec(block.replace(FOLDER_OF_RUN, str(tmp_path / "adapter")), names)
    theirs = names["model"].float()
    tokens = np.arange(12)[None]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(tokens)), expected, atol=1e-4)
