"""DINOv2 against transformers and PEFT."""

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForImageClassification

from loft_jax.errors import InputError
from loft_jax.hub import load_pretrained
from loft_jax.lora import LoRAConfig, add_lora, lora_layers
from loft_jax.models.dinov2 import Dinov2Config
from loft_jax.models.quantized import dequantize, quantize
from loft_jax.models.registry import WELL_KNOWN
from loft_jax.tasks import ImageClassification
from tests.models.family_checks import (
    check_adapter_in,
    check_adapter_out,
    check_mesh,
    check_plan_works,
)
from tests.models.test_vit import HEAD, IMAGES, loaded, our_logits, torch_logits

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
GATED = {"use_swiglu_ffn": True}
VARIANTS = {
    "plain": {},
    "gated": GATED,
    "gated, rounded to 8": {**GATED, "hidden_size": 20, "num_labels": 3},
    "no biases of queries, keys and values": {"qkv_bias": False, "hidden_act": "gelu_new"},
    "without a mask token": {"use_mask_token": False, "layer_norm_eps": 1e-3, "patch_size": 5},
}


def save_dinov2(folder, kind=transformers.Dinov2ForImageClassification, **changes):
    torch.manual_seed(0)
    model = kind(transformers.Dinov2Config(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "lambda1")) or "norm" in name:  # zeros and ones
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gated: its checkpoint holds two layers in one tensor."""
    return save_dinov2(tmp_path_factory.mktemp("dinov2") / "model", **GATED)


# The gated one is read in other tests too.
@pytest.mark.parametrize(
    "variant",
    [pytest.param(x, marks=pytest.mark.slow) if x == "gated" else x for x in VARIANTS],
)
def test_logits_are_those_of_transformers(tmp_path, variant):
    folder = save_dinov2(tmp_path / "model", **VARIANTS[variant])
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = torch_logits(theirs)
    np.testing.assert_allclose(our_logits(loaded(folder)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [pytest.param((24, 24), marks=pytest.mark.slow), (27, 13)])
def test_positions_are_interpolated_for_images_of_other_sizes(folder, size):
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = torch_logits(theirs, images)
    np.testing.assert_allclose(our_logits(loaded(folder), images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_torch(tmp_path):
    folder = save_dinov2(tmp_path / "model", num_labels=3)
    model, task = loaded(folder), ImageClassification(["a", "b", "c"])
    labels = np.asarray([2, 0, 1], np.int32)
    inputs = {"pixel_values": IMAGES, "labels": labels, "weights": np.ones(3, np.float32)}
    loss = nnx.value_and_grad(lambda model: task.loss(model, inputs), has_aux=True)
    (total, weight), grads = nnx.jit(loss)(model)
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    out = theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2)), labels=torch.tensor(labels).long())
    np.testing.assert_allclose(total / weight, out.loss.item(), rtol=1e-4)
    (out.loss * 3).backward()
    layer, ours = theirs.dinov2.encoder.layer[1], grads["encoder"]["layer"]
    for found, expected in (
        (ours["attention"]["q_proj"]["kernel"][...][1].T, layer.attention.q_proj.weight),
        (ours["mlp"]["fc1"]["kernel"][...][1].T, layer.mlp.fc1.weight),
        (ours["layer_scale2"]["lambda1"][...][1], layer.layer_scale2.lambda1),
        (grads["classifier"]["kernel"][...].T, theirs.classifier.weight),
    ):
        scale = float(expected.grad.abs().max())
        np.testing.assert_allclose(found, expected.grad, atol=1e-4 * scale)


def test_an_adapter_and_its_head_go_to_peft_and_merge_for_transformers(folder, tmp_path):
    check_adapter_out(
        folder,
        tmp_path,
        auto=AutoModelForImageClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        task_type=None,
        saved=("classifier",),
    )
    assert "dinov2.encoder.layer.1.mlp.gate_proj.weight" in load_file(
        tmp_path / "merged" / "model.safetensors"
    )


def test_an_adapter_of_peft_is_read_with_its_head(folder, tmp_path):
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForImageClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        target_modules="all-linear",
        modules_to_save=["classifier"],
    )


def test_all_linear_layers_are_those_that_peft_adapts(folder):
    model = loaded(folder)
    add_lora(model, LoRAConfig(2, target_modules="all-linear"), rngs=nnx.Rngs(0))
    ours = {model.hf_name(path, number) for path in lora_layers(model) for number in range(2)}
    theirs = get_peft_model(
        AutoModelForImageClassification.from_pretrained(folder),
        LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"]),
    ).base_model.model
    assert ours == {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}


def test_a_quantized_base_is_the_one_of_its_dequantized_weights(folder):
    quantized, plain = loaded(folder, quantization="int8"), loaded(folder)
    for _, module in nnx.iter_modules(plain.encoder.layer):
        if isinstance(module, nnx.Linear):
            module.kernel.set_value(dequantize(quantize(module.kernel[...], "int8", name="k")))
    np.testing.assert_allclose(our_logits(quantized), our_logits(plain), atol=1e-5)
    assert np.abs(our_logits(quantized) - our_logits(loaded(folder))).max() > 1e-4


def test_a_head_is_drawn_where_there_is_none(tmp_path):
    folder = save_dinov2(tmp_path / "model", transformers.Dinov2Model)  # without the prefix
    model = loaded(folder, labels=("a", "b", "c"))
    assert model.drawn == ("classifier.bias", "classifier.kernel")
    assert our_logits(model).shape == (3, 3)


def test_a_part_of_a_fused_tensor_is_read_alone(folder):
    """Of a mesh, each device reads its own rows."""
    from loft_jax.hub.pretrained import _open

    source = _open(folder).source
    stored = load_file(folder / "model.safetensors")
    whole = stored["dinov2.encoder.layer.1.mlp.weights_in.weight"]
    name, half = "dinov2.encoder.layer.1.mlp.up_proj.weight", len(whole) // 2
    assert source.shapes[name] == (half, 32)
    np.testing.assert_array_equal(source.read(name), whole[half:])
    found = source.read(name, (slice(3, 7), slice(2, 9)))
    np.testing.assert_array_equal(found, whole[half + 3 : half + 7, 2:9])


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, HEAD)


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder, labels=("no", "yes"))


def test_configurations_go_to_transformers_and_back():
    config = Dinov2Config(hidden_size=48, num_attention_heads=3, labels=("no", "yes", "maybe"))
    theirs = transformers.Dinov2Config(**config.to_hf())
    assert theirs.num_labels == 3
    assert Dinov2Config.from_hf(theirs.to_dict()) == config
    assert Dinov2Config.from_hf(transformers.Dinov2Config().to_dict()) == Dinov2Config()


@pytest.mark.parametrize(
    ("name", "weights"), [("dinov2-small", 22_056_192), ("dinov2-giant", 1_136_479_232)]
)
def test_well_known_sizes_are_those_of_the_models(name, weights):
    """Numbers of weights, without the mask token."""
    _, config = WELL_KNOWN[name]
    with torch.device("meta"):
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**config.to_hf()))
    assert sum(x.numel() for x in theirs.parameters()) == weights


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "dinov2_with_registers", "model_type is 'dinov2_with_registers', expected"),
        ("num_register_tokens", 4, "num_register_tokens is 4, only 0 is supported"),
        ("drop_path_rate", 0.1, "drop_path_rate is 0.1, only 0 is supported"),
        ("layerscale_value", 0, "layerscale_value is 0, expected a positive number"),
        ("mlp_ratio", 0.5, "mlp_ratio is 0.5, expected an integer"),
        ("use_swiglu_ffn", "yes", "use_swiglu_ffn is 'yes', expected true or false"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        Dinov2Config.from_hf({"model_type": "dinov2", **SIZES, field: value})
    assert said in str(raised.value)


def test_two_tensors_for_one_parameter_are_refused(folder, tmp_path):
    from safetensors.numpy import save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["dinov2.encoder.layer.0.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"are both for 'dinov2\.encoder\.layer\.0\.mlp\.up_proj"):
        load_pretrained(tmp_path, head=HEAD)
