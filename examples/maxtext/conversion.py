"""Factors of MaxText's Llama in Hugging Face's terms: names, and the scale of the queries."""

import math
from typing import Any

import jax

from examples.maxtext.layers import HEAD_DIM

PROJECTIONS = {
    "self_attention.query": "self_attn.q_proj",
    "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj",
    "self_attention.out": "self_attn.o_proj",
    "mlp.wi_0": "mlp.gate_proj",
    "mlp.wi_1": "mlp.up_proj",
    "mlp.wo": "mlp.down_proj",
}


def hf_name(path: str, layer: int | None) -> str:
    """Names a module of the scan as Hugging Face does: MaxText's own table."""
    return f"model.layers.{layer}.{PROJECTIONS[path.removeprefix('decoder.layers.')]}"


def to_hugging_face(factors: dict[str, Any]) -> dict[str, Any]:
    """Takes the 1 / sqrt(head_dim) out of the queries, which Hugging Face's attention has."""
    factors = jax.tree.map(lambda x: x, factors)  # a copy of the dicts
    query = factors["decoder"]["layers"]["self_attention"]["query"]
    query["kernel_lora_b"] *= math.sqrt(HEAD_DIM)
    return factors
