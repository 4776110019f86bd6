"""A whole run on a model, rows and a loss of your own, with a callback that ends it.

`finetune` gives any NNX model what a language model has: LoFT, checkpoints to resume from, a log, a
plot, an adapter on disk. `resume="auto"` lets the program be started again.
"""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import loft_jax


class StopBelow(loft_jax.Callback):
    """Ends a run once its held-out loss is low enough."""

    def on_evaluate(self, run: loft_jax.Progress, metrics: Mapping, score: float | None) -> None:
        """Compares the loss."""
        if metrics["loss"] < 0.5:
            run.stop(f"a held-out loss of {metrics['loss']:.3f}")


def mlp(seed: int) -> nnx.Module:
    """Any module does: layers are found by their types. This one has four classes."""
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(nnx.Linear(16, 64, rngs=rngs), nnx.relu, nnx.Linear(64, 4, rngs=rngs))


def cross_entropy(model: nnx.Module, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Gives the loss of each row, (b,)."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"])


def main(folder: str = "runs/own_model") -> None:
    """Teaches a random model the classes of another one."""
    x = np.random.default_rng(0).normal(size=(640, 16)).astype(np.float32)
    labels = np.asarray(mlp(7)(jnp.asarray(x)).argmax(-1))
    rows = [{"x": vector, "label": label} for vector, label in zip(x, labels, strict=True)]
    lora, model = loft_jax.AdapterConfig(rank=4), loft_jax.ModelConfig()
    schedule = loft_jax.ScheduleConfig(learning_rate=5e-3, steps=400, batch_size=64)
    every, data = loft_jax.EvaluationConfig(every=20), loft_jax.DataConfig()
    rest: dict[str, Any] = {"lora": lora, "schedule": schedule, "evaluation": every}
    config = loft_jax.FinetuneConfig(model, data, folder, **rest)
    own: dict[str, Any] = {"model": mlp(0), "loss": cross_entropy, "callbacks": [StopBelow()]}
    own |= {"data": rows[:512], "held_out": rows[512:]}
    result = loft_jax.finetune(config, **own, resume="auto")
    print(f"{result.steps} steps, {len(result.history)} lines of history")
    print(f"held-out loss {result.before['loss']:.3f} -> {result.after['loss']:.3f}")
    print(f"ended early: {result.stopped or 'no'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
