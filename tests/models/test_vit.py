"""ViT against transformers and PEFT."""

import jax.numpy as jnp
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
from loft_jax.hub.peft_base import head_of
from loft_jax.hub.pretrained import load_model_config, stored_dtype
from loft_jax.lora import LoRAConfig, add_lora, lora_layers
from loft_jax.models.vit import ViTConfig, ViTForImageClassification
from loft_jax.tasks import ImageClassification
from tests.models.family_checks import (
    check_adapter_in,
    check_adapter_out,
    check_mesh,
    check_plan_works,
)

HEAD = "image-classification"
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
VARIANTS = {
    "plain": {},
    "three labels": {"num_labels": 3, "num_hidden_layers": 3, "layer_norm_eps": 1e-3},
    "no biases of queries, keys and values": {"qkv_bias": False, "hidden_act": "gelu_new"},
    "one head, one patch": {"num_attention_heads": 1, "hidden_size": 24, "patch_size": 16},
    "patches that leave a border": {"patch_size": 5, "hidden_act": "relu"},
    "sizes of two sides": {"image_size": [16, 16], "patch_size": [4, 4]},
}
IMAGES = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype(np.float32)


def save_vit(folder, kind=transformers.ViTForImageClassification, **changes):
    torch.manual_seed(0)
    model = kind(transformers.ViTConfig(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # zeros and ones
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("vit") / "model")


def torch_logits(model, images=IMAGES, **options):
    with torch.no_grad():
        return model(torch.tensor(images.transpose(0, 3, 1, 2)), **options).logits.numpy()


def our_logits(model, images=IMAGES):
    return np.asarray(model(images))


def loaded(folder, **options):
    model = load_pretrained(folder, head=HEAD, **options)
    model.eval()
    return model


# The plain one is read in other tests too.
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(x, marks=pytest.mark.slow) if x in ("plain", "three labels") else x
        for x in VARIANTS
    ],
)
def test_logits_are_those_of_transformers(tmp_path, variant):
    folder = save_vit(tmp_path / "model", **VARIANTS[variant])
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = torch_logits(theirs)
    np.testing.assert_allclose(our_logits(loaded(folder)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [pytest.param((24, 24), marks=pytest.mark.slow), (27, 13)])
def test_positions_are_interpolated_for_images_of_other_sizes(folder, size):
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    expected = torch_logits(theirs, images, interpolate_pos_encoding=True)
    np.testing.assert_allclose(our_logits(loaded(folder), images), expected, atol=1e-4, rtol=1e-4)


def test_an_image_smaller_than_a_patch_is_refused(folder):
    with pytest.raises(InputError, match="smaller than a patch"):
        loaded(folder)(jnp.zeros((1, 3, 16, 3)))


def test_losses_and_gradients_are_those_of_torch(tmp_path):
    folder = save_vit(tmp_path / "model", num_labels=3)
    model, task = loaded(folder), ImageClassification(["a", "b", "c"])
    labels = np.asarray([2, 0, 1], np.int32)
    inputs = {"pixel_values": IMAGES, "labels": labels, "weights": np.ones(3, np.float32)}
    loss = nnx.value_and_grad(lambda model: task.loss(model, inputs), has_aux=True)
    (total, weight), grads = nnx.jit(loss)(model)
    theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
    out = theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2)), labels=torch.tensor(labels).long())
    np.testing.assert_allclose(total / weight, out.loss.item(), rtol=1e-4)
    (out.loss * 3).backward()
    embeddings, layer = theirs.vit.embeddings, theirs.vit.layers[1]
    ours = grads["layers"]
    patches = grads["embeddings"]["patch_embeddings"]["projection"]["kernel"][...]
    for found, expected in (
        (ours["attention"]["q_proj"]["kernel"][...][1].T, layer.attention.q_proj.weight),
        (ours["mlp"]["fc2"]["kernel"][...][1].T, layer.mlp.fc2.weight),
        (grads["classifier"]["kernel"][...].T, theirs.classifier.weight),
        (patches.transpose(3, 2, 0, 1), embeddings.patch_embeddings.projection.weight),
        (grads["embeddings"]["position_embeddings"][...], embeddings.position_embeddings),
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
    assert head_of(tmp_path / "adapter", *load_model_config(folder)) == (
        HEAD,
        ("LABEL_0", "LABEL_1"),
    )


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_of_peft_is_read_with_its_head(folder, tmp_path, targets):
    """As in PEFT's example of image classification, which names no task."""
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForImageClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        target_modules=targets,
        modules_to_save=["classifier"],
    )
    assert head_of(tmp_path / "theirs", *load_model_config(folder))[0] == HEAD


