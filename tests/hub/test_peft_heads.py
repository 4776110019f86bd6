"""Heads of several layers, which PEFT holds whole."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, save_peft_adapter
from loft_jax.lora import LoRAConfig, add_lora, lora_layers

CONFIG = "adapter_config.json"


def randomize(model):
    """Makes no factor zero."""
    for layer in lora_layers(model).values():
        layer.lora_b.set_value(jax.random.normal(jax.random.key(0), layer.lora_b.shape))
    return model


class Headed(nnx.Module):
    """A model whose head has two layers."""

    def __init__(self, labels: int, rngs: nnx.Rngs):
        self.body = nnx.Linear(4, 4, rngs=rngs)
        self.head = nnx.Dict(
            dense=nnx.Linear(4, 4, rngs=rngs), out=nnx.Linear(4, labels, rngs=rngs)
        )


@pytest.mark.parametrize("labels", [1, 3, 4])
def test_a_head_of_two_layers_is_one_module_that_is_saved(tmp_path, labels):
    """Named as a whole, as PEFT has it, which never adapts what is inside."""
    model = Headed(labels, nnx.Rngs(0))
    randomize(add_lora(model, LoRAConfig(2, target_modules="body"), rngs=nnx.Rngs(1)))
    save_peft_adapter(tmp_path, model, task_type="SEQ_CLS", modules_to_save=["head"])
    settings = json.loads((tmp_path / CONFIG).read_text())
    assert settings["modules_to_save"] == ["head"]
    settings["target_modules"] = ["body", "dense"]  # as PEFT writes what it was given
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    again = load_peft_adapter(tmp_path, Headed(labels, nnx.Rngs(2)))
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(again.head)),
        nnx.to_pure_dict(nnx.state(model.head)),
    )
    assert list(lora_layers(again)) == ["body"]


def test_a_head_with_factors_of_its_own_is_not_saved_whole(tmp_path):
    """PEFT would read one of the two."""
    model = Headed(3, nnx.Rngs(0))
    add_lora(model, LoRAConfig(2, target_modules=["body", "out"]), rngs=nnx.Rngs(1))
    with pytest.raises(InputError, match=r"'head' has an adapter, on head\.out; expected modules"):
        save_peft_adapter(tmp_path, model, task_type="SEQ_CLS", modules_to_save=["head"])
    assert not list(tmp_path.iterdir())
