"""Ten LoFT steps of a tiny Llama on meshes of 8 CPU devices; prints what came of it as JSON.

A program of its own, since the number of devices of a process is set before JAX starts.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx

from loft_jax import LoRAConfig, add_lora, loft
from loft_jax.models import Llama, LlamaConfig
from loft_jax.training.config import MeshConfig
from loft_jax.training.mesh import make_mesh
from loft_jax.training.shardings import step_shardings
from loft_jax.training.step import initial_state, make_step, predicted, split_model

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


def parts_of_a_model():
    model = Llama(CONFIG, remat="full", rngs=nnx.Rngs(0))
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


def run(sizes, accumulation_steps=1):
    parts = parts_of_a_model()
    tx = loft(1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    state, frozen, found = initial_state(parts, tx), parts.frozen, {}
    if sizes is None:
        step = make_step(parts, tx, accumulation_steps)
    else:
        mesh = make_mesh(MeshConfig(*sizes))
        shardings = step_shardings(parts, tx, CONFIG, mesh)
        state = jax.device_put(state, shardings.state)
        frozen = jax.device_put(frozen, shardings.frozen)
        step = make_step(parts, tx, accumulation_steps, shardings)
        step = step.lower(state, frozen, next(batches())).compile()
        text = step.as_text().splitlines()
        found["all_gathers"] = [line for line in text if " all-gather(" in line]
    losses = []
    for batch in batches():
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    arrays = {**named(state.params), **named(frozen)}
    found["bytes"] = {k: [x.nbytes, x.addressable_shards[0].data.nbytes] for k, x in arrays.items()}
    moments = named(state.opt_state)
    found["state_bytes"] = [
        sum(x.nbytes for x in moments.values()),
        sum(x.addressable_shards[0].data.nbytes for x in moments.values()),
    ]
    params = {k: np.asarray(x, np.float64) for k, x in named(state.params).items()}
    return {**found, "losses": losses}, params


def main():
    results = {}
    alone, expected = run(None)
    for sizes in json.loads(sys.argv[1]):
        found, params = run(sizes, accumulation_steps=2 if sizes == [2, 2, 2] else 1)
        found["distance"] = max(
            float(np.linalg.norm(params[k] - x) / np.linalg.norm(x)) for k, x in expected.items()
        )
        start = named(parts_of_a_model().params)
        found["moved"] = min(
            float(np.linalg.norm(x - start[k]) / np.linalg.norm(x)) for k, x in expected.items()
        )
        results["x".join(map(str, sizes))] = found
    print(json.dumps({"alone": alone, **results}))


if __name__ == "__main__":
    main()
