"""What is spoilt, and the public function that reads it."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from loft_jax.data import DataConfig, eval_batches, load_examples, tokenize
from loft_jax.hub import (
    load_model_config,
    load_peft_adapter,
    load_pretrained,
    load_tokenizer,
    save_peft_adapter,
)
from loft_jax.hub.image_processor import ImageProcessor
from loft_jax.hub.peft_base import read_labels
from loft_jax.hub.pretrained import stored_dtype
from loft_jax.lora import LoRAConfig, add_lora
from loft_jax.tasks import ImageClassification
from loft_jax.tasks.task import Given
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.config import AdapterConfig, FinetuneConfig, ModelConfig
from loft_jax.training.config_io import config_from_dict, load_config, save_config
from loft_jax.training.metrics import read_metrics
from tests.tiny import save_tiny_llama, tiny_tokenizer

ROWS = [
    {"prompt": f"Is {i} even?", "completion": " yes" if i % 2 else " no", "source": i}
    for i in range(6)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"And {i}?"},
            {"role": "assistant", "content": "No."},
        ],
        "tools": [{"type": "function", "function": {"name": "even", "parameters": {}}}],
    }
    for i in range(3)
]

IMAGES = ("png", "jpeg", "gif", "bmp", "tiff", "webp")


class Kind(NamedTuple):
    """Files below the folder of good ones, one of which is spoilt, and what reads them there."""

    files: tuple[str, ...]
    read: Callable[[Path], object]


def make_good(folder: Path) -> None:
    """Writes a good file of every kind."""
    import gguf
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    model = save_tiny_llama(folder / "model")
    tokenizer.save_pretrained(model)
    sharded = folder / "sharded"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="60KB")

    adapted = add_lora(_base(), LoRAConfig(rank=2, target_modules=["0", "1"]), rngs=nnx.Rngs(0))
    save_peft_adapter(folder / "adapter", adapted, base_model="base")
    (folder / "adapter" / "labels.json").write_text('["negative", "positive"]')

    data = folder / "data"
    data.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (data / "rows.jsonl").write_text(lines)
    (data / "rows.json").write_text(json.dumps(ROWS))
    (data / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    cells = [[row["prompt"], row["completion"]] for row in ROWS]
    for name, separator in (("rows.csv", ","), ("rows.tsv", "\t")):
        text = "".join(separator.join(row) + "\n" for row in [["prompt", "completion"], *cells])
        (data / name).write_text(text)
    (data / "rows.txt").write_text("One.\nTwo.\n")
    pq.write_table(pa.Table.from_pylist(ROWS), data / "rows.parquet")
    (data / "sst2").mkdir()
    (data / "sst2" / "train.tsv").write_text("sentence\tlabel\na fine film\t1\nno\t0\n")

    pixels = np.arange(4 * 12 * 10 * 3, dtype=np.uint8).reshape(4, 12, 10, 3)
    np.savez_compressed(data / "images.npz", image=pixels, label=[0, 1, 1, 0])
    for form in IMAGES:
        Image.fromarray(pixels[0]).save(data / f"image.{form}")
    size = {"shortest_edge": 8}
    settings = {"image_processor_type": "BitImageProcessor", "size": size, "crop_size": 6}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    lora = AdapterConfig(rank_pattern={"q_proj": 2})
    config = FinetuneConfig(ModelConfig("model"), DataConfig("rows.jsonl"), "out", lora=lora)
    save_config(config, folder / "config.yaml")
    (folder / "metrics.jsonl").write_text('{"step": 1, "train_loss": 2.5}\n{"step": 2}\n')

    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    for key, value in {
        "block_count": 1, "embedding_length": 8, "feed_forward_length": 8, "context_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 2,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", "</s>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    table = jax.random.normal(jax.random.key(0), (4, 8))
    writer.add_tensor("token_embd.weight", jax.device_get(table))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with contextlib.closing(Checkpoints(folder / "run" / "checkpoints")) as checkpoints:
        checkpoints.save(_state(), {"config": {}, "data": {}}, 1.5)
        checkpoints.wait()


def _state() -> object:
    from loft_jax.training.step import TrainState

    x = jax.numpy.arange(6.0)
    return TrainState(jax.numpy.int32(1), jax.numpy.zeros(2, "int32"), {"a": x}, {"m": x}, {})


def _base() -> nnx.Module:
    return nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0)))


@functools.cache
def _tokenizer() -> object:
    return tiny_tokenizer()


def _adapter(folder: Path) -> None:
    load_peft_adapter(folder / "adapter", _base())


def _config(folder: Path) -> None:
    load_model_config(folder / "model")
    stored_dtype(folder / "model")


def _weights(folder: Path) -> None:
    load_pretrained(folder / "model")


def _sharded(folder: Path) -> None:
    stored_dtype(folder / "sharded")


def _tokenizer_folder(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "model")
    _tokenized(ROWS, tokenizer)
    if tokenizer.chat_template is not None:
        _tokenized(CHATS, tokenizer)


def _tokenized(rows: object, tokenizer: object) -> None:
    config = DataConfig("rows", max_length=64)
    eval_batches(tokenize(rows, tokenizer, config), config, batch_size=2)[0]


def _gguf(folder: Path) -> None:
    load_model_config(folder / "m.gguf")
    stored_dtype(folder / "m.gguf")
    load_tokenizer(folder / "m.gguf")


def _yaml(folder: Path) -> None:
    config_from_dict(load_config(folder / "config.yaml"))


def _metrics(folder: Path) -> None:
    read_metrics(folder / "metrics.jsonl")


def _data(folder: Path, name: str) -> None:
    rows = load_examples(DataConfig(str(folder / "data" / name)))
    Given(DataConfig(""), rows=rows).asks_choices  # noqa: B018
    _tokenized(rows, _tokenizer())


def _checkpoint(folder: Path) -> None:
    with contextlib.closing(Checkpoints(folder / "run" / "checkpoints", read_only=True)) as kept:
        kept.best_step()
        for step in kept.steps():
            kept.restore(step, _state())


def _labels(folder: Path) -> None:
    read_labels(folder / "adapter")


def _preset(folder: Path) -> None:
    file = str(folder / "data" / "sst2" / "train.tsv")
    load_examples(DataConfig(file, preset="sst2"))


def _processed(rows: object, folder: Path, labels: list[str]) -> None:
    processor = ImageProcessor.read(folder / "preprocessor_config.json")
    config = DataConfig("images", random_resized_crop=True)
    data = ImageClassification(labels).tokenize(rows, processor, config)
    data.example(0)
    data.augmented(0, np.random.default_rng(0))


def _arrays(folder: Path) -> None:
    rows = load_examples(DataConfig(str(folder / "data" / "images.npz")))
    _processed(rows, folder, ["0", "1"])


def _images(folder: Path) -> None:
    for form in IMAGES:
        rows = [{"image": folder / "data" / f"image.{form}", "label": "cat"}]
        _processed(rows, folder, ["cat", "dog"])


def _of_data(name: str) -> Kind:
    return Kind((f"data/{name}",), functools.partial(_data, name=name))


KINDS = {
    "adapter config": Kind(("adapter/adapter_config.json",), _adapter),
    "adapter weights": Kind(("adapter/adapter_model.safetensors",), _adapter),
    "model config": Kind(("model/config.json", "model/generation_config.json"), _config),
    "weights": Kind(("model/model.safetensors",), _weights),
    "index": Kind(("sharded/model.safetensors.index.json",), _sharded),
    "tokenizer": Kind(("model/tokenizer.json", "model/tokenizer_config.json"), _tokenizer_folder),
    "template": Kind(("model/chat_template.jinja",), _tokenizer_folder),
    "gguf": Kind(("m.gguf",), _gguf),
    "yaml": Kind(("config.yaml",), _yaml),
    "metrics": Kind(("metrics.jsonl",), _metrics),
    "jsonl": _of_data("rows.jsonl"),
    "json": _of_data("rows.json"),
    "chats": _of_data("chats.jsonl"),
    "csv": _of_data("rows.csv"),
    "tsv": _of_data("rows.tsv"),
    "txt": _of_data("rows.txt"),
    "parquet": _of_data("rows.parquet"),
    "preset": Kind(("data/sst2/train.tsv",), _preset),
    "arrays": Kind(("data/images.npz",), _arrays),
    "images": Kind(tuple(f"data/image.{form}" for form in IMAGES), _images),
    "processor": Kind(("preprocessor_config.json",), _images),
    "labels": Kind(("adapter/labels.json",), _labels),
    "checkpoint": Kind((), _checkpoint),
}
"""By name; of a checkpoint, any file of its folder."""


def files_of(kind: str, folder: Path) -> list[Path]:
    """The files of a kind that are spoilt, one at a time, relative to the folder of good ones."""
    if KINDS[kind].files:
        return [Path(name) for name in KINDS[kind].files]
    run = folder / "run"
    return sorted(path.relative_to(folder) for path in run.rglob("*") if path.is_file())
