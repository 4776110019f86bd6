"""A run of image classification as its users see it: trained, resumed, evaluated, merged."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTModel

from loft_jax.cli import main
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.training.loop import finetune
from tests.flat_config import flat_config
from tests.models.test_vit import save_vit

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ViT without a head, and noise that is "blue" or "red"."""
    folder = tmp_path_factory.mktemp("images")
    save_vit(folder / "model", ViTModel)
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        for index in range(count):
            pixels = rng.integers(0, 160, (20, 20, 3))
            label = ("blue", "red")[index % 2]
            pixels[..., 0 if label == "red" else 2] += 60
            (folder / split / label).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels.astype(np.uint8))
            image.save(folder / split / label / f"{index}.png")
    return folder


def config(folder, output, **changes):
    flags = {
        "model": str(folder / "model"),
        "data": DataConfig(str(folder / "train"), random_resized_crop=True),
        "eval_path": str(folder / "test"),
        "eval_batch_size": 24,
        "output": str(output),
        "method": "lora",
        "rank": 4,
        "target_modules": ("q_proj", "v_proj"),  # all would compile three times as long
        "learning_rate": 1e-2,
        "steps": 30,
        "batch_size": 16,
        "save_every": 15,
    }
    return flat_config(**{**flags, **changes})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    return output, finetune(config(folder, output), progress=False)


def test_it_learns(trained):
    output, result = trained
    assert result.before["accuracy"] < 0.8 < 0.9 < result.after["accuracy"]
    settings = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == (None, ["classifier"])
    assert json.loads((output / "adapter" / "labels.json").read_text()) == ["blue", "red"]


def test_the_command_measures_the_adapter_alike(folder, trained, capsys):
    output, result = trained
    command = ["evaluate", "--adapter", str(output / "adapter"), "--batch-size", "24"]
    assert main([*command, "--data.path", str(folder / "test")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["accuracy"] == pytest.approx(result.after["accuracy"])
    assert found["nll"] == pytest.approx(result.after["loss"], rel=1e-4)
    assert found["count"] == 24


def test_the_merged_model_gives_in_torch_what_it_gives_here(folder, trained, tmp_path):
    output, result = trained
    merged = str(tmp_path / "merged")
    assert main(["merge", "--adapter", str(output / "adapter"), "--output", merged]) == 0
    model = AutoModelForImageClassification.from_pretrained(merged).eval()
    processor = AutoImageProcessor.from_pretrained(merged)
    files = sorted((folder / "test").glob("*/*.png"))
    inputs = processor([Image.open(file) for file in files], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    labels = torch.tensor([model.config.label2id[file.parent.name] for file in files])
    right = (logits.argmax(dim=1) == labels).float().mean().item()
    assert right == pytest.approx(result.after["accuracy"])
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(result.after["loss"], rel=1e-3)


def test_a_resumed_run_is_the_run_to_the_bit(folder, trained, tmp_path):
    """Random crops included."""
    whole, _ = trained
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "30")
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = finetune(config(folder, tmp_path / "run"), resume=True, progress=False)
    first = load_file(whole / "adapter" / "adapter_model.safetensors")
    second = load_file(again.trained / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_all_weights_train_and_the_processor_is_kept(folder, tmp_path):
    run = config(folder, tmp_path / "run", method="full", learning_rate=1e-3, steps=2)
    result = finetune(run, progress=False)
    settings = json.loads((result.trained / "config.json").read_text())
    assert settings["id2label"] == {"0": "blue", "1": "red"}
    assert json.loads((result.trained / "preprocessor_config.json").read_text()) == PROCESSOR


def test_a_model_without_a_processor_is_refused(folder, tmp_path):
    save_vit(tmp_path / "model", ViTModel)
    run = config(folder, tmp_path / "run", model=str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        finetune(run, progress=False)
