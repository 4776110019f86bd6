"""What holds of every decoder, as checks that the tests of one call; see `family_checks` too.

Logits are checked daily for all. Most decoders are made of parts of others: gradients, caches,
adapters and quantization are checked daily for the last of a line, as Gemma 3 after Gemma 2, or
where a family has tensors of its own, as Phi-3; for the others with -m slow.
"""

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from loft_jax.generation import generate
from loft_jax.hub import load_pretrained
from loft_jax.models.quantized import dequantize, quantize
from loft_jax.tasks.causal_lm import CausalLM, predicted
from tests.models.family_checks import (
    TOLERANCE,
    check_adapter_in,
    check_adapter_out,
)

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # logits far enough from uniform for a test to tell
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENS = np.random.default_rng(0).integers(0, 400, (3, 17))


def save_decoder(folder, config):
    """A random model of a configuration of transformers; biases and norms are not as they start."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def torch_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(model):
    return np.asarray(model(TOKENS))


def loaded_in_torch(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def check_logits(folder):
    """Logits are those of transformers."""
    np.testing.assert_allclose(
        load_pretrained(folder)(TOKENS), torch_logits(loaded_in_torch(folder)), **TOLERANCE
    )


def check_texts_in_rows(folder):
    """Texts padded on either side, or packed, give what each gives alone in transformers."""
    lengths = (17, 9, 1, 6, 8)  # the last two are packed
    rows = [0, 1, 2, 2, 2]
    starts = [0, 17 - 9, 0, 1, 7]
    tokens, ids = np.full((3, 17), 7), np.zeros((3, 17), np.int32)
    texts = [TOKENS[row, :n] for row, n in zip((0, 1, 2, 0, 1), lengths, strict=True)]
    for number, (row, start, text) in enumerate(zip(rows, starts, texts, strict=True), 1):
        tokens[row, start : start + len(text)] = text
        ids[row, start : start + len(text)] = number
    found = np.asarray(load_pretrained(folder)(tokens, segment_ids=ids))
    theirs = loaded_in_torch(folder)
    for number, text in enumerate(texts, 1):
        np.testing.assert_allclose(
            found[ids == number], torch_logits(theirs, text[None])[0], **TOLERANCE
        )


def check_gradients(folder, names, layer):
    """Gradients of one layer are torch's.

    Args:
        folder: Of the model.
        names: Names of parameters in the layer, as in transformers.
        layer: Its number.
    """
    batch = {
        "tokens": TOKENS.astype(np.int32),
        "positions": np.tile(np.arange(17, dtype=np.int32), (3, 1)),
        "segment_ids": np.ones((3, 17), np.int32),
        "loss_mask": np.ones((3, 17), np.float32),
    }
    inputs = predicted(batch)
    model = load_pretrained(folder)
    graphdef, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(state):
        return CausalLM().loss(nnx.merge(graphdef, state), inputs)[0]

    grads = nnx.to_flat_state(gradient(state))
    found = {".".join(map(str, path)): value[...] for path, value in grads}
    theirs = loaded_in_torch(folder)
    tokens = torch.tensor(TOKENS)
    logits = theirs(tokens).logits[:, :-1].transpose(1, 2)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="sum").backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    table = {row.name: path for path, row in model.table.tensors.items()}
    for name in names:
        path = table[f"model.layers.{{}}.{name}"]
        grad = expected[f"model.layers.{layer}.{name}"]
        grad = grad.T if model.table.tensors[path].transposed else grad
        scale = np.abs(grad).max()
        assert scale > 0, name
        np.testing.assert_allclose(found[path][layer], grad, atol=1e-4 * scale, err_msg=name)


def check_greedy(folder, new=14):
    """Prompts of several lengths at once continue as each alone in transformers."""
    theirs = loaded_in_torch(folder)
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :3].tolist()]
    found = generate(load_pretrained(folder), prompts, max_new_tokens=new, eos_token_ids=())
    for prompt, continued in zip(prompts, found, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        assert continued == expected[0, len(prompt) :].tolist()


def check_adapters(folder, tmp_path):
    """Adapters go to PEFT and come from it; a merged model opens in transformers."""
    common = {
        "auto": AutoModelForCausalLM,
        "ours": our_logits,
        "theirs": torch_logits,
        "head": "causal-lm",
        "task_type": "CAUSAL_LM",
    }
    check_adapter_out(folder, tmp_path, **common)
    check_adapter_in(folder, tmp_path, **common, target_modules="all-linear")


def check_quantized(folder):
    """A quantized model is the model of its dequantized kernels."""
    model = load_pretrained(folder)
    for _, module in nnx.iter_modules(model.layers):
        if isinstance(module, nnx.Linear):
            kernel = quantize(module.kernel[...], "nf4", name="kernel")
            module.kernel.set_value(dequantize(kernel))
    found = load_pretrained(folder, quantization="nf4")(TOKENS)
    np.testing.assert_allclose(found, model(TOKENS), **TOLERANCE)


def parameter_count(family, config):
    """The number of parameters of a language model of a configuration."""
    make = family.model("causal-lm")
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    return sum(variable.size for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)))
