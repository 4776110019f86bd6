import functools
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from loft_jax.data import DataConfig
from tests.flat_config import flat_config
from tests.tiny import save_tiny_llama, tiny_tokenizer

WORDS = ("joy", "plot", "acting", "film", "dull", "funny", "loud", "moving", "long", "honest")


@pytest.fixture(autouse=True, scope="module")
def _no_picture(request):
    """Drawing takes an eighth of the time of short runs; test_plot.py is for pictures."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = request.module.__name__ == "tests.training.test_plot"
        if not drawn and importlib.util.find_spec("matplotlib"):
            draw = "matplotlib.backends.backend_agg.FigureCanvasAgg.print_png"
            patch.setattr(draw, lambda _, file: Path(file).touch())
        yield


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A folder with a tiny model and sentences with a sentiment, to train and to test on."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny_llama(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 12)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                words = rng.choice(WORDS, rng.integers(2, 9))
                label = " positive" if "joy" in words or "funny" in words else " negative"
                row = {"prompt": f"Review: {' '.join(words)}\nSentiment:", "completion": label}
                file.write(json.dumps(row) + "\n")
    return folder


def short_run(workspace, folder, **changes):
    """The configuration of a short run on the tiny model, from names of flags."""
    fields = {
        "model": str(workspace / "model"),
        "data": DataConfig(str(workspace / "train.jsonl"), max_length=64, buckets=(64,)),
        "output": str(folder / "run"),
        "method": "lora",  # its update compiles in a tenth of the time
        "rank": 4,
        "target_modules": ("q_proj", "down_proj"),  # all would compile three times as long
        "learning_rate": 3e-3,
        "steps": 12,
        "batch_size": 8,
        "save_every": 4,
        "log_every": 1,
    }
    return flat_config(**{**fields, **changes})


@pytest.fixture
def make_config(workspace, tmp_path):
    """Builds the configuration of a short run in a folder of its own."""
    return functools.partial(short_run, workspace, tmp_path)
