import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from loft_jax.hub.pretrained import load_pretrained
from loft_jax.lora import LoRAConfig, add_lora
from loft_jax.models.llama import Llama, LlamaConfig
from tests.tiny import save_tiny_llama

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
KINDS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 16, "num_key_value_heads": 1},
    "llama3": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 400, shape).astype(np.int32)


def torch_logits(folder, tokens, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.float().numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama") / "gqa")


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


def fill_biases(folder):
    """transformers starts biases at zero, where a lost one would not show."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(tmp_path, kind):
    folder = save_tiny_llama(tmp_path / kind, **KINDS[kind])
    if kind == "biases":
        fill_biases(folder)
    tokens = random_tokens((2, 50))
    logits = load_pretrained(folder)(jnp.asarray(tokens))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, torch_logits(folder, tokens), atol=1e-4, rtol=0)


def test_bfloat16_compute_loses_no_more_than_in_transformers(folder, model):
    tokens = random_tokens((4, 50))
    half = load_pretrained(folder, dtype=jnp.bfloat16)
    assert half.layers.mlp.up_proj.kernel.dtype == jnp.float32
    assert half.hidden_states(tokens)[0].dtype == jnp.bfloat16
    logits, exact = half(tokens), model(tokens)
    assert logits.dtype == jnp.float32
    lost = float(jnp.abs(logits - exact).mean())
    lost_there = np.abs(torch_logits(folder, tokens, torch.bfloat16) - exact).mean()
    assert 1e-3 < lost < 1.1 * lost_there


# Daily in test_gemma2.py, against transformers.
@pytest.mark.slow
def test_a_branch_is_the_text_alone_with_it_behind(model):
    prompt, *branches = (random_tokens((1, size)) for size in (6, 3, 4))
    tokens = np.concatenate([prompt, *branches], axis=1)
    ids = np.concatenate([np.full(x.shape, i) for i, x in enumerate([prompt, *branches])], axis=1)
    hidden, _ = model.hidden_states(jnp.asarray(tokens), branch_ids=jnp.asarray(ids))
    for i, branch in enumerate(branches, 1):
        alone, _ = model.hidden_states(jnp.asarray(np.concatenate([prompt, branch], axis=1)))
        np.testing.assert_allclose(hidden[ids == i], alone[0, 6:], atol=1e-5)


def gradients(model, tokens):
    graphdef, state = nnx.split(model)

    def loss(state):
        logits = nnx.merge(graphdef, state)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    return jax.jit(jax.grad(loss))(state)


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_gradients_equal_torch_with_and_without_remat(folder, remat):
    tokens = random_tokens((2, 20))
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    labels = torch.tensor(tokens).long()
    theirs(labels, labels=labels).loss.backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}

    found = gradients(load_pretrained(folder, remat=remat), jnp.asarray(tokens))
    for layer in range(2):
        np.testing.assert_allclose(
            found.layers.self_attn.q_proj.kernel[layer],
            expected[f"model.layers.{layer}.self_attn.q_proj.weight"].T,
            atol=1e-5,
        )
    np.testing.assert_allclose(
        found.embed_tokens.embedding[...], expected["model.embed_tokens.weight"], atol=1e-5
    )
    np.testing.assert_allclose(found.lm_head.kernel[...], expected["lm_head.weight"].T, atol=1e-5)
    np.testing.assert_allclose(found.norm.scale[...], expected["model.norm.weight"], atol=1e-5)


def test_packed_texts_give_what_they_give_alone(model):
    texts = np.stack([random_tokens(8, seed) for seed in range(3)])
    tokens = np.concatenate([*texts, [0, 0]])[None]
    segment_ids = np.repeat([1, 2, 3, 0], [8, 8, 8, 2])[None]
    positions = np.concatenate([*[np.arange(8)] * 3, [0, 0]])[None]
    given = model(tokens, segment_ids=segment_ids, positions=positions)
    derived = model(tokens, segment_ids=segment_ids)
    np.testing.assert_array_equal(given, derived)
    np.testing.assert_allclose(given[0, :24].reshape(3, 8, -1), model(texts), atol=1e-5)
    assert jnp.isfinite(given).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, side):
    text = random_tokens((1, 9))
    padding = ((0, 0), (4, 0) if side == "left" else (0, 4))
    logits = model(np.pad(text, padding), segment_ids=np.pad(np.ones_like(text), padding))
    kept = logits[:, 4:] if side == "left" else logits[:, :9]
    np.testing.assert_allclose(kept, model(text), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_continues_padded_rows(model, side):
    """Prompts of 3 and 6 tokens, padded to 6, then 2 more each: as the whole texts at once."""
    texts = [random_tokens(5, 1), random_tokens(8, 2)]
    tokens, ids = np.zeros((2, 6), np.int32), np.zeros((2, 6), np.int32)
    for row, length in enumerate((3, 6)):
        columns = slice(6 - length, 6) if side == "left" else slice(0, length)
        tokens[row, columns] = texts[row][:length]
        ids[row, columns] = 1
    _, cache = model(tokens, segment_ids=ids, cache=model.init_cache(2, 10))
    step = jax.jit(lambda tokens, cache: model(tokens, cache=cache))
    found = []
    for ahead in range(2):
        new = np.array([[texts[0][3 + ahead]], [texts[1][6 + ahead]]])
        logits, cache = step(new, cache)
        found.append(logits[:, 0])
    assert int(cache.length) == 8
    for row, text in enumerate(texts):
        expected = model(text[None])[0, -2:]
        np.testing.assert_allclose(np.stack([x[row] for x in found]), expected, atol=1e-5)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_layers_may_be_swapped_for_lora_with_dropout(folder, remat):
    model = load_pretrained(folder, remat=remat)
    tokens = jnp.asarray(random_tokens((2, 10)))
    before = model(tokens)
    add_lora(model, LoRAConfig(rank=2, dropout=0.5, target_modules=["up_proj"]), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(tokens), before)
    model.layers.mlp.up_proj.lora_b[...] += 0.5
    once, again = model(tokens), model(tokens)
    assert jnp.abs(once - again).max() > 1e-3, "dropout streams did not move on"

    graphdef, factors, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    @jax.grad
    def gradient(factors):
        # a copy, for dropout to move its streams on inside the trace
        return nnx.merge(graphdef, factors, rest, copy=True)(tokens).var()

    grads = gradient(factors)
    assert grads.layers.mlp.up_proj.lora_a.shape == (2, 32, 2)
    assert all(jnp.abs(layer).max() > 0 for layer in grads.layers.mlp.up_proj.lora_a[...])


def test_parameters_start_as_transformers_starts_them():
    model = Llama(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = model.layers.mlp.gate_proj.kernel[...]
    assert kernel.dtype == jnp.bfloat16
    assert float(jnp.std(kernel.astype(jnp.float32))) == pytest.approx(0.02, rel=0.05)
    assert not jnp.array_equal(kernel[0], kernel[1])
    assert (model.norm.scale[...] == 1).all()
