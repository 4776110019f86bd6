"""What a run measures on its held-out examples."""

import json

import pytest

from loft_jax.evaluation.choices import score_choices
from loft_jax.hub import load_pretrained, load_tokenizer
from loft_jax.training.held_out import HeldOut


def test_rows_with_answers_of_their_own_are_compared(make_config, workspace, tmp_path):
    rows = [
        {
            "prompt": f"Question: {question}\nAnswer:",
            "choices": choices,
            "answer": answer,
        }
        for question, choices, answer in (
            ("what is dull?", [" a plot", " a joy", " the long film"], 2),
            ("who is funny?", [" the acting", " honest"], 0),
            ("is it loud?", [" positive", " negative"], 1),
        )
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(eval_path=str(path))
    model, tokenizer = load_pretrained(config.model), load_tokenizer(config.model)
    measured = HeldOut(config, tokenizer, progress=False).measure(model)
    scores = score_choices(model, tokenizer, rows, config.data, progress=False)
    assert measured == {
        "loss": pytest.approx(scores.nll),
        "accuracy": scores.accuracy,
        "accuracy_norm": scores.accuracy_norm,
    }
    assert scores.count == 3


def test_examples_without_answers_give_the_loss_of_a_token(make_config, workspace):
    config = make_config(eval_path=str(workspace / "test.jsonl"))
    held_out = HeldOut(config, load_tokenizer(config.model), progress=False)
    assert set(held_out.measure(load_pretrained(config.model))) == {"loss"}
