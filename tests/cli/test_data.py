"""loft-jax data, and what commands say about examples."""

import json

import pytest
from transformers import BertConfig

from loft_jax.cli import main
from tests.tiny import tiny_sentencepiece_tokenizer, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model without weights, which are not read."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 500, "hidden_size": 16, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 64}
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def data(model, path, rows, *flags):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return main(["data", "--model", str(model), "--data.path", str(path), *flags])


def test_rows_are_shown_as_the_model_sees_them(folder, tmp_path, capsys):
    rows = [
        {"instruction": "two?", "input": "", "output": "four"},
        {"instruction": "three?", "input": "", "output": "x " * 99},
        {"instruction": "none?", "input": "", "output": ""},
    ]
    assert data(folder, tmp_path / "a.jsonl", rows, "--show", "1", "--data.max-length", "64") == 0
    out, err = capsys.readouterr()
    turns = "<s><|start|>user\ntwo?<|end|>\n<|start|>assistant\n"
    assert out.startswith("3 rows give 2 examples of ")
    assert out.endswith(f" tokens, 4 learned\n{turns}⟦four<|end|>⟧\n\n")
    assert "Alpaca's instructions, and are given to the chat template" in err
    assert "left out 1 of 3 examples: 1 with nothing to learn" in err
    assert "shortened 1 of 3 examples to max_length 64" in err
    templates = ("--data.prompt", r"Q: {instruction}\n", "--data.completion", "{output}")
    assert data(folder, tmp_path / "a.jsonl", rows[:1], *templates) == 0
    assert "<s>Q: two?\n⟦four</s>⟧" in capsys.readouterr().out


def test_spaces_at_the_start_of_what_is_learned_are_shown(folder, tmp_path, capsys):
    for entry in folder.iterdir():
        (tmp_path / entry.name).write_bytes(entry.read_bytes())
    tiny_sentencepiece_tokenizer().save_pretrained(tmp_path)
    rows = [{"prompt": "a joy", "completion": " from start"}]
    assert data(tmp_path, tmp_path / "a.jsonl", rows) == 0
    assert "a joy⟦ from start</s>⟧" in capsys.readouterr().out


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A model of labels, without weights."""
    folder = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(vocab_size=500, intermediate_size=16, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_labels_are_shown_with_their_names(encoder, tmp_path, capsys):
    rows = [{"text": "a joy", "label": "good"}, {"text": "dull", "label": "bad"}]
    assert data(encoder, tmp_path / "a.jsonl", rows) == 0
    out = capsys.readouterr().out
    assert ", label 1 (good)\n<s>a joy\n" in out
    assert "learned" not in out


def test_numbers_of_regression_are_shown_without_names(encoder, tmp_path, capsys):
    rows = [{"text": "a joy", "label": 1.5}, {"text": "dull", "label": 0.25}]
    assert data(encoder, tmp_path / "a.jsonl", rows) == 0
    out = capsys.readouterr().out
    assert ", label 1.5\n" in out
    assert ", label 0.25\n" in out
    assert "labels:" not in out


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (["pos", "Neg", "pos ", "neg", "pos"], "'Neg' 1, 'neg' 1, 'pos' 2, 'pos ' 1"),
        ([2, 0], "'0' 1, '1' 0, '2' 1"),
        ([f"{i:02}" for i in range(10)], ", ".join(f"'{i:02}' 1" for i in range(10))),
        ([*"abcdefghijklm"], ", ".join([*(f"'{name}' 1" for name in "abcdefghij"), "3 more"])),
    ],
)
def test_rows_of_each_label_are_counted(encoder, tmp_path, capsys, labels, counts):
    rows = [{"text": "a joy", "label": label} for label in labels]
    assert data(encoder, tmp_path / "a.jsonl", rows, "--show", "0") == 0
    assert capsys.readouterr().out.endswith(f" on average; labels: {counts}\n")


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([{"question": "a", "answer": "b"}], [], "found the fields ['answer', 'question']"),
        ([{"a": "b"}], ["--data.prompt", "{b}"], "field 'b' of data.prompt is missing"),
        ([{"text": "b"}], ["--show", "-1"], "show is -1; expected at least 0"),
    ],
)
def test_what_cannot_be_shown_is_refused(folder, tmp_path, capsys, rows, flags, message):
    assert data(folder, tmp_path / "a.jsonl", rows, *flags) == 2
    assert message in capsys.readouterr().err


def test_wrong_targets_are_refused_before_tokenizing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("loft_jax.data.encode._tokenized", None)
    (tmp_path / "a.jsonl").write_text('{"text": "a joy"}\n')
    run = ["--data.path", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "run")]
    flags = ["--model", str(folder), *run, "--target-modules"]
    assert main(["finetune", *flags, "q_prj"]) == 2
    assert "target_modules: 'q_prj' matches no layer of the model" in capsys.readouterr().err
    with pytest.raises(TypeError):
        main(["finetune", *flags, "q_proj"])
