"""A run of classification as its users see it: trained, resumed, exported, evaluated, merged."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loft_jax.cli import main
from loft_jax.cli.source import Source
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.loop import finetune
from tests.flat_config import flat_config
from tests.models.test_bert import save_bert
from tests.tiny import tiny_tokenizer

LABELS = ("good", "bad")  # in an order of one's own
WORDS = ("plot", "acting", "film", "dull", "funny", "loud", "moving", "long", "honest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT of masked words, and sentences that are good if they have joy in them."""
    folder = tmp_path_factory.mktemp("classification")
    save_bert(
        folder / "model",
        transformers.BertForMaskedLM,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tiny_tokenizer().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, count in (("train", 128), ("test", 48)):
        with (folder / f"{name}.tsv").open("w") as file:
            file.write("sentence\tlabel\n")
            for _ in range(count):
                words = list(rng.choice(WORDS, rng.integers(1, 3)))
                if good := rng.random() < 0.5:
                    words.insert(rng.integers(0, len(words) + 1), "joy")
                file.write(f"{' '.join(words)}\t{'good' if good else 'bad'}\n")
    return folder


def config(folder, output, **changes):
    flags = {
        "model": str(folder / "model"),
        "data": DataConfig(str(folder / "train.tsv"), text_field="sentence", max_length=32),
        "eval_path": str(folder / "test.tsv"),
        "output": str(output),
        "method": "lora",
        "rank": 4,
        "target_modules": ("query", "value"),  # all would compile three times as long
        "learning_rate": 1e-2,
        "steps": 60,
        "batch_size": 16,
        "save_every": 30,
        "eval_every": 30,
    }
    return flat_config(**{**flags, **changes})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    run = config(folder, output, method="loft", label_names=LABELS)
    return output, finetune(run, progress=False)


def rows(folder):
    """Texts of the test with their labels."""
    lines = (folder / "test.tsv").read_text().splitlines()[1:]
    return [line.split("\t") for line in lines]


def torch_accuracy(folder, adapter):
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    right = 0
    for text, label in rows(folder):
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            right += LABELS[int(model(**ids).logits.argmax())] == label
    return right / len(rows(folder))


def test_it_learns_and_torch_says_the_same(folder, trained):
    output, result = trained
    assert result.before["accuracy"] < 0.7 < 0.9 < result.after["accuracy"]
    assert set(result.after) == {"loss", "accuracy", "f1", "matthews"}
    assert result.trained == output / "adapter"
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == (
        "SEQ_CLS",
        ["classifier", "bert.pooler.dense"],  # which a model of masked words has not
    )
    assert torch_accuracy(folder, output / "adapter") == pytest.approx(result.after["accuracy"])


def test_the_command_measures_the_adapter_alike(folder, trained, capsys):
    output, result = trained
    command = ["evaluate", "--adapter", str(output / "adapter"), "--task", "classification"]
    data = ["--data.path", str(folder / "test.tsv"), "--data.text-field", "sentence"]
    assert main([*command, *data]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((output / "adapter" / "labels.json").read_text()) == list(LABELS)
    assert found["accuracy"] == pytest.approx(result.after["accuracy"])
    assert found["nll"] == pytest.approx(result.after["loss"], rel=1e-4)
    assert found["count"] == 48


def test_the_best_checkpoint_is_exported_and_merged(folder, trained, tmp_path):
    output, _ = trained
    assert main(["export", str(output), "--checkpoint", "best", "--output", str(tmp_path)]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(merged)]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert model.config.id2label == dict(enumerate(LABELS))


def test_a_resumed_run_is_the_run_to_the_bit(folder, trained, tmp_path):
    whole, _ = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = finetune(
        config(folder, tmp_path / "run", method="loft", label_names=LABELS),
        resume=True,
        progress=False,
    )
    first = load_file(whole / "adapter" / "adapter_model.safetensors")
    second = load_file(again.trained / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def of_numbers(trained, tmp_path_factory):
    """The trained adapter with a head of one output, as regression has it."""
    adapter = shutil.copytree(trained[0] / "adapter", tmp_path_factory.mktemp("number") / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    heads = {name: value[:1] for name, value in tensors.items() if ".classifier." in name}
    save_file({**tensors, **heads}, adapter / "adapter_model.safetensors")
    (adapter / "labels.json").write_text('["LABEL_0"]')
    return adapter


@pytest.mark.parametrize(
    ("numbers", "flags", "message"),
    [
        (True, [], "predicts a number, but field 'label' of the rows has texts; expected numbers"),
        (
            True,
            ["--task", "classification"],
            "predicts a number, but task is 'classification'; expected task regression",
        ),
        (True, ["--label-names", "bad", "good"], "but label_names are ['bad', 'good']"),
        (
            False,
            [],
            "predicts one of the labels ['good', 'bad'], but field 'label' of the rows has decimal "
            "numbers; expected these labels, or an adapter that was trained for regression",
        ),
        (False, ["--task", "regression"], "['good', 'bad'], but task is 'regression'"),
    ],
)
def test_an_adapter_of_another_task_is_refused_before_it_is_loaded(
    trained, of_numbers, tmp_path, monkeypatch, capsys, numbers, flags, message
):
    monkeypatch.setattr(Source, "load", None)
    data = tmp_path / "rows.tsv"
    data.write_text(f"text\tlabel\na joy\t{'good' if numbers else 0.5}\n")
    adapter = of_numbers if numbers else trained[0] / "adapter"
    flags = ["--adapter", str(adapter), "--data.path", str(data), *flags]
    assert main(["evaluate", *flags]) == 2
    said = capsys.readouterr().err
    assert str(adapter) in said
    assert message in said


def test_an_adapter_of_numbers_is_measured_on_numbers(of_numbers, tmp_path, capsys):
    data = tmp_path / "rows.tsv"
    data.write_text("text\tlabel\na joy\t1\ndull\t0\n")
    assert main(["evaluate", "--adapter", str(of_numbers), "--data.path", str(data)]) == 0
    assert "pearson" in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_head_that_nobody_trained_is_not_measured(folder):
    data = ["--data.path", str(folder / "test.tsv"), "--data.text-field", "sentence"]
    model = ["--model", str(folder / "model"), "--label-names", "bad", "good"]
    assert main(["evaluate", *model, *data]) == 2


def test_a_preset_needs_the_folder_of_the_data_alone(folder, tmp_path, capsys):
    data = tmp_path / "CoLA"
    data.mkdir()
    for name, source in (("train", "train"), ("dev", "test")):
        lines = [line.split("\t") for line in (folder / f"{source}.tsv").read_text().splitlines()]
        numbers = [("01"[label == "good"], text) for text, label in lines[1:]]
        (data / f"{name}.tsv").write_text("".join(f"x\t{n}\t\t{text}\n" for n, text in numbers))
    preset = ["--data.path", str(data), "--data.preset", "cola"]
    run = ["--model", str(folder / "model"), "--output", str(tmp_path / "run"), "--rank", "4"]
    run += ["--method", "lora", "--target-modules", "query", "value"]
    length = ["--steps", "6", "--eval-every", "1", "--learning-rate", "1e-2", "--keep-last", "1"]
    shapes = ["--data.max-length", "32", "--data.buckets", "32"]
    arguments = ["finetune", *run, *preset, *length, *shapes]
    assert main([*arguments, "--class-weights", "balanced"]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    matthews = {
        m["step"]: m["eval_matthews"] for m in metrics if m.get("eval_matthews") and m["step"]
    }
    best = Checkpoints(tmp_path / "run" / "checkpoints").best_step()
    assert matthews[best] == max(matthews.values())
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "labels.json").read_text()) == ["unacceptable", "acceptable"]
    capsys.readouterr()
    assert main(["evaluate", "--adapter", str(adapter), *preset]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["count"] == 48
    assert found["matthews"] == pytest.approx(matthews[6])
    weighted = ["--class-weights", "1", "2"]
    assert main(["evaluate", "--adapter", str(adapter), *preset, *weighted]) == 2
    assert "evaluation has no weights" in capsys.readouterr().err


@pytest.mark.slow
def test_all_weights_train_and_labels_are_kept(folder, tmp_path):
    run = config(folder, tmp_path / "run", method="full", learning_rate=1e-3, steps=4, save_every=4)
    result = finetune(run, progress=False)
    settings = json.loads((result.trained / "config.json").read_text())
    assert settings["id2label"] == {"0": "bad", "1": "good"}
    command = ["evaluate", "--model", str(result.trained), "--data.path", str(folder / "test.tsv")]
    assert main([*command, "--data.text-field", "sentence"]) == 0


@pytest.mark.parametrize("method", ["lora-plus", "lora-fa", "riemannian", "reflora-s", "loft-muon"])
@pytest.mark.slow
def test_heads_train_beside_the_adapters_of_every_method(folder, tmp_path, method):
    more = {"init": "balanced"} if method == "reflora-s" else {}
    more |= {"method": method, "eval_path": "", "eval_every": 0}
    runs = [config(folder, tmp_path / str(n), steps=n, **more) for n in (1, 3)]
    adapters = [finetune(run, progress=False).trained for run in runs]
    before, tensors = (load_file(adapter / "adapter_model.safetensors") for adapter in adapters)
    for name in ("classifier.weight", "classifier.bias"):
        name = f"base_model.model.{name}"
        assert not np.array_equal(tensors[name], before[name])


def test_rows_that_could_be_of_another_task_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"labels are .*but task regression has none"):
        finetune(config(folder, tmp_path / "run", task="regression", label_names=("a", "b")))
