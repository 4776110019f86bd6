"""A model trained on one device and on meshes of eight; prints how far they are apart.

A program of its own, since the number of devices of a process is set before JAX starts.
"""

import json
import sys

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from loft_jax import LoRAConfig, add_lora, load_pretrained, loft
from loft_jax.data import DataConfig
from loft_jax.methods import LoFT
from loft_jax.tasks import TASKS, Given
from loft_jax.training.config import MeshConfig
from loft_jax.training.mesh import make_mesh
from loft_jax.training.model import trained_variables
from loft_jax.training.partition import split_model
from loft_jax.training.shardings import parameter_spec, step_shardings
from loft_jax.training.step import initial_state, make_step

ROWS, LENGTH, STEPS = 8, 12, 3


def inputs_of(task, seed):
    """A random batch of the shapes that the task says."""
    rng = np.random.default_rng(seed)
    values = {}
    for name, x in task.shapes(ROWS, LENGTH).items():
        if name == "pixel_values":
            values[name] = rng.normal(size=x.shape).astype(x.dtype)
        elif np.issubdtype(x.dtype, np.floating):
            values[name] = np.ones(x.shape, x.dtype)
        else:
            most = {"tokens": 400, "targets": 400, "labels": 2, "token_types": 2}.get(name, LENGTH)
            values[name] = rng.integers(0, most, x.shape).astype(x.dtype)
    values["segment_ids"] = np.ones((ROWS, LENGTH), np.int32)
    if "positions" in values:
        values["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return values


def train(folder, task, sizes):
    mesh = None if sizes is None else make_mesh(MeshConfig(*sizes))

    def placement(table, path, shape):
        return NamedSharding(mesh, parameter_spec(path, shape, table, mesh))

    model = load_pretrained(
        folder, head=task.head, labels=task.labels, placement=None if mesh is None else placement
    )
    add_lora(model, LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    parts = split_model(model, trained_variables(LoFT(), task.head_modules(model)))
    keys = nnx.Rngs(2)
    # B from zero would make the first steps those of a sign, which rounding can turn.
    params = jax.tree.map(lambda x: 0.2 * jax.random.normal(keys(), x.shape), parts.params)
    parts, tx = parts._replace(params=params), loft(1e-2, eps=1e-3, max_grad_norm=1.0)
    state, frozen = initial_state(parts, tx), parts.frozen
    shardings = None
    if mesh is not None:
        shardings = step_shardings(parts, tx, model.table, mesh)
        state = jax.device_put(state, shardings.state)
        frozen = jax.device_put(frozen, shardings.frozen)
    step = make_step(parts, task.loss, tx, 1, shardings)
    for number in range(STEPS):
        state, metrics = step(state, frozen, inputs_of(task, number))
    split = [x.nbytes / x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(frozen)]
    return jax.tree.map(np.asarray, state.params), float(metrics["loss"]), max(split)


def main():
    folder, name = sys.argv[1:]
    labels = ("no", "yes") if TASKS[name].trains_head else ()
    task = TASKS[name].make(Given(DataConfig(""), labels=labels))
    alone, loss, _ = train(folder, task, None)
    found = {"loss": loss}
    for sizes in ([1, 8, 1], [2, 2, 2]):
        params, loss, split = train(folder, task, sizes)
        far = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(x), alone, params)
        found["x".join(map(str, sizes))] = {
            "loss": loss,
            "distance": float(max(jax.tree.leaves(far))),
            "split": split,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
