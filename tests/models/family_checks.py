"""What holds of every family, as checks that the tests of one call."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model

from loft_jax.data import DataConfig
from loft_jax.hub import load_peft_adapter, load_pretrained, save_peft_adapter, save_pretrained
from loft_jax.lora import LoRAConfig, add_lora, lora_layers, merge_lora
from loft_jax.training.plan import plan_step
from tests.flat_config import flat_config

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def with_random_factors(model, *, rank=3, targets=("all-linear",), seed=0):
    """A model with LoRA whose B is not zero."""
    add_lora(
        model,
        LoRAConfig(rank, alpha=6, target_modules=targets[0] if len(targets) == 1 else targets),
        rngs=nnx.Rngs(seed),
    )
    rng = np.random.default_rng(seed)
    for layer in lora_layers(model).values():
        layer.lora_b.set_value(jnp.asarray(rng.normal(0, 0.2, layer.lora_b.shape), jnp.float32))
    return model


def check_adapter_out(folder, tmp_path, *, auto, ours, theirs, head, task_type, saved=()):
    """PEFT computes with an adapter of ours what we do; merged, transformers does.

    Args:
        folder: Of the base model.
        tmp_path: To write to.
        auto: transformers' class that loads it.
        ours: Gives the output of our model.
        theirs: Gives the output of torch's.
        head: Of our model.
        task_type: PEFT's.
        saved: Modules that are saved whole.
    """
    model = with_random_factors(load_pretrained(folder, head=head))
    model.eval()
    for module in saved:
        for _, variable in nnx.to_flat_state(nnx.state(getattr(model, module), nnx.Param)):
            variable.set_value(variable.get_value() + 0.1)
    expected = ours(model)
    save_peft_adapter(
        tmp_path / "adapter", model, task_type=task_type, modules_to_save=saved, base_model="base"
    )
    torch_model = PeftModel.from_pretrained(auto.from_pretrained(folder), tmp_path / "adapter")
    np.testing.assert_allclose(theirs(torch_model.eval()), expected, **TOLERANCE)
    again = load_peft_adapter(tmp_path / "adapter", load_pretrained(folder, head=head))
    again.eval()
    np.testing.assert_array_equal(ours(again), expected)
    save_pretrained(tmp_path / "merged", merge_lora(again))
    merged = auto.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(theirs(merged), expected, **TOLERANCE)


def check_adapter_in(folder, tmp_path, *, auto, ours, theirs, head, **peft):
    """An adapter that PEFT made is read, and computes the same."""
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **peft)
    torch_model = get_peft_model(auto.from_pretrained(folder), config).eval()
    torch_model.save_pretrained(tmp_path / "theirs")
    model = load_peft_adapter(tmp_path / "theirs", load_pretrained(folder, head=head))
    model.eval()
    np.testing.assert_allclose(ours(model), theirs(torch_model), **TOLERANCE)


def check_mesh(folder, task):
    """Three steps on meshes of eight devices are those of one device, and weights are split."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.on_a_mesh", str(folder), task],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        },
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    found = json.loads(done.stdout)
    for sizes, split in (("1x8x1", 8), ("2x2x2", 4)):
        assert abs(found[sizes]["loss"] - found["loss"]) < 1e-5
        assert found[sizes]["distance"] < 1e-4
        assert found[sizes]["split"] == split


def check_plan_works(folder, labels=()):
    """The TPU compiler takes the train step of the model, and names what a chip holds."""
    run = flat_config(
        model=str(folder / "config.json"),
        data=DataConfig("", max_length=32),
        output="",
        rank=2,
        batch_size=8,
        label_names=labels,
    )
    plan = plan_step(run, "v5e:2x2")
    assert plan.mesh == (1, 4, 1)
    assert 0 < plan.adapter < plan.weights < plan.total < plan.memory
