"""What a run measures on its held-out examples."""

import dataclasses
import json

import pytest

from loft_jax.data import DataConfig, load_examples
from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained, load_tokenizer
from loft_jax.tasks import choice
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.tasks.choice import Choice, score_choices
from loft_jax.training.held_out import held_out_data


def held_out(task, config, tokenizer, path, **options):
    data = dataclasses.replace(config.data, path=str(path))
    rows = load_examples(data)
    return task.evaluation(rows, tokenizer, data, batch_size=16, progress=False, **options)


def test_rows_with_answers_of_their_own_are_compared(make_config, tmp_path, monkeypatch):
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
    config = make_config()
    model, tokenizer = load_pretrained(config.model.path), load_tokenizer(config.model.path)
    asked = held_out(Choice(), config, tokenizer, path)
    monkeypatch.setattr(choice, "encode_prompts", None)  # rows are tokenized once
    measured = asked(model)
    monkeypatch.undo()
    scores = score_choices(model, tokenizer, rows, config.data, progress=False)
    assert measured.values == {
        "loss": pytest.approx(scores.nll),
        "accuracy": scores.accuracy,
        "accuracy_norm": scores.accuracy_norm,
    }
    assert scores.count == 3


@pytest.mark.parametrize(
    ("preset", "named", "split"),
    [("rte", {}, "validation"), ("boolq", {}, None), ("boolq", {"eval_split": "test"}, "test")],
)
def test_a_test_set_is_measured_only_if_it_is_named(make_config, tmp_path, preset, named, split):
    config = make_config(data=DataConfig(str(tmp_path), preset=preset), **named)
    found = held_out_data(config)
    assert split == (found and found.split)


def test_examples_without_answers_give_the_loss_of_a_token(make_config, workspace):
    config = make_config()
    examples = held_out(
        CausalLM(), config, load_tokenizer(config.model.path), workspace / "test.jsonl"
    )
    assert set(examples(load_pretrained(config.model.path)).values) == {"loss"}


def test_answers_without_weights_are_refused_before_there_is_a_model(make_config, tmp_path):
    path = tmp_path / "questions.jsonl"
    row = {"prompt": "Is it dull?", "choices": [" yes", " no"], "answer": 1}
    path.write_text(json.dumps(row) + "\n")
    config = make_config()
    tokenizer = load_tokenizer(config.model.path)
    largest = max(tokenizer(" yes no Is it dull?")["input_ids"])
    held_out(Choice(), config, tokenizer, path, vocab_size=largest + 1)
    with pytest.raises(InputError, match=rf"row 0: the tokenizer gives token {largest} "):
        held_out(Choice(), config, tokenizer, path, vocab_size=largest)


def test_choices_without_examples_to_compare_them_on_are_refused(make_config):
    with pytest.raises(InputError, match=r"choices are given without evaluation\.path"):
        held_out_data(make_config(choices=("a",)))
