"""Measures what base weights take: on each device of a mesh, on the host while they load, in bits.

Loads a model onto meshes of CPU devices, each in a process of its own, and as int8 and nf4; adds
one line a case to `memory.jsonl` in the folder of results, and prints a table. On CPUs the arrays
of all devices are in the memory of the host; what it held beyond them at its peak, files that are
mapped apart, is what loading takes. The model is written as safetensors first.

    python -m benchmarks.memory
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

CASES = (
    ("1,1,1", "none"), ("1,8,1", "none"), ("1,4,2", "none"), ("2,2,2", "none"),
    ("1,1,1", "int8"), ("1,1,1", "nf4"), ("1,4,2", "nf4"),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        model: Folder, GGUF file or hub id.
        data: JSON lines whose prompts are texts for the loss of the model, with its weights as they
            are and quantized.
        results: Folder of the results: add to those that are kept, or start others.
        case: One mesh and quantization, as in "1,8,1 nf4", in this process; by default all.
    """

    model: str = "assets/SmolLM2-135M-Instruct.Q4_1.gguf"
    data: str = "assets/reviews/test.jsonl"
    results: Path = Path("benchmarks/results")  # as in history.py, whose JAX comes after the flags
    case: str = ""


def measure(options: Options) -> dict[str, Any]:
    """One case."""
    sizes, quantization = options.case.split()
    devices = 1
    for size in sizes.split(","):
        devices *= int(size)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    from loft_jax.data import DataConfig, eval_batches, load_examples, tokenize
    from loft_jax.hub import load_tokenizer
    from loft_jax.tasks.causal_lm import CausalLM, perplexity
    from loft_jax.training.config import (
        AdapterConfig,
        FinetuneConfig,
        MeshConfig,
        ModelConfig,
    )
    from loft_jax.training.mesh import make_mesh
    from loft_jax.training.model import load_model
    from loft_jax.training.partition import split_model

    config = FinetuneConfig(
        ModelConfig(
            options.model,
            param_dtype="bfloat16",
            quantization=quantization,  # type: ignore[arg-type]  # checked there
        ),
        DataConfig(options.data, max_length=128),
        "",
        lora=AdapterConfig(target_modules=("q_proj",)),
    )
    mesh = make_mesh(MeshConfig(*map(int, sizes.split(","))))
    jax.device_put(1.0).block_until_ready()
    with _Peak() as host:
        model: Any = load_model(config, CausalLM(), mesh)
    from flax import nnx

    frozen = split_model(model, nnx.LoRAParam).frozen
    arrays = [x for x in jax.tree.leaves(frozen) if not _is_key(x)]
    shards = [x.addressable_shards[0].data for x in arrays]
    held = sum(shard.nbytes for x in arrays for shard in (s.data for s in x.addressable_shards))
    line: dict[str, Any] = {
        "weights": sum(map(_bytes, arrays)),
        "on_a_device": sum(map(_bytes, shards)),
        "largest_shard": max(map(_bytes, shards)),
        "host_beside": host.peak - host.before - held,
    }
    if devices == 1:
        rows = tokenize(load_examples(config.data), load_tokenizer(config.model.path), config.data)
        model.eval()
        line["nll"] = perplexity(model, eval_batches(rows, config.data, batch_size=16)).nll
    return line


def _is_key(x: Any) -> bool:
    import jax

    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _bytes(x: Any) -> int:
    """As XLA packs them: two 4-bit numbers a byte."""
    return x.nbytes // 2 if "int4" in str(x.dtype) else x.nbytes


class _Peak:
    """The most memory that is no mapped file, looked at every few milliseconds."""

    def __enter__(self) -> "_Peak":
        self.before = self.peak = _held()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.peak = max(self.peak, _held())


def _held() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status; expected Linux")


def main(options: Options) -> None:
    """Measures all cases and prints them."""
    if options.case:
        print(json.dumps(measure(options)))
        return
    from benchmarks.history import History, table
    from loft_jax import load_pretrained, load_tokenizer, save_pretrained

    history = History(options.results, "memory")
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_pretrained(
            model,
            load_pretrained(options.model, param_dtype="bfloat16"),
            load_tokenizer(options.model),
        )
        # Of all of the text, not of the labels that the model does not know yet.
        texts = Path(folder) / "texts.jsonl"
        rows = map(json.loads, Path(options.data).read_text(encoding="utf-8").splitlines())
        texts.write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in rows))
        for sizes, quantization in CASES:
            words = [f"--model={model}", f"--data={texts}", f"--case={sizes} {quantization}"]
            command = [sys.executable, "-m", "benchmarks.memory", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(done.stdout)
            case = {"model": options.model, "mesh": sizes, "quantization": quantization}
            history.append(case, measured)
            cells = [sizes.replace(",", " x "), quantization.replace("none", "bfloat16")]
            names = ("weights", "on_a_device", "largest_shard", "host_beside")
            cells += [f"{measured[name] / 2**20:.1f} MiB" for name in names]
            lines.append([*cells, f"{measured['nll']:.4f}" if "nll" in measured else ""])
    head = ("mesh", "stored in", "weights", "on a device", "largest shard", "host beside", "NLL")
    print("\n".join(table(head, lines)))


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.memory", description=__doc__))