def test_an_adapter_without_a_head_is_for_that_of_the_model(folder, tmp_path):
    check_adapter_in(
        folder,
        tmp_path,
        auto=AutoModelForImageClassification,
        ours=our_logits,
        theirs=torch_logits,
        head=HEAD,
        target_modules=["fc1"],
    )
    assert head_of(tmp_path / "theirs", *load_model_config(folder)) == (
        HEAD,
        ("LABEL_0", "LABEL_1"),
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


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(transformers.ViTModel, marks=pytest.mark.slow),
        transformers.ViTForMaskedImageModeling,
    ],
)
def test_a_head_is_drawn_where_there_is_none_and_that_of_pretraining_is_passed_over(tmp_path, kind):
    """Without the prefix and with a pooler, or with a mask token and a decoder."""
    folder = save_vit(tmp_path / "model", kind, encoder_stride=4)
    one, same, other = (loaded(folder, labels=("a", "b", "c"), seed=seed) for seed in (0, 0, 1))
    assert one.config.labels == ("a", "b", "c")
    assert one.drawn == ("classifier.bias", "classifier.kernel")
    np.testing.assert_array_equal(our_logits(one), our_logits(same))
    assert np.abs(our_logits(one) - our_logits(other)).max() > 1e-3
    tensors = load_file(folder / "model.safetensors")
    (token,) = (tensors[name] for name in tensors if name.endswith("cls_token"))
    np.testing.assert_array_equal(one.embeddings.cls_token[...], token)


def test_the_dtype_of_the_weights_is_found(folder):
    assert stored_dtype(folder) == np.float32


def test_dropout_is_that_of_the_configuration():
    for rates, still in (((0.0, 0.0), True), ((0.5, 0.0), False), ((0.0, 0.5), False)):
        hidden, attention = rates
        config = ViTConfig(
            **SIZES, hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention
        )
        model = ViTForImageClassification(config, rngs=nnx.Rngs(0))
        model.train()
        assert np.array_equal(our_logits(model), our_logits(model)) == still


@pytest.mark.slow
def test_a_mesh_gives_what_one_device_gives(folder):
    check_mesh(folder, HEAD)


@pytest.mark.slow
def test_plan_works(folder):
    check_plan_works(folder, labels=("no", "yes"))


def test_configurations_go_to_transformers_and_back():
    config = ViTConfig(hidden_size=48, num_attention_heads=3, labels=("no", "yes", "maybe"))
    theirs = transformers.ViTConfig(**config.to_hf())
    assert theirs.num_labels == 3
    assert ViTConfig.from_hf(theirs.to_dict()) == config
    assert ViTConfig.from_hf(transformers.ViTConfig().to_dict()) == ViTConfig()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model_type", "bert", "model_type is 'bert', expected 'vit'"),
        ("architectures", ["ViTMAEModel"], "architectures names 'ViTMAEModel'"),
        ("num_channels", 1, "num_channels is 1, only 3 is supported"),
        ("image_size", [16, 32], "image_size is [16, 32], expected an integer"),
        ("patch_size", 17, "patch_size is 17, expected image_size (16) at most"),
        ("num_attention_heads", 5, "hidden_size is 32, expected a multiple"),
        ("qkv_bias", 1, "qkv_bias is 1, expected true or false"),
        ("hidden_act", "swish", "hidden_act is 'swish', expected one of"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field, value, said):
    with pytest.raises(InputError) as raised:
        ViTConfig.from_hf({"model_type": "vit", **SIZES, field: value})
    assert said in str(raised.value)
