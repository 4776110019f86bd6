"""Methods against PEFT's layers and optimizers: the same start and batches, the same losses."""

import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from transformers import LlamaForCausalLM

from loft_jax import save_peft_adapter
from loft_jax.lora.targets import scaling_of
from loft_jax.tasks.causal_lm import CausalLM, predicted
from loft_jax.training.model import load_model
from loft_jax.training.optimizer import make_optimizer
from loft_jax.training.partition import split_model
from loft_jax.training.step import initial_state, make_step

RANK, ALPHA, RATE, DECAY = 4, 8.0, 3e-3, 0.1
ROWS, TOKENS, VOCAB = 6, 24, 400


def batches():
    rng = np.random.default_rng(0)
    first, second = rng.integers(5, VOCAB, (2, ROWS, TOKENS)).astype(np.int32)
    return [first, second, first, second, first]


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)


def lora_plus(model):
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=RATE,
        loraplus_lr_ratio=4.0,
        weight_decay=DECAY,
        loraplus_weight_decay=DECAY,
    )


def riemannian(damping):
    return lambda model: create_riemannian_optimizer(
        model, torch.optim.AdamW, lr=RATE, reg=damping, weight_decay=DECAY
    )


def lora_fa(model):
    optimizer = create_lorafa_optimizer(
        model, r=RANK, lora_alpha=int(ALPHA), lr=RATE, weight_decay=DECAY
    )
    for group in optimizer.param_groups:
        group["eps"] = 1e-12  # it stands beside another root than in AdamW: negligible in both
    return optimizer


CASES = {
    "lora": ("lora", {}, adamw),
    "lora, clipped": ("lora", {"max_grad_norm": 0.1}, adamw),
    "rslora": ("rslora", {}, adamw),
    "dora": ("dora", {}, adamw),
    "pissa": ("pissa", {}, adamw),
    "full": ("full", {}, adamw),
    "lora-plus": ("lora-plus", {"lora_plus_ratio": 4.0}, lora_plus),
    "riemannian": ("riemannian", {"damping": 1e-2}, riemannian(1e-2)),
    "riemannian, weakly damped": ("riemannian", {"damping": 1e-6}, riemannian(1e-6)),
    "lora-fa": ("lora-fa", {}, lora_fa),
    "lora-fa, clipped": ("lora-fa", {"max_grad_norm": 0.1}, lora_fa),
}
# What differs little from another one, or from going on from an adapter.
SLOW = (
    "lora",
    "lora, clipped",
    "rslora",
    "pissa",
    "lora-fa",
    "riemannian, weakly damped",
    "lora-fa, clipped",
)


@pytest.mark.parametrize(
    ("method", "settings", "make_torch_optimizer"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, case in CASES.items()
    ],
)
def test_losses_are_those_of_peft(
    method, settings, make_torch_optimizer, make_config, tmp_path, monkeypatch
):
    # It would compute in bfloat16 wherever torch can.
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)
    config = make_config(
        **{
            "method": method,
            "rank": RANK,
            "alpha": ALPHA,
            "target_modules": ("q_proj", "v_proj", "down_proj"),
            "learning_rate": RATE,
            "weight_decay": DECAY,
            "max_grad_norm": 0.0,
            **settings,
        }
    )
    model = load_model(config, CausalLM())
    theirs = torch_model(config, model, tmp_path)
    check_same_losses(config, model, theirs, make_torch_optimizer(theirs))


@pytest.mark.parametrize("method", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_going_on_from_an_adapter_of_peft(method, make_config, tmp_path):
    """Rank, alpha, their patterns, modules, layers, rsLoRA and DoRA are those of its folder."""
    config = make_config(
        method=method,
        adapter=str(tmp_path / "adapter"),
        rank=None,
        target_modules=("all-linear",),
        learning_rate=RATE,
        weight_decay=DECAY,
        max_grad_norm=0.0,
    )
    base = LlamaForCausalLM.from_pretrained(config.model.path)
    settings = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1] if method == "lora" else None,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 5},
        use_rslora=method == "lora",
        use_dora=method == "dora",
        init_lora_weights=False,  # neither factor is zero, as after training
    )
    torch.manual_seed(0)
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(config.model.path)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    check_same_losses(config, load_model(config, CausalLM()), theirs, adamw(theirs))


def check_same_losses(config, model, theirs, optimizer):
    trained = [p for p in theirs.parameters() if p.requires_grad]
    tx = make_optimizer(config, optax.constant_schedule(RATE), scaling_of(model))
    parts = split_model(model, config.method.trained)
    state, step = initial_state(parts, tx), make_step(parts, CausalLM().loss, tx)
    losses = []
    for tokens in batches():
        state, metrics = step(state, parts.frozen, batch_of(tokens))
        ids = torch.from_numpy(tokens).long()
        loss = theirs(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        if config.optimizer.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        assert float(metrics["loss"]) == pytest.approx(losses[-1], abs=1e-4)
    assert losses[-1] < losses[0] - 0.05  # the same batch again: what was compared has moved


def torch_model(config, model, folder):
    """The same start in torch: our adapter in PEFT, but for those that PEFT starts by itself."""
    method, base = config.method.name, LlamaForCausalLM.from_pretrained(config.model.path)
    if method == "full":
        return base
    if method == "pissa":
        settings = LoraConfig(
            r=RANK,
            lora_alpha=int(ALPHA),
            target_modules=list(config.lora.target_modules),
            init_lora_weights="pissa",
        )
        return get_peft_model(base, settings)
    save_peft_adapter(folder, model, base_model=config.model.path)
    adapted = PeftModel.from_pretrained(base, folder, is_trainable=True)
    for name, parameter in adapted.named_parameters():
        if method == "lora-fa" and "lora_A" in name:
            parameter.requires_grad = False
    return adapted


def batch_of(tokens):
    return predicted(
        {
            "tokens": tokens,
            "positions": np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)),
            "segment_ids": np.ones((ROWS, TOKENS), np.int32),
            "loss_mask": np.ones((ROWS, TOKENS), np.float32),
        }
    )
