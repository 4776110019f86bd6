"""A tiny Llama loaded and trained on meshes of 8 CPU devices; prints what came of it as JSON.

The meshes are the arguments, as in "[8, 1, 1]".

A program of its own, since the number of devices of a process is set before JAX starts.
"""

import json
import sys
import tempfile
import tracemalloc

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from loft_jax import LoRAConfig, add_lora, load_pretrained, loft, save_pretrained
from loft_jax.hub.safetensors_io import Safetensors
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.models.quantized import quantize_kernels
from loft_jax.tasks.causal_lm import CausalLM, predicted
from loft_jax.training.checksum import tree_checksum
from loft_jax.training.config import MeshConfig
from loft_jax.training.mesh import make_mesh
from loft_jax.training.partition import split_model
from loft_jax.training.shardings import parameter_spec, step_shardings
from loft_jax.training.step import initial_state, make_step

# Three layers, so that no other axis has the size of the stack.
CONFIG = LlamaConfig(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)
STEPS, ROWS, LENGTH = 10, 16, 12
LOADED, QUANTIZED = ((2, 2, 2), (1, 4, 2)), (1, 4, 2)
# Large enough for its arrays to stand out among those of Python.
WIDE = LlamaConfig(512, 256, 1024, 4, 8, 8, 32, tie_word_embeddings=False)


def parts_of_a_model(quantization="none"):
    model = Llama(CONFIG, remat="full", rngs=nnx.Rngs(0))
    quantize_kernels(model, quantization)
    targets = ("k_proj", "down_proj")
    add_lora(model, LoRAConfig(rank=2, target_modules=targets), rngs=nnx.Rngs(1))
    parts = split_model(model, nnx.LoRAParam)
    keys = nnx.Rngs(2)
    # B from zero would make the first steps those of a sign, which rounding can turn.
    params = jax.tree.map(lambda x: 0.2 * jax.random.normal(keys(), x.shape), parts.params)
    return parts._replace(params=params)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield predicted(
            {
                "tokens": rng.integers(0, 400, (ROWS, LENGTH)).astype(np.int32),
                "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
                "segment_ids": np.ones((ROWS, LENGTH), np.int32),
                "loss_mask": np.ones((ROWS, LENGTH), np.float32),
            }
        )


def named(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}


def run(sizes, accumulation_steps=1, quantization="none"):
    parts = parts_of_a_model(quantization)
    tx = loft(1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    state, frozen, found = initial_state(parts, tx), parts.frozen, {}
    if sizes is None:
        step = make_step(parts, CausalLM().loss, tx, accumulation_steps)
    else:
        mesh = make_mesh(MeshConfig(*sizes))
        shardings = step_shardings(parts, tx, Llama.parameter_table(CONFIG), mesh)
        state = jax.device_put(state, shardings.state)
        frozen = jax.device_put(frozen, shardings.frozen)
        step = make_step(parts, CausalLM().loss, tx, accumulation_steps, shardings)
        text = step.lower(state, frozen, next(batches())).compile().as_text().splitlines()
        entry = text.index(next(line for line in text if line.startswith("ENTRY")))
        found["reduced_in_loops"] = [line for line in text[:entry] if " all-reduce(" in line]
        found["all_gathers"] = [line for line in text if " all-gather(" in line]
    losses = []
    for batch in batches():
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    arrays = {**named(state.params), **named(frozen)}
    found["bytes"] = {k: [x.nbytes, x.addressable_shards[0].data.nbytes] for k, x in arrays.items()}
    # But for the (r, r) matrices of the factored second moment, which are whole.
    moments = {k: x for k, x in named(state.opt_state).items() if ".gram." not in k}
    found["state_bytes"] = [
        sum(x.nbytes for x in moments.values()),
        sum(x.addressable_shards[0].data.nbytes for x in moments.values()),
    ]
    params = {k: np.asarray(x, np.float64) for k, x in named(state.params).items()}
    return {**found, "losses": losses, "digest": tree_checksum(frozen)}, params


def load(folder, sizes):
    """What is read of a model and held on the host to put it on a mesh, and whether it is it."""
    mesh = make_mesh(MeshConfig(*sizes))
    read, original = [0], (Safetensors.read, np.empty)

    def counted(self, *arguments):
        tensor = original[0](self, *arguments)
        read[0] += tensor.nbytes
        return tensor

    def placement(table, path, shape):
        return NamedSharding(mesh, parameter_spec(path, shape, table, mesh))

    def unaligned(shape, dtype=float, *how, empty=np.empty, **others):
        """What a CPU device has to copy; an array aligned to 64 bytes it takes for its own."""
        if dtype != np.float32:
            return empty(shape, dtype, *how, **others)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = empty(size + 64, np.uint8)
        start = (16 - memory.ctypes.data) % 64
        return memory[start : start + size].view(dtype).reshape(shape)

    Safetensors.read, np.empty = counted, unaligned
    load_pretrained(folder, placement=placement)  # what is imported and compiled once
    read[0] = 0
    tracemalloc.start()
    model = load_pretrained(folder, placement=placement)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    Safetensors.read, np.empty = original
    arrays = nnx.to_pure_dict(nnx.state(model))
    expected = nnx.to_pure_dict(nnx.state(load_pretrained(folder)))
    shards = jax.tree.map(lambda x: x.addressable_shards[0].data.nbytes, arrays)
    return {
        "read": read[0],
        "peak": peak,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(expected)),
        "largest_shard": max(jax.tree.leaves(shards)),
        "held_by_a_device": sum(jax.tree.leaves(shards)),
        "same": bool(jax.tree.all(jax.tree.map(np.array_equal, arrays, expected))),
    }


def main():
    results = {}
    folder = tempfile.mkdtemp()
    save_pretrained(folder, Llama(WIDE, rngs=nnx.Rngs(0)))
    alone, expected = run(None)
    for sizes in (tuple(json.loads(text)) for text in sys.argv[1:]):
        found, params = run(sizes, accumulation_steps=2 if sizes[0] > 1 else 1)
        found["distance"] = max(
            float(np.linalg.norm(params[k] - x) / np.linalg.norm(x)) for k, x in expected.items()
        )
        start = named(parts_of_a_model().params)
        found["moved"] = min(
            float(np.linalg.norm(x - start[k]) / np.linalg.norm(x)) for k, x in expected.items()
        )
        if sizes in LOADED:
            found["loaded"] = load(folder, sizes)
        if sizes == QUANTIZED:
            both = [run(where, quantization="nf4")[0] for where in (None, sizes)]
            found["quantized"] = [one["losses"] for one in both]
        results["x".join(map(str, sizes))] = found
    print(json.dumps({"alone": alone, **results}))


if __name__ == "__main__":
    main()
