"""Adapters on other layers: stacks without numbers, weights of three axes, names that clash."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft import PeftModel
from safetensors import safe_open

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, save_peft_adapter
from loft_jax.lora import LoRAConfig, add_lora, average_adapters, register_lora_layer
from tests.hub.peft_adapters import CONFIG, CPU, WEIGHTS, our_logits, randomize, torch_logits
from tests.hub.twin import TorchTwin, Twin


def adapted_twin(**fields):
    config = LoRAConfig(**{"rank": 2, **fields})
    return randomize(add_lora(Twin(nnx.Rngs(0)), config, rngs=nnx.Rngs(1)))


def test_the_models_are_the_same():
    model = Twin(nnx.Rngs(0))
    twin = TorchTwin(model).eval()
    np.testing.assert_allclose(our_logits(model), torch_logits(twin), atol=1e-5)


CASES = [
    ({"target_modules": ["heads", "out", "embed"]}, ["embed", "heads", "out"]),
    ({"target_modules": "all-linear"}, ["fc", "heads", "out"]),
    # "out" alone would name side.out too, and so would a list with "out" in it.
    ({"target_modules": r"out|blocks"}, r"blocks\.0\.fc|blocks\.1\.fc|out"),
    ({"target_modules": ["side.out", "heads"]}, ["heads", "side.out"]),
    ({"rank_pattern": {"^out": 3}, "alpha_pattern": {"side.out": 7}}, ["fc", "heads", "out"]),
    ({"rank_pattern": {"side.out": 3}}, ["fc", "heads", "out"]),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("fields", "targets"), CASES)
def test_peft_adapts_the_same_layers(tmp_path, fields, targets):
    model = adapted_twin(**fields)
    save_peft_adapter(tmp_path, model, task_type=None)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == targets
    theirs = PeftModel.from_pretrained(TorchTwin(Twin(nnx.Rngs(0))).eval(), tmp_path, **CPU)
    np.testing.assert_allclose(our_logits(model), torch_logits(theirs), atol=1e-5)
    adapted = sum(hasattr(module, "lora_A") for module in theirs.modules())
    with safe_open(tmp_path / WEIGHTS, "np") as file:
        assert 2 * adapted == len(list(file.keys()))


@pytest.mark.parametrize("fields", [fields for fields, _ in CASES])
def test_we_read_back_the_same_model(tmp_path, fields):
    model = adapted_twin(**fields)
    save_peft_adapter(tmp_path, model, task_type=None)
    again = load_peft_adapter(tmp_path, Twin(nnx.Rngs(0)))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(again)),
        nnx.to_pure_dict(nnx.state(model)),
    )
    assert nnx.split(again)[0] == nnx.split(model)[0]


class OwnEinsum(nnx.Module):
    def __init__(self, einsum_str, kernel):
        self.einsum_str = einsum_str
        self.w = nnx.Param(kernel)

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class OwnWeight(nnx.Module):
    def __init__(self, kernel):
        self.weight = nnx.Param(kernel)

    def __call__(self, x):
        return jnp.tensordot(x, self.weight[...], 2)


def test_peft_reads_adapters_of_registered_modules_and_so_do_we(tmp_path):
    register_lora_layer(OwnEinsum, weight="w", equation="einsum_str")
    register_lora_layer(OwnWeight, weight="weight", ins=(0, 1), outs=2)
    base = Twin(nnx.Rngs(0))
    twin = TorchTwin(base).eval()
    base.heads = OwnEinsum("...d,dhe->...he", base.heads.kernel[...])
    base.out = OwnWeight(base.out.kernel[...])
    model = randomize(add_lora(nnx.clone(base), LoRAConfig(2), rngs=nnx.Rngs(1)))
    save_peft_adapter(tmp_path, model, task_type=None)
    theirs = PeftModel.from_pretrained(twin, tmp_path, **CPU)
    np.testing.assert_allclose(our_logits(model), torch_logits(theirs), atol=1e-5)
    again = load_peft_adapter(tmp_path, base)
    np.testing.assert_array_equal(our_logits(again), our_logits(model))


def adapted(model):
    return add_lora(model, LoRAConfig(1), rngs=nnx.Rngs(1))


def refused(folder, model, message, **options):
    with pytest.raises(InputError, match=message):
        save_peft_adapter(folder / "adapter", model, **options)
    assert not (folder / "adapter").exists()


def test_a_model_without_lora_cannot_be_saved(tmp_path):
    refused(tmp_path, Twin(nnx.Rngs(0)), "no LoRA layer to save")


def test_a_layer_alone_cannot_be_saved(tmp_path):
    model = adapted(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    refused(tmp_path, model, "the layer is the whole model")


def test_a_batch_axis_cannot_be_saved(tmp_path):
    batched = nnx.LinearGeneral(2, 2, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    refused(tmp_path, adapted(nnx.Sequential(batched)), r"layers\.0: has a batch axis")


def test_a_stack_needs_names_for_its_layers(tmp_path):
    stacked = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    stacked.kernel = nnx.Param(jnp.zeros((3, 2, 2)))
    message = r"layers\.0: is a stack of 3 layers, pass hf_name"
    refused(tmp_path, adapted(nnx.Sequential(stacked)), message)


def test_two_layers_of_one_name_cannot_be_saved(tmp_path):
    message = r"its name 'x' is another layer's too"
    model = adapted(Twin(nnx.Rngs(0)))
    refused(tmp_path, model, message, hf_name=lambda path, layer: "x")


def test_layers_are_found_by_their_paths_alone(tmp_path, monkeypatch):
    """A pattern for each of them takes time that grows with the square of their number."""
    base = nnx.Sequential(*(nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(3)))
    model = randomize(adapted(nnx.clone(base)))
    save_peft_adapter(tmp_path, model)
    for match in ("match", "fullmatch"):
        monkeypatch.setattr(f"loft_jax.patterns.Patterns.{match}", None)  # not called
    loaded = load_peft_adapter(tmp_path, base)
    mean = average_adapters([loaded, loaded])
    for layer in (0, 1, 2):
        np.testing.assert_array_equal(loaded.layers[layer].lora_b[...], model.layers[layer].lora_b)
        assert mean.layers[layer].lora_rank == 2 * model.layers[layer].lora_rank


def test_a_file_is_opened_once_for_all_of_its_layers(tmp_path, monkeypatch):
    """Each opening takes time in proportion to the number of its tensors."""
    save_peft_adapter(tmp_path, adapted_twin())
    opened = mock.Mock(side_effect=safe_open)
    monkeypatch.setattr("loft_jax.hub.safetensors_io.safe_open", opened)
    load_peft_adapter(tmp_path, Twin(nnx.Rngs(0)))
    assert opened.call_count == 1
