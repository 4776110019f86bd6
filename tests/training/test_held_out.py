"""What a run measures on its held-out examples."""

import json

import pytest

from loft_jax.errors import InputError
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
    model, tokenizer = load_pretrained(config.model.path), load_tokenizer(config.model.path)
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
    held_out = HeldOut(config, load_tokenizer(config.model.path), progress=False)
    assert set(held_out.measure(load_pretrained(config.model.path))) == {"loss"}


def test_answers_without_weights_are_refused_before_there_is_a_model(make_config, tmp_path):
    path = tmp_path / "questions.jsonl"
    row = {"prompt": "Is it dull?", "choices": [" yes", " no"], "answer": 1}
    path.write_text(json.dumps(row) + "\n")
    config = make_config(eval_path=str(path))
    tokenizer = load_tokenizer(config.model.path)
    largest = max(tokenizer(" yes no Is it dull?")["input_ids"])
    HeldOut(config, tokenizer, vocab_size=largest + 1, progress=False)
    with pytest.raises(InputError, match=rf"row 0: the tokenizer gives token {largest} "):
        HeldOut(config, tokenizer, vocab_size=largest, progress=False)
