"""Rotary embedding and its scalings against transformers."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from loft_jax.generation import generate
from loft_jax.hub.pretrained import load_pretrained
from loft_jax.models.llama import LlamaConfig
from loft_jax.models.rope import inverse_frequencies, rotate, rotation
from tests.tiny import save_tiny_llama

SIZES = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
FACTORS = np.random.default_rng(0).uniform(1, 30, (2, 32)).round(3).tolist()
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": FACTORS[0],
    "long_factor": FACTORS[1],
    "original_max_position_embeddings": 1024,
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn, its original context not said": {"rope_type": "yarn", "factor": 8.0},
    "yarn, ramp between dimensions": YARN | {"truncate": False, "beta_fast": 20, "beta_slow": 2.5},
    "yarn, ramp of no width": YARN | {"beta_fast": 3.0, "beta_slow": 3.0, "truncate": False},
    "yarn, ramp of null": YARN | {"truncate": None, "beta_fast": 20, "beta_slow": 2.5},
    "yarn, ramp before the first": YARN | {"original_max_position_embeddings": 3},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, mscale alone": YARN | {"mscale": 0.7},
    "yarn, attention factor": YARN | {"attention_factor": 0.6, "mscale": 1.0},
    "yarn, shrinking": YARN | {"factor": 0.5, "mscale": 0.7, "mscale_all_dim": 1.2},
    "longrope": LONGROPE,
    "longrope, factor": LONGROPE | {"factor": 7.0},
    "longrope, shrinking": LONGROPE | {"factor": 0.7},
    "longrope, attention factor": LONGROPE | {"attention_factor": 1.3, "factor": 7.0},
    "longrope, its original context not said": {
        key: LONGROPE[key] for key in ("rope_type", "short_factor", "long_factor")
    },
}


def llama(theta, scaling):
    """A configuration, of its own since transformers changes what it is given."""
    return SIZES | {"rope_theta": theta, "rope_scaling": copy.deepcopy(SCALINGS.get(scaling))}


@pytest.mark.parametrize("scaling", [None, "linear", "llama3", "yarn", "longrope, factor"])
def test_rotation_equals_transformers(scaling):
    hf = llama(5e5, scaling)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 4, 64)).astype(np.float32)  # (b, t, heads, head_dim)
    positions = rng.integers(0, 2000, (2, 7))
    positions[:, 0] = 1999  # transformers has one length for all rows

    cos, sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**hf))(
        torch.tensor(x), torch.tensor(positions)
    )
    queries = torch.tensor(x)
    expected, _ = apply_rotary_pos_emb(queries, queries, cos, sin, unsqueeze_dim=2)

    config = LlamaConfig.from_hf(hf)
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    found = rotate(x, *rotation(positions, None, dim=dim, theta=theta, scaling=scaling))
    # float32 angles of up to 2000 radians: one unit in the last place is 1.2e-4
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    near = positions < 100
    np.testing.assert_allclose(found[near], expected.numpy()[near], atol=2e-5)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name, theta):
    hf = llama(theta, name)
    config, theirs = LlamaConfig.from_hf(hf), transformers.LlamaConfig(**hf)
    dim, scaling = config.head_dim, config.rope_scaling
    init = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]]
    expected, factor = init(theirs)
    np.testing.assert_allclose(inverse_frequencies(dim, theta, scaling), expected, rtol=2e-6)
    assert scaling.attention_scaling == pytest.approx(factor, rel=1e-12)
    lengths = np.array([[1, 1024, 1025], [4096, 4097, 30_001]])
    found = jnp.broadcast_to(inverse_frequencies(dim, theta, scaling, lengths), (2, 3, 32))
    for row, column in np.ndindex(2, 3):
        length = torch.tensor(int(lengths[row, column]))
        expected, _ = init(theirs, seq_len=length)
        np.testing.assert_allclose(found[row, column], expected, rtol=2e-6)


def test_the_length_of_a_text_is_that_of_its_segment():
    """One more than its largest position: as alone, packed, padded, or with branches."""
    config = LlamaConfig.from_hf(
        SIZES | {"max_position_embeddings": 3, "rope_scaling": SCALINGS["dynamic"]}
    )
    settings = {"dim": 64, "theta": config.rope_theta, "scaling": config.rope_scaling}
    positions = np.array([[0, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 2, 3, 0, 0, 0]])
    segments = np.array([[0, 1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 1, 0, 0, 0]])
    found = rotation(positions, segments, **settings)
    for row, columns in ((0, slice(1, 6)), (0, slice(6, 8)), (1, slice(0, 5))):
        alone = rotation(positions[row : row + 1, columns], None, **settings)
        for ours, expected in zip(found, alone, strict=True):
            np.testing.assert_array_equal(ours[row, columns], expected[0])


# Of a Llama with 4 pairs of dimensions a head, pretrained on 32 tokens.
SMALL = {
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 32),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    "longrope": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 5.5, 9.0],
            "original_max_position_embeddings": 32,
        },
        128,
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 400, (1, 90)).astype(np.int32)


@pytest.fixture(scope="module", params=SMALL)
def folder(request, tmp_path_factory):
    scaling, longest = SMALL[request.param]
    return save_tiny_llama(
        tmp_path_factory.mktemp("rope") / request.param,
        max_position_embeddings=longest,
        rope_parameters={"rope_theta": 1e3, **scaling},
    )


@pytest.fixture(scope="module")
def model(folder):
    return load_pretrained(folder)


def torch_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.parametrize("length", [32, 33, 90])
def test_logits_are_those_of_transformers_at_any_length(folder, model, length):
    tokens = TOKENS[:, :length]
    expected = torch_logits(folder, tokens)
    np.testing.assert_allclose(model(tokens), expected, atol=1e-4, rtol=1e-4)


def test_packed_and_padded_texts_of_different_lengths_give_what_they_give_alone(folder, model):
    lengths = (20, 50, 33)
    texts = [TOKENS[0, :length] for length in lengths]
    packed = np.concatenate([*texts, np.zeros(7, np.int32)])[None]
    segments = np.repeat([1, 2, 3, 0], [*lengths, 7])[None]
    found, start = np.asarray(model(packed, segment_ids=segments)), 0
    for text in texts:
        expected = torch_logits(folder, text[None])[0]
        np.testing.assert_allclose(
            found[0, start : start + len(text)], expected, atol=1e-4, rtol=1e-4
        )
        start += len(text)
    padding = ((0, 0), (90 - 33, 0))  # left
    padded = model(np.pad(texts[2][None], padding), segment_ids=np.pad([[1] * 33], padding))
    np.testing.assert_allclose(padded[0, 90 - 33 :], expected, atol=1e-4, rtol=1e-4)


def test_greedy_continuations_are_those_of_transformers(folder, model):
    """Past the context of pretraining, where both keep the keys of earlier tokens as they are."""
    new = generate(model, [TOKENS[0, :25].tolist()], max_new_tokens=20, eos_token_ids=())
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    expected = theirs.generate(
        torch.tensor(TOKENS[:, :25]).long(), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert new[0] == expected[0, 25:].tolist()
