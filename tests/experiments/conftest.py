import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.matrix import MATRIX_TASKS
from experiments.registry import TASKS
from experiments.tasks import PretrainedTask
from tests.tiny import save_tiny_llama, tiny_tokenizer


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    """A model and texts in the places where the task looks for its own."""
    folder = tmp_path_factory.mktemp("assets")
    save_tiny_llama(folder / "model", initializer_range=0.05)
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    for name, rows in (("train", 40), ("validation", 6), ("test", 6)):
        texts = [" ".join(rng.choice(["joy", "plot", "film", "dull"], 12)) for _ in range(rows)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / "texts" / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def tiny():
    """A small task among the others, and a matrix that is done at once."""
    task = PretrainedTask(
        name="tiny",
        title="Tiny",
        model="model",
        data="texts",
        max_length=32,
        packing=True,
        steps=20,
        batch_size=4,
        methods=("lora", "full"),
        ranks=(2,),
        rates=(1e-3, 1e-2),
        seeds=(0,),
        final_seeds=(0, 1),
    )
    matrix = dataclasses.replace(
        MATRIX_TASKS["matrix"], shape=(24, 16), target_rank=4, ranks=(4,), steps=40
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "tiny", task)
        patch.setitem(TASKS, "matrix", matrix)
        yield task
