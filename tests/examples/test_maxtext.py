"""The recipe for MaxText: its numbers by the scan at axis 0, its adapter by PEFT."""

import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import loft_jax
from examples.maxtext import conversion, finetune, layers, llama
from loft_jax import LoRAConfig, merge_lora, register_lora_layer
from loft_jax.lora.linen import add_lora
from tests.pages import ROOT, blocks

PAGE = "docs/how-to/maxtext.md"


def moved(tree):
    """A tree with the layers at axis 0 in place of 1."""
    decoder = tree["decoder"]
    at_zero = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), decoder["layers"])
    return {**tree, "decoder": {**decoder, "layers": at_zero}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the recipe: its folder, what it trained with, and what came of it."""
    seen, train = [], finetune.train

    def recorded(*args, **kwargs):
        seen.append((*args, train(*args, **kwargs)))
        return seen[0][-1]

    folder = tmp_path_factory.mktemp("maxtext")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "train", recorded)
        finetune.main(str(folder))
    return folder, *seen[0]


def test_layers_are_scanned_at_axis_1_and_learn(run):
    _, _, params, _, _, (_, losses) = run
    kernels = params["decoder"]["layers"]["self_attention"]
    assert kernels["query"]["kernel"].shape == (16, 2, 2, 8)
    assert kernels["out"]["kernel"].shape == (2, 2, 8, 16)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_training_is_that_of_a_scan_at_axis_0(run):
    _, lora, params, factors, tokens, (trained, losses) = run
    at_zero = add_lora(llama.Transformer(param_scan_axis=0), lora.config, tokens)
    found, their_losses = finetune.train(
        at_zero, moved(params), moved(factors), tokens, steps=len(losses)
    )
    np.testing.assert_allclose(losses, their_losses, rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, moved(trained))


def torch_llama(params):
    """Weights in torch's Llama, by MaxText's own conversion."""
    config = LlamaConfig(
        vocab_size=llama.VOCAB,
        hidden_size=layers.EMBED,
        intermediate_size=layers.MLP,
        num_hidden_layers=llama.LAYERS,
        num_attention_heads=layers.HEADS,
        num_key_value_heads=layers.KV_HEADS,
        head_dim=layers.HEAD_DIM,
        rms_norm_eps=1e-5,
    )
    decoder = params["decoder"]
    weights = {
        "model.embed_tokens.weight": params["token_embedder"]["embedding"],
        "model.norm.weight": decoder["decoder_norm"]["scale"],
        "lm_head.weight": decoder["logits_dense"]["kernel"].T,
    }
    stacked = decoder["layers"]
    for number in range(llama.LAYERS):
        for ours, theirs in {
            "pre_self_attention_layer_norm": "input_layernorm",
            "post_self_attention_layer_norm": "post_attention_layernorm",
        }.items():
            scale = stacked[ours]["scale"][:, number]
            weights[f"model.layers.{number}.{theirs}.weight"] = scale
        for ours in conversion.PROJECTIONS:
            module, name = ours.split(".")
            kernel = stacked[module][name]["kernel"][:, number]
            matrix = kernel.reshape(-1, layers.EMBED) if name in ("out", "wo") else kernel
            matrix = matrix.reshape(matrix.shape[0], -1).T
            if name == "query":
                matrix = matrix * math.sqrt(layers.HEAD_DIM)
            weights[conversion.hf_name(f"decoder.layers.{ours}", number) + ".weight"] = matrix
    model = LlamaForCausalLM(config)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()})
    return model.eval()


def test_peft_computes_the_same_logits(run):
    folder, lora, params, factors, tokens, (trained, _) = run
    base = torch_llama(params)
    with torch.no_grad():
        theirs = base(torch.from_numpy(np.array(tokens))).logits.numpy()
        ours = lora.apply({"params": params, "lora": factors}, tokens)  # B is zero
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        adapted = PeftModel.from_pretrained(base, str(folder))
        theirs = adapted(torch.from_numpy(np.array(tokens))).logits.numpy()
    found = lora.apply({"params": params, "lora": trained}, tokens)
    np.testing.assert_allclose(found, theirs, atol=1e-4)
    assert np.abs(found - ours).max() > 0.1


def test_the_page_shows_the_code_that_runs():
    folder = ROOT / "examples/maxtext"
    code = "".join((folder / name).read_text() for name in ("finetune.py", "conversion.py"))
    shown = [block for block in blocks(PAGE, "python") if "register_lora_layer" not in block]
    assert len(shown) >= 3
    for block in shown:
        assert any(textwrap.indent(block, " " * depth) in code for depth in (0, 4, 8))


def test_a_class_of_maxtexts_form_is_registered_as_the_page_says():
    class DenseGeneral(nnx.Module):
        def __init__(self, rngs):
            self.in_features_shape, self.out_features_shape = (6,), (2, 4)
            self.kernel = nnx.Param(jax.random.normal(rngs.params(), (6, 2, 4)))

        def __call__(self, x):
            return jnp.tensordot(x, self.kernel[...], 1)

    [block] = [block for block in blocks(PAGE, "python") if "register_lora_layer" in block]
    exec(block, {"register_lora_layer": register_lora_layer, "DenseGeneral": DenseGeneral})
    model = loft_jax.add_lora(
        nnx.Sequential(DenseGeneral(nnx.Rngs(0))), LoRAConfig(rank=2), rngs=nnx.Rngs(1)
    )
    layer = model.layers[0]
    assert (layer.lora_a.shape, layer.lora_b.shape) == ((6, 2), (2, 2, 4))
    layer.lora_b.set_value(jnp.ones((2, 2, 4)))
    x = jnp.ones((3, 6))
    found = model(x)
    np.testing.assert_allclose(found, merge_lora(model)(x), rtol=1e-5)
    assert found.shape == (3, 2, 4)
