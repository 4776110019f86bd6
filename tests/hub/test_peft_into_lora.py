"""An adapter is read into a model that has LoRA layers already: they must be the same layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter, save_peft_adapter
from loft_jax.lora import LoRAConfig, add_lora
from tests.hub.peft_adapters import adapted_llama, our_logits, randomize
from tests.hub.twin import Twin

PLAIN = {"alpha": 3.0, "target_modules": "q_proj"}
FEATURES = {**PLAIN, "use_dora": True, "use_rslora": True}


def test_the_factors_are_replaced_and_the_dropout_is_kept(llama_folder, tmp_path):
    model = adapted_llama(llama_folder, **PLAIN)
    save_peft_adapter(tmp_path, model)
    other = randomize(adapted_llama(llama_folder, dropout=0.5, **PLAIN), seed=9)
    dropout = other.layers.self_attn.q_proj.lora_dropout
    load_peft_adapter(tmp_path, other)
    assert other.layers.self_attn.q_proj.lora_dropout is dropout
    other.eval()
    np.testing.assert_array_equal(our_logits(other), our_logits(model))


def test_a_dropout_beside_that_of_the_model_is_refused(llama_folder, tmp_path):
    model = adapted_llama(llama_folder, dropout=0.5, **PLAIN)
    save_peft_adapter(tmp_path, model)
    with pytest.raises(InputError, match=r"dropout is 0\.1, but the model's LoRA has its own"):
        load_peft_adapter(tmp_path, model, dropout=0.1)


def test_factors_of_some_layers_are_replaced(llama_folder, tmp_path):
    model = adapted_llama(llama_folder, layers=[0, -1], **FEATURES)
    save_peft_adapter(tmp_path, model)
    other = randomize(adapted_llama(llama_folder, layers=[0, 2], **FEATURES), seed=9)
    load_peft_adapter(tmp_path, other)
    np.testing.assert_array_equal(our_logits(other), our_logits(model))


def test_magnitudes_of_dora_are_replaced_too(llama_folder, tmp_path):
    model = adapted_llama(llama_folder, **FEATURES)
    save_peft_adapter(tmp_path, model)
    other = randomize(adapted_llama(llama_folder, **FEATURES), seed=9)
    load_peft_adapter(tmp_path, other)
    np.testing.assert_array_equal(our_logits(other), our_logits(model))


@pytest.mark.parametrize(
    ("saved", "present", "message"),
    [
        (PLAIN, {**PLAIN, "rank": 2}, r"layers.self_attn.q_proj has rank 4 and alpha 3, .*rank 2"),
        (PLAIN, {**PLAIN, "alpha": 4.0}, "alpha 3, the model has rank 4 and alpha 4"),
        (
            PLAIN,
            {**PLAIN, "target_modules": "k_proj"},
            "does not adapt 'layers.self_attn.k_proj'",
        ),
        (
            PLAIN,
            {**PLAIN, "dtype": jnp.bfloat16},
            "float32, which the model's bfloat16 cannot hold",
        ),
        (
            {**PLAIN, "target_modules": ["q_proj", "k_proj"]},
            PLAIN,
            r"also adapts 'layers\.self_attn\.k_proj'",
        ),
        (
            FEATURES,
            {**PLAIN, "use_dora": True},
            "q_proj has rsLoRA in the adapter and not in the model",
        ),
        (
            FEATURES,
            {**PLAIN, "use_rslora": True},
            "q_proj has DoRA in the adapter and not in the model",
        ),
        (
            FEATURES,
            {**FEATURES, "init": "balanced"},
            r"q_proj: the model's LoRA has a start that is not zero",
        ),
        (
            {**PLAIN, "layers": [0, 2]},
            PLAIN,
            r"adapts layers \[0, 2\] of layers.self_attn.q_proj, the model's LoRA all layers",
        ),
        (
            {**PLAIN, "use_rslora": True},
            FEATURES,
            "q_proj has DoRA in the model and not in the adapter",
        ),
    ],
)
def test_other_layers_are_refused(llama_folder, tmp_path, saved, present, message):
    save_peft_adapter(tmp_path, adapted_llama(llama_folder, **saved))
    with pytest.raises(InputError, match=message):
        load_peft_adapter(tmp_path, adapted_llama(llama_folder, **present))


@pytest.mark.parametrize(("name", "field"), [("DoRA", "use_dora"), ("rsLoRA", "use_rslora")])
def test_a_feature_of_some_layers_only_cannot_be_saved(tmp_path, name, field):
    model = Twin(nnx.Rngs(0))
    config = LoRAConfig(2, target_modules=["side.out"], **{field: True})
    add_lora(model, config, rngs=nnx.Rngs(1))
    add_lora(model, LoRAConfig(2, target_modules=["heads", "blocks"]), rngs=nnx.Rngs(1))
    message = f"{name} is on 'side.out' and not on 'blocks', 'heads'; expected it on all"
    with pytest.raises(InputError, match=message):
        save_peft_adapter(tmp_path / "adapter", model)
    assert not (tmp_path / "adapter").exists()
