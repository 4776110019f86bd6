"""Runs on models, tokenizers and examples that are given as objects."""

import dataclasses
import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from flax import nnx
from PIL import Image

import loft_jax
from loft_jax.cli import main
from loft_jax.data import DataConfig
from loft_jax.data.images import open_image
from loft_jax.data.source import given_examples
from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, load_pretrained, load_tokenizer
from loft_jax.training.config import FinetuneConfig, ModelConfig
from loft_jax.training.loop import finetune
from loft_jax.training.model import base_fingerprint
from tests.training.processes import adapter, losses


@pytest.fixture(scope="module")
def rows(workspace):
    return [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def test_rows(workspace):
    return [json.loads(line) for line in (workspace / "test.jsonl").read_text().splitlines()]


def without_paths(config, **changes):
    """The same run, of objects."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=""),
        data=dataclasses.replace(config.data, path=""),
        evaluation=dataclasses.replace(config.evaluation, path=""),
        **changes,
    )


def assert_equal_adapters(one, other):
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)


def test_a_run_of_objects_is_that_of_their_files(make_config, workspace, rows, test_rows, tmp_path):
    """To the bit, from an iterable and a Dataset; and it resumes from the files."""
    files = make_config(
        steps=4, save_every=2, keep_last=9, eval_path=str(workspace / "test.jsonl"), eval_every=2
    )
    expected = finetune(files, progress=False)
    config = without_paths(files, output=str(tmp_path / "objects"))
    model, tokenizer = load_pretrained(files.model.path), load_tokenizer(files.model.path)
    before = base_fingerprint(model)
    objects = {"model": model, "tokenizer": tokenizer, "data": iter(rows)}
    objects["held_out"] = Dataset.from_list(test_rows)
    result = finetune(config, **objects, progress=False)
    assert base_fingerprint(model) == before  # neither changed nor deleted
    assert (result.before, result.after) == (expected.before, expected.after)
    assert result.folder == tmp_path / "objects"
    assert [row["step"] for row in result.history] == [0, 1, 2, 2, 3, 4, 4]
    assert losses(result.folder) == losses(files.output)
    assert_equal_adapters(result.folder, files.output)
    again = load_peft_adapter(result.trained, load_pretrained(files.model.path))
    tokens = jnp.arange(6)[None]
    np.testing.assert_allclose(result.model(tokens), again(tokens), atol=1e-5)
    shutil.rmtree(tmp_path / "objects" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "objects" / "adapter")
    again = dataclasses.replace(files, output=config.output)
    finetune(again, resume="auto", progress=False)
    assert_equal_adapters(config.output, files.output)
    shutil.rmtree(tmp_path / "objects" / "checkpoints" / "4")
    others = {**objects, "data": [*rows[1:], rows[0]]}  # the iterator is at its end
    with pytest.raises(InputError, match=r"cannot resume with another data\.path"):
        finetune(config, **others, resume=True, progress=False)


def test_a_cell_may_run_again_and_in_a_thread(make_config, rows):
    """As a notebook runs it off the main thread: signals are left alone, and nothing is left."""
    config = without_paths(make_config(steps=2))
    config = dataclasses.replace(config, model=make_config().model)
    results, before = [], threading.active_count()

    def cell():
        results.append(finetune(config, data=rows, resume="auto", progress=False))

    for _ in range(2):
        thread = threading.Thread(target=cell)
        thread.start()
        thread.join()
    first, second = results
    assert (first.steps, first.after, first.history) == (second.steps, second.after, second.history)
    assert jax.sharding.get_mesh().empty
    assert threading.active_count() <= before + 1
    with pytest.raises(InputError, match=r"holds a run at step 2 already; resume it .*resume=True"):
        finetune(config, data=rows, progress=False)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 32, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(self.dropout(nnx.relu(self.up(x))))


def cross_entropy(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


def numbers(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 8))
    y = np.asarray(MLP(nnx.Rngs(7))(jnp.asarray(x, jnp.float32))).argmax(-1)
    return [{"x": row, "y": int(label)} for row, label in zip(x, y, strict=True)]


def test_a_model_and_a_loss_of_ones_own(make_config, tmp_path, capsys):
    """With held-out rows that do not fill a batch, and an adapter that is read back."""
    config = without_paths(
        make_config(
            data=DataConfig(),
            steps=40,
            learning_rate=2e-2,
            target_modules=("all-linear",),
            save_every=20,
            keep_last=9,
        )
    )
    model, held_out = MLP(nnx.Rngs(0)), numbers(21, seed=1)
    objects = {"model": model, "data": numbers(64, seed=0), "held_out": held_out}
    result = finetune(config, **objects, loss=cross_entropy, progress=False)
    assert result.after["loss"] < 0.7 * result.before["loss"]
    still = nnx.clone(model)
    still.eval()
    x, y = (np.stack([row[name] for row in held_out]) for name in ("x", "y"))
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}
    assert result.before["loss"] == pytest.approx(
        float(cross_entropy(still, batch).mean()), abs=1e-5
    )
    expected = float(cross_entropy(result.model, batch).mean())
    assert result.after["loss"] == pytest.approx(expected, abs=1e-5)
    read = load_peft_adapter(result.trained, still)
    np.testing.assert_allclose(read(batch["x"]), result.model(batch["x"]), atol=1e-5)
    weights = adapter(result.folder)
    shutil.rmtree(result.folder / "checkpoints" / "40")
    finetune(config, **objects, loss=cross_entropy, resume=True, progress=False)
    for name, tensor in adapter(result.folder).items():
        np.testing.assert_array_equal(tensor, weights[name], err_msg=name)
    export = ["export", str(result.folder), "--output", str(tmp_path / "x")]
    assert main(export) == 2
    assert "its model or its loss was given as an object in Python" in capsys.readouterr().err
    changed = {**objects, "model": MLP(nnx.Rngs(3))}
    with pytest.raises(InputError, match="cannot resume with another model"):
        finetune(config, **changed, loss=cross_entropy, resume=True, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": None}, r"data\.path is empty, expected it, or data as an object"),
        ({"model": None}, "loss is given without a model"),
        ({"loss": None}, "model is a MLP, which belongs to no family of loft_jax.models"),
        ({"model": "org/model"}, "model is 'org/model', expected an NNX model"),
        ({"tokenizer": "x"}, "tokenizer is 'x', and is not used with a loss"),
        ({"data": "rows.jsonl"}, "data is 'rows.jsonl', expected a Dataset or an iterable of rows"),
        ({"data": [[1]]}, r"data: row 0 is \[1\], expected a mapping of fields"),
        ({"data": []}, "data holds no examples"),
        ({"held_out": []}, "held_out holds no examples"),
        (
            {"data": DatasetDict(test=Dataset.from_list([{"x": 1}]))},
            "data: split 'train' cannot be read",
        ),
        ({"loss": lambda model, batch: (batch["x"], {})}, "loss gives a tuple, expected one array"),
        ({"data": [{"x": "a"}]}, "row 0: field 'x' is 'a'; expected numbers of one shape"),
        ({"data": [{"x": [1.0]}, {"x": [1.0, 2.0]}]}, r"row 1: field 'x' has the shape \(2,\), ex"),
        ({"data": [{"x": 1}, {"x": 2**31}]}, "row 1: field 'x' has 2147483648; expected integers"),
        ({"data": [{"x": 1}, {"y": 1}]}, r"row 1: has the fields \['y'\], expected those of row 0"),
        ({"model": nnx.Linear(8, 4, rngs=nnx.Rngs(0))}, "PEFT adapts modules inside one"),
        ({"callbacks": [print]}, r"callbacks\[0\] is <built-in function print>, expected an"),
        ({"loss": lambda model, batch: batch["x"].mean()}, r"loss gives an array of shape \(\) fo"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(make_config, given, message):
    objects = {"model": MLP(nnx.Rngs(0)), "data": numbers(8, seed=0), "loss": cross_entropy}
    config = without_paths(make_config(data=DataConfig(), target_modules=("all-linear",)))
    with pytest.raises(InputError, match=message):
        finetune(config, **{**objects, **given}, progress=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_length", 64), ("chat", True), ("prompt", "{x}"), ("label_field", "y")],
)
def test_settings_of_texts_are_refused_with_a_loss(make_config, name, value):
    config = without_paths(make_config(data=DataConfig(**{name: value})))
    with pytest.raises(InputError, match=rf"data\.{name} is .*, and is not used with a loss"):
        finetune(config, model=MLP(nnx.Rngs(0)), data=[], loss=cross_entropy, progress=False)


def test_what_is_given_twice_is_named(make_config, rows):
    config = make_config()
    with pytest.raises(InputError, match=r"data\.path is '.*', and data is given as an object"):
        finetune(config, data=rows, progress=False)
    model = load_pretrained(config.model.path)
    own = without_paths(config)
    with pytest.raises(InputError, match="model is given as an object without a tokenizer"):
        finetune(own, model=model, data=rows, progress=False)
    half = dataclasses.replace(own, model=ModelConfig("base", dtype="bfloat16"))
    with pytest.raises(InputError, match=r"model\.dtype is 'bfloat16', but the model is given as"):
        finetune(half, model=model, data=rows, progress=False)
    loft_jax.add_lora(model, loft_jax.LoRAConfig(2), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"model has an adapter at .*, expected one without"):
        finetune(own, model=model, data=rows, progress=False)


def test_all_weights_of_a_given_model_train_in_a_copy(make_config, rows):
    config = without_paths(make_config(method="full", steps=2))
    folder = make_config().model.path
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    result = finetune(config, model=model, tokenizer=tokenizer, data=rows, progress=False)
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(model(tokens), load_pretrained(folder)(tokens))
    assert jnp.abs(result.model(tokens) - model(tokens)).max() > 1e-4
    np.testing.assert_allclose(
        load_pretrained(result.trained)(tokens), result.model(tokens), atol=1e-5
    )


def test_splits_of_a_dataset(rows):
    splits = DatasetDict(train=Dataset.from_list(rows[:4]), validation=Dataset.from_list(rows[4:7]))
    assert len(given_examples(splits, DataConfig())) == 4
    assert len(given_examples(splits, DataConfig(split="validation[:2]"))) == 2
    assert len(given_examples(splits["train"], DataConfig(split="train[1:]"))) == 3
    with pytest.raises(InputError, match="data: split is 'train', but an iterable of rows"):
        given_examples(rows, DataConfig(split="train"))


def test_images_of_a_dataset_are_decoded_by_it(tmp_path):
    """Also those that it only names, since it is the user's own; files of strangers are not."""
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    features = Features({"image": ImageFeature(), "label": Value("string")})
    images = Dataset.from_list([{"image": str(tmp_path / "red.png"), "label": "red"}], features)
    (row,) = given_examples(images.with_format("numpy"), DataConfig())
    assert open_image(row["image"], "row 0").getpixel((0, 0)) == (255, 0, 0)


def test_the_names_of_the_package_run():
    config = loft_jax.FinetuneConfig(loft_jax.ModelConfig(), loft_jax.DataConfig(), Path("run"))
    assert config == FinetuneConfig(ModelConfig(), DataConfig(), "run")
    assert loft_jax.finetune is finetune
    assert loft_jax.__version__
