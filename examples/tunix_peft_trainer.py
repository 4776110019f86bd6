"""LoFT in Tunix's PeftTrainer: Qwix puts the adapters on, `loft` takes the place of the optimizer.

A tiny Llama with random weights learns to count. The trainer keeps its checkpoints in a folder,
FOLDER on the command line, and goes on from the last one if it is started again with that folder.
The adapter for PEFT is written there at the end.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import qwix
from flax import nnx
from tunix.models.llama3.model import Llama3, ModelConfig
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from loft_jax.hub import save_peft_adapter
from loft_jax.optim import loft

RANK, ALPHA, LEARNING_RATE = 2, 4.0, 1e-2
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
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def batches(count: int, rows: int = 8) -> Iterator[TrainingInput]:
    """Numbers that follow each other, from a random one on."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = (rng.integers(32, size=(rows, 1)) + np.arange(16)) % 32
        yield TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))


def trainer(model: nnx.Module, **config: object) -> PeftTrainer:
    """Tunix's trainer, with LoFT; alpha over rank is the scaling of Qwix's forward pass."""
    tx = loft(LEARNING_RATE, scaling=ALPHA / RANK, max_grad_norm=1.0)
    config = TrainingConfig(eval_every_n_steps=1000, **config)
    return PeftTrainer(model, tx, config).with_gen_model_input_fn(model_input)


def hf_name(path: str, number: int | None) -> str:
    """Names a projection as Hugging Face does: `model.layers.0.self_attn.q_proj`."""
    return "model." + path.replace(".attn.", ".self_attn.")


def main(folder: str = "runs/counting") -> None:
    """Trains, or goes on with the run in the folder, and writes the adapter."""
    root = Path(folder).absolute()  # as Orbax needs it
    run = trainer(adapted(), max_steps=20, checkpoint_root_directory=str(root / "checkpoints"))
    run.train(batches(20))
    save_peft_adapter(root / "adapter", run.model, alpha=ALPHA, hf_name=hf_name)


if __name__ == "__main__":
    main(*sys.argv[1:])
