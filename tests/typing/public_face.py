"""A program that uses the library, for mypy: it fails where a public name is of another type.

`mypy` reads this file with the others, strictly; nothing runs it. What it asserts holds for users
whose type checker reads Optax's annotations: mypy with `follow_untyped_imports`, or pyright.
"""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import loft_jax
from loft_jax import (
    DataConfig,
    FactorSpec,
    FinetuneConfig,
    LoRAConfig,
    ModelConfig,
    add_lora,
    find_pairs,
    finetune,
    load_peft_adapter,
    load_pretrained,
    loft,
    loft_muon,
    lora_layers,
    merge_lora,
    paired_leaves,
    project_gradients,
    project_updates,
    reflora,
    register_lora_layer,
    share_bases,
    state_bytes,
)
from loft_jax.data import Batch, EvalBatches
from loft_jax.lora import LoRALayer
from loft_jax.lora.linen import LinenLoRA
from loft_jax.lora.linen import add_lora as add_linen_lora
from loft_jax.models.family import LanguageModel, PretrainedModel, SequenceClassifier
from loft_jax.models.registry import FAMILIES
from loft_jax.optim.pairs import Pair
from loft_jax.training.callbacks import RunResult


class Model(nnx.Module):
    """Of the user."""

    heads: int


def optimizers() -> None:
    """Optimizers and links, of numbers, schedules and arrays."""
    params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 4))}
    schedule = optax.linear_schedule(1e-3, 0.0, 10)
    tx = loft(schedule, max_grad_norm=1.0, second_moment="full", scaling=lambda path: 2.0)
    assert_type(tx, optax.GradientTransformationExtraArgs)
    assert_type(loft_muon(1e-3, stack_axis=1), optax.GradientTransformationExtraArgs)
    assert_type(reflora(jnp.float32(1e-3)), optax.GradientTransformationExtraArgs)
    assert_type(project_gradients(spec=FactorSpec(scaling=2.0)), optax.GradientTransformation)
    chain = optax.chain(project_gradients(), optax.scale(-1.0), project_updates())
    assert_type(share_bases(chain), optax.GradientTransformationExtraArgs)
    updates, _state = tx.update(params, tx.init(params), params)
    assert_type(updates, optax.Updates)
    assert_type(state_bytes(tx, params), int)
    assert_type(find_pairs(params), list[Pair])
    assert_type(paired_leaves(params), optax.Params)
    factor = find_pairs(params)[0].a
    assert_type(factor.unfold(factor.fold(params["lora_a"])), jax.Array)
    assert_type(factor.fold(np.ones((4, 2))), np.ndarray)
    loft(1e-3, second_moment="none")  # type: ignore[arg-type]  # refused: no such second moment
    loft(1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0)  # type: ignore[call-arg]  # refused: options have names


def models() -> None:
    """A model keeps its class, with the names that are the user's."""
    assert_type(loft_jax.__version__, str)
    model = add_lora(Model(), LoRAConfig(rank=4), rngs=nnx.Rngs(0))
    assert_type(model, Model)
    assert_type(lora_layers(model), dict[str, LoRALayer])
    assert_type(lora_layers(model)["up"].lora_a[...], jax.Array)
    assert_type(merge_lora(model), Model)
    assert_type(load_peft_adapter("adapter", model), Model)
    assert_type(load_pretrained("base"), LanguageModel)
    assert_type(load_pretrained("base", head="sequence-classification"), SequenceClassifier)
    assert_type(FAMILIES["llama"].model("causal-lm"), type[PretrainedModel])
    register_lora_layer(Model, weight="w", ins=lambda model: model.heads, outs=1)
    register_lora_layer(Model, weight="w", ins=lambda model: model.no)  # type: ignore[attr-defined]
    linear = linen.Dense(4)
    assert_type(add_linen_lora(linear, LoRAConfig(rank=2), jnp.ones(3)), LinenLoRA)

    config = FinetuneConfig(ModelConfig("base"), DataConfig("rows.jsonl"), "runs/first")
    assert_type(finetune(config, data=[{"text": "a joy"}]), RunResult)
    finetune(config, tokenizer="base")  # type: ignore[arg-type]  # refused: a path


def batches(held_out: EvalBatches) -> None:
    """One batch, or several."""
    assert_type(held_out[0], Batch)
    assert_type(held_out[1:], list[Batch])
