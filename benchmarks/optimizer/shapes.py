"""The factors that are measured, as shapes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def pair_shapes(m: int, n: int, rank: int, pairs: int, *, stacked: bool = False) -> Any:
    """The factors of equal layers as separate leaves, or as one stack, shapes only."""
    if stacked:
        return {"layers": {"q_proj": _pair(m, n, rank, (pairs,))}}
    return {"layers": {str(i): {"q_proj": _pair(m, n, rank)} for i in range(pairs)}}


def _pair(m: int, n: int, rank: int, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "lora_a": jax.ShapeDtypeStruct((*stack, m, rank), jnp.float32),
        "lora_b": jax.ShapeDtypeStruct((*stack, rank, n), jnp.float32),
    }


def llama_shapes(hidden: int, intermediate: int, layers: int, rank: int, *, stacked: bool) -> Any:
    """The factors of all linear layers of a Llama with as many key heads as heads, shapes only.

    Args:
        hidden: Width of the model.
        intermediate: Width of the MLP.
        layers: How many.
        rank: Of the factors.
        stacked: One leaf with the layers in front, or one for each layer.

    Returns:
        A tree with paths like `layers/0/self_attn/q_proj`, or `layers/self_attn/q_proj`.
    """
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    mlp = dict.fromkeys(("gate_proj", "up_proj"), (hidden, intermediate))
    modules = {"self_attn": attention, "mlp": mlp | {"down_proj": (intermediate, hidden)}}

    def layer(stack: tuple[int, ...]) -> Any:
        return {
            block: {name: _pair(m, n, rank, stack) for name, (m, n) in inside.items()}
            for block, inside in modules.items()
        }

    return {"layers": layer((layers,)) if stacked else {str(i): layer(()) for i in range(layers)}}


def base_bytes(shapes: Any) -> int:
    """Bytes in bfloat16 of the weights that pairs adapt."""
    total = 0
    for pair in _pairs(shapes):
        *stack, m, _ = pair["lora_a"].shape
        total += 2 * math.prod(stack) * m * pair["lora_b"].shape[-1]
    return total


def rank_of(shapes: Any) -> int:
    """The rank that all pairs have."""
    [rank] = {pair["lora_a"].shape[-1] for pair in _pairs(shapes)}
    return int(rank)


def _pairs(shapes: Any) -> list[Any]:
    return jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, dict) and "lora_a" in x)


def random_like(shapes: Any, seed: int) -> Any:
    """Normal random arrays: as factors well conditioned and not zero, as they are in training."""
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    arrays = [
        jnp.asarray(0.1 * rng.standard_normal(leaf.shape, dtype=np.float32)) for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, arrays)
