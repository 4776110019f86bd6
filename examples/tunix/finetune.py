"""LoFT in Tunix's PeftTrainer: Qwix puts the adapters on, `loft` takes the place of the optimizer.

The trainer keeps its checkpoints in a folder, FOLDER on the command line, and goes on from the last
one if it is started again with that folder. The adapter for PEFT is written there at the end.
"""

import sys
from pathlib import Path

from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from examples.tunix.counting import ALPHA, RANK, adapted, batches, model_input
from loft_jax.hub import save_peft_adapter
from loft_jax.optim import loft

LEARNING_RATE = 1e-2


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
