"""Single runs: alone or after another the same, and infinite where the loss diverges."""

import dataclasses
import json

import numpy as np
import pytest
from transformers import ViTModel

from experiments.log import Cell
from experiments.matrix import MATRIX_TASKS, MatrixRuns
from experiments.registry import runs_of
from experiments.tasks import PretrainedTask
from tests.models.test_vit import save_vit


@pytest.mark.slow
def test_rates_of_one_method_share_a_step_and_are_what_they_say(assets, tiny):
    make = runs_of(tiny, assets)
    low, high = (make(Cell("tiny", "lora", 2, rate), test=False) for rate in (1e-3, 1e-2))
    again = runs_of(tiny, assets)(Cell("tiny", "lora", 2, 1e-2), test=True)
    assert high.validation == again.validation  # alone or after another, the same run
    assert high.train == again.train
    assert low.train[0] == pytest.approx(high.train[0], abs=1e-4)  # the same batch and start
    assert high.train[-1] < low.train[-1] < low.train[0]
    assert again.test["loss"] != again.validation["loss"]
    assert low.cost["trained_parameters"] < 20_000


def test_a_run_that_diverges_is_one_of_infinite_loss(assets, tiny):
    fell = runs_of(tiny, assets)(Cell("tiny", "full", 0, 1e30), test=True)
    assert fell.validation == fell.test == {"loss": np.inf}
    assert fell.diverged


@pytest.mark.slow
def test_images_are_a_task_like_others(tmp_path):
    save_vit(tmp_path / "model", ViTModel)
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "size": 16})
    )
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 12)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 160, (count, 16, 16, 3)) + 90 * labels[:, None, None, None]
        np.savez(tmp_path / f"{name}.npz", image=images.astype(np.uint8), label=labels)
    task = PretrainedTask(
        name="images",
        title="Images",
        model="model",
        data="",
        steps=20,
        batch_size=8,
        methods=("lora",),
        ranks=(2,),
        rates=(1e-2,),
        train=("train.npz", "train[8:]"),
        validation=("train.npz", "train[:8]"),
        test=("test.npz", "train"),
        measure="accuracy",
    )
    found = runs_of(task, tmp_path)(Cell("images", "lora", 2, 1e-2), test=True)
    assert found.test["accuracy"] == found.right["accuracy"].count("1") / 12 > 0.8
    assert found.train[-1] < found.train[0]


@pytest.mark.slow
def test_loft_at_full_rank_is_full_fine_tuning():
    task = dataclasses.replace(MATRIX_TASKS["square"], steps=60)
    run_of = MatrixRuns(task)
    distance = {
        method: run_of(Cell("square", method, 13, 1e-2), test=True).validation["distance"]
        for method in ("loft", "lora")
    }
    assert distance["loft"] < 1e-3 < 0.05 < distance["lora"]
