"""A tiny Llama of Tunix's with Qwix's adapters, and rows that it learns to count from."""

import jax
import numpy as np
import qwix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft.peft_trainer import TrainingInput
from tunix.sft.utils import build_positions_from_mask, make_causal_attn_mask

RANK, ALPHA = 2, 4.0
CONFIG = ModelConfig(2, 32, 16, 32, 4, 8, 4, rope_theta=10_000, norm_eps=1e-5)


def adapted(layers: str = ".*_proj") -> nnx.Module:
    """A model with factors `w_lora_a`, `w_lora_b` beside the weights of the layers."""
    model = Llama3(CONFIG, rngs=nnx.Rngs(0))
    rule = qwix.LoraProvider(module_path=layers, rank=RANK, alpha=ALPHA)
    return qwix.apply_lora_to_model(model, rule, **model.get_model_input(), rngs=nnx.Rngs(1))


def model_input(batch: TrainingInput) -> dict[str, jax.Array]:
    """What the trainer's loss takes."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": build_positions_from_mask(batch.input_mask),
        "attention_mask": make_causal_attn_mask(batch.input_mask),
    }


def batches(count: int, rows: int = 8) -> list[TrainingInput]:
    """Numbers that follow each other, from a random one on."""
    firsts = np.random.default_rng(0).integers(32, size=(count, rows, 1))
    return [
        TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))
        for tokens in (firsts + np.arange(16)) % 32
    ]
