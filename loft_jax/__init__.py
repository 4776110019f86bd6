"""LoFT in JAX: low-rank adaptation that behaves like full fine-tuning.

Names are imported when they are first used: the optimizers need only jax and optax, the LoRA
layers flax beside them.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loft_jax.data import DataConfig
    from loft_jax.hub import (
        load_peft_adapter,
        load_peft_factors,
        load_pretrained,
        load_tokenizer,
        save_peft_adapter,
        save_pretrained,
    )
    from loft_jax.lora import (
        LoRAConfig,
        add_lora,
        average_adapters,
        lora_layers,
        merge_lora,
        register_lora_layer,
        remove_lora,
        sum_adapters,
    )
    from loft_jax.optim import (
        FactorSpec,
        alt_lora_plus,
        alternate_factors,
        assign_overlap,
        balance_factors,
        balance_norms,
        calibrate_moments,
        clip_by_projected_norm,
        factor_grams,
        find_pairs,
        loft,
        loft_muon,
        lora_fa,
        lora_plus,
        orthogonalize_momentum,
        paired_leaves,
        precondition_by_gram,
        precondition_by_reflora,
        project_gradients,
        project_updates,
        reflora,
        reflora_s,
        riemannian_lora,
        share_bases,
        state_bytes,
        state_shardings,
    )
    from loft_jax.training.callbacks import Callback, Progress, RunResult
    from loft_jax.training.config import (
        AdapterConfig,
        CheckpointConfig,
        EvaluationConfig,
        FinetuneConfig,
        LoggingConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        ScheduleConfig,
        TaskConfig,
    )
    from loft_jax.training.loop import finetune

__version__ = version("loft-jax")

__all__ = [
    "AdapterConfig",
    "Callback",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "FactorSpec",
    "FinetuneConfig",
    "LoRAConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Progress",
    "RunResult",
    "ScheduleConfig",
    "TaskConfig",
    "add_lora",
    "alt_lora_plus",
    "alternate_factors",
    "assign_overlap",
    "average_adapters",
    "balance_factors",
    "balance_norms",
    "calibrate_moments",
    "clip_by_projected_norm",
    "factor_grams",
    "find_pairs",
    "finetune",
    "load_peft_adapter",
    "load_peft_factors",
    "load_pretrained",
    "load_tokenizer",
    "loft",
    "loft_muon",
    "lora_fa",
    "lora_layers",
    "lora_plus",
    "merge_lora",
    "orthogonalize_momentum",
    "paired_leaves",
    "precondition_by_gram",
    "precondition_by_reflora",
    "project_gradients",
    "project_updates",
    "reflora",
    "reflora_s",
    "register_lora_layer",
    "remove_lora",
    "riemannian_lora",
    "save_peft_adapter",
    "save_pretrained",
    "share_bases",
    "state_bytes",
    "state_shardings",
    "sum_adapters",
]

# Where the names are. They are looked through in this order, for which the optimizers need jax and
# optax alone, and LoRA layers flax beside them.
_MODULES = (
    "loft_jax.optim",
    "loft_jax.lora",
    "loft_jax.data",
    "loft_jax.hub",
    "loft_jax.training.callbacks",
    "loft_jax.training.config",
    "loft_jax.training.loop",
)


# Hidden from type checkers, which would accept every misspelled name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            modules = map(importlib.import_module, _MODULES)
            module = next(module for module in modules if hasattr(module, name))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"loft_jax.{name} needs {error.name!r}, which is not installed: "
                "pip install loft-jax",
                name=error.name,
            ) from error
        value = globals()[name] = getattr(module, name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
