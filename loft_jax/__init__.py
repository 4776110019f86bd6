"""LoFT in JAX: low-rank adaptation that behaves like full fine-tuning."""

from importlib.metadata import version

from loft_jax.hub import (
    load_peft_adapter,
    load_pretrained,
    load_tokenizer,
    save_peft_adapter,
    save_pretrained,
)
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora, remove_lora
from loft_jax.optim.balance import balance_factors
from loft_jax.optim.baselines import (
    alt_lora_plus,
    lora_fa,
    lora_plus,
    precondition_by_gram,
    riemannian_lora,
)
from loft_jax.optim.links import (
    alternate_factors,
    assign_overlap,
    clip_by_projected_norm,
    project_gradients,
)
from loft_jax.optim.loft import loft
from loft_jax.optim.moments import calibrate_moments, project_updates
from loft_jax.optim.muon import loft_muon, orthogonalize_momentum
from loft_jax.optim.reflora import balance_norms, precondition_by_reflora, reflora, reflora_s
from loft_jax.optim.sharing import share_bases
from loft_jax.optim.state import state_bytes, state_shardings

__version__ = version("loft-jax")

__all__ = [
    "LoRAConfig",
    "add_lora",
    "alt_lora_plus",
    "alternate_factors",
    "assign_overlap",
    "balance_factors",
    "balance_norms",
    "calibrate_moments",
    "clip_by_projected_norm",
    "load_peft_adapter",
    "load_pretrained",
    "load_tokenizer",
    "loft",
    "loft_muon",
    "lora_fa",
    "lora_layers",
    "lora_plus",
    "merge_lora",
    "orthogonalize_momentum",
    "precondition_by_gram",
    "precondition_by_reflora",
    "project_gradients",
    "project_updates",
    "reflora",
    "reflora_s",
    "remove_lora",
    "riemannian_lora",
    "save_peft_adapter",
    "save_pretrained",
    "share_bases",
    "state_bytes",
    "state_shardings",
]
