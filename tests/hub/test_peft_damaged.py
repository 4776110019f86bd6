"""Adapters that are damaged, not supported, or for another model: the error names what is wrong."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loft_jax.errors import InputError
from loft_jax.hub import load_peft_adapter
from loft_jax.lora import lora_layers
from tests.hub.peft_adapters import CONFIG, WEIGHTS

Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def drop(*names):
    def edit(tensors):
        for name in names:
            del tensors[name]

    return edit


def put(name, tensor):
    return lambda tensors: tensors.update({name: np.asarray(tensor, np.float32)})


def rename(old, new):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{Q1}.lora_A.weight"), r"layers\.1\.self_attn\.q_proj\.lora_A\.weight' is missing"),
        (
            drop(f"{Q1}.lora_A.weight", f"{Q1}.lora_B.weight"),
            r"no factors for 'model\.layers\.1\.self_attn\.q_proj', which target_modules",
        ),
        (put(f"{Q1}.lora_A.weight", np.ones((4, 31))), r"is \(4, 31\), expected \(4, 32\)"),
        (put(f"{Q1}.lora_A.weight", np.ones((3, 32))), r"is \(3, 32\), expected \(4, 32\)"),
        (put(f"{Q1}.lora_B.weight", np.ones((16, 4))), r"is \(16, 4\), expected \(32, 4\)"),
        (
            put(f"{Q1}.lora_magnitude_vector", np.ones(32)),
            r"q_proj\.lora_magnitude_vector' is of DoRA, but use_dora in .* is not true",
        ),
        (
            put("base_model.model.model.embed_tokens.lora_magnitude_vector", np.ones(32)),
            r"embed_tokens\.lora_magnitude_vector' does not fit 'model\.embed_tokens', a Embed",
        ),
        (put(f"{Q1}.lora_C.weight", np.ones(4)), "lora_C.weight' is no LoRA factor"),
        (put(f"{Q1}.base_layer.weight", np.ones((32, 32))), "base weight other than the model's"),
        (put("base_model.model.lm_head.base_layer.weight", np.ones((64, 32))), "base weight other"),
        (
            put("base_model.model.lm_head.base_layer.weight", np.ones((66, 32))),
            r"base weight of shape \(66, 32\), and the model's is \(64, 32\); expected the base",
        ),
        (rename("q_proj", "qkv_proj"), r"another base model: .*'model\.layers\.0\.self_attn\.qkv"),
        (rename("layers.2.", "layers.3."), r"another base model: .*'model\.layers\.3\."),
        (rename(f"{Q1}.lora_A.weight", f"{Q1}.lora_embedding_A"), "does not fit .* a Linear"),
        (lambda tensors: tensors.clear(), "holds no LoRA factors"),
    ],
)
def test_wrong_tensors_are_named_and_the_model_untouched(
    base, good_adapter, tmp_path, edit, message
):
    folder = tmp_path / "adapter"
    shutil.copytree(good_adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=message):
        load_peft_adapter(folder, base)
    assert lora_layers(base) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, r"_proj\.lora_magnitude_vector' is missing"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
        ({"use_rslora": None, "use_qalora": True}, "use_qalora is True"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head.weight' is missing, which modules_to_save"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"from_the_future": 1}, "from_the_future is 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 0}, "rank r is 0"),
        ({"r": None}, "rank r is None"),
        ({"lora_alpha": 0}, "alpha lora_alpha is 0"),
        ({"rank_pattern": {"(": 4}}, "'\\(' is no regular expression"),
        (
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
            r"layers\.1\.self_attn\.q_proj\.lora_A\.weight' is \(4, 32\), expected \(2, 32\)",
        ),
        ({"target_modules": ["q_proj", "o_proj", "up_proj"]}, "no factors for .*up_proj"),
        ({"target_modules": 3}, "target_modules is 3, expected a text or a list"),
        ({"target_modules": [3]}, r"target_modules is \[3\], expected a text or a list"),
        ({"exclude_modules": 3}, "exclude_modules is 3"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x', expected a number"),
        ({"layers_to_transform": [0], "layers_pattern": "("}, "'\\(' is no regular expression"),
        ({"layers_pattern": 3}, "layers_pattern is 3"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected an object"),
        ({"alpha_pattern": "x"}, "alpha_pattern is 'x', expected an object"),
        ({"use_rslora": "x"}, "use_rslora is 'x', expected true or false"),
    ],
)
def test_settings_that_are_not_supported_are_named(base, good_adapter, tmp_path, settings, message):
    folder = tmp_path / "adapter"
    shutil.copytree(good_adapter, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))
    with pytest.raises(InputError, match=message):
        load_peft_adapter(folder, base)
