"""What stands beside the weights of a finished run."""

import json
from pathlib import Path
from unittest import mock

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load
from transformers import AutoTokenizer

from loft_jax.cli import main
from loft_jax.training import model_card
from tests.hub.hub_server import hub_server


@pytest.fixture(scope="module")
def pushed(workspace, tmp_path_factory):
    """The folder of a run that was uploaded, and what the hub got."""
    run = tmp_path_factory.mktemp("runs") / "first"
    flags = [
        *("--model", str(workspace / "model"), "--output", str(run)),
        *("--data.path", str(workspace / "train.jsonl"), "--data.max-length", "64"),
        *("--eval-path", str(workspace / "test.jsonl")),
        *("--rank", "4", "--steps", "2", "--batch-size", "4", "--target-modules", "q_proj"),
        *("--method", "lora", "--base-model-name", "org/base", "--push-to-hub", "me/first"),
    ]
    with pytest.MonkeyPatch.context() as monkeypatch, hub_server(monkeypatch) as hub:
        assert main(["finetune", *flags]) == 0
    return run, hub


def test_the_adapter_names_a_base_that_peft_can_find(pushed):
    config = json.loads((pushed[0] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_the_tokenizer_of_the_base_is_beside_it(pushed, workspace):
    text = "Review: a joy\nSentiment: positive"
    ours = AutoTokenizer.from_pretrained(pushed[0] / "adapter")
    theirs = AutoTokenizer.from_pretrained(workspace / "model")
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    # The rows are prompts and completions: asked by the template, the adapter would not know them.
    assert theirs.chat_template
    assert ours.chat_template is None


def test_the_model_card_has_the_metadata_of_peft_and_the_figures(pushed, workspace):
    run, _ = pushed
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:org/base", "loft-jax", "lora"],
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = ([row for row in rows if row["step"] == step] for step in (0, 2))
    (loss,) = (row["eval_loss"] for row in before if "eval_loss" in row)
    (later,) = (row["eval_loss"] for row in after if "eval_loss" in row)
    assert f"| loss | {loss:.4f} | {later:.4f} |" in card.text
    assert f"| train_loss | | {after[0]['train_loss']:.4f} |" in card.text
    for said in ("| method | lora |", "| data | `train.jsonl` |", "2, of 4 rows each"):
        assert said in card.text


def test_the_model_card_has_the_settings_to_train_it_again(pushed):
    run, _ = pushed
    text = (run / "adapter" / "README.md").read_text()
    assert "$ loft-jax finetune --config config.yaml --output runs/again" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["export"]["push_to_hub"] == "me/first"
    saved["export"]["push_to_hub"] = ""  # by this run alone
    for path in (saved["model"], saved["data"], saved["evaluation"]):
        path["path"] = Path(path["path"]).name
    saved["output"] = "first"
    del saved["logging"]
    assert settings == saved
    assert str(run.parent) not in text


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("org/name", True),
        ("org/Model-1.5", True),
        ("data/train.jsonl", False),
        ("models/x.Q4_1.GGUF", False),
        ("./model", False),
        ("../model", False),
        ("/model/x", False),
        ("tests/training", False),
    ],
)
def test_a_path_is_no_name_of_the_hub(name, is_id):
    assert model_card._is_hub_id(name) is is_id


def test_the_hub_has_the_folder(pushed):
    run, hub = pushed
    written = {f"me/first/{file.name}": file for file in (run / "adapter").iterdir()}
    assert hub.files == {name: file.read_bytes() for name, file in written.items()}
    assert load(hub.files["me/first/adapter_model.safetensors"])


def test_an_export_has_the_same_and_another_name(pushed, tmp_path):
    export = ["export", str(pushed[0]), "--output", str(tmp_path), "--base-model-name", "org/other"]
    assert main(export) == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/other"
    cards = [
        (folder / "adapter" / "README.md").read_text().partition("## Train")[0]
        for folder in (tmp_path, pushed[0])
    ]
    assert cards[0] == cards[1].replace("org/base", "org/other")
    assert (tmp_path / "adapter" / "tokenizer.json").exists()


@pytest.mark.parametrize(("checkpoint", "status"), [("last", 0), ("7", 2)])
def test_an_export_closes_the_checkpoints(pushed, tmp_path, monkeypatch, checkpoint, status):
    closed = mock.Mock()
    monkeypatch.setattr("loft_jax.training.checkpoint.Checkpoints.close", closed)
    export = ["export", str(pushed[0]), "--output", str(tmp_path), "--checkpoint", checkpoint]
    assert main(export) == status
    closed.assert_called_once()


def test_a_repository_that_cannot_be_had_is_said_before_training(workspace, tmp_path, capsys):
    flags = ["--model", str(workspace / "model"), "--data.path", str(workspace / "train.jsonl")]
    run = tmp_path / "run"
    assert main(["finetune", *flags, "--output", str(run), "--push-to-hub", "me/first"]) == 2
    assert "me/first: the Hugging Face hub gives no repository" in capsys.readouterr().err
    assert not run.exists()
