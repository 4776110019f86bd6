import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from loft_jax.models.llama import LlamaConfig
from loft_jax.models.rope import inverse_frequencies, rotate, rotation

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


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_rotation_equals_transformers(scaling):
    hf = SIZES | {"rope_theta": 5e5, "rope_scaling": scaling}
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 4, 64)).astype(np.float32)  # (b, t, heads, head_dim)
    positions = rng.integers(0, 2000, (2, 7))

    cos, sin = LlamaRotaryEmbedding(transformers.LlamaConfig(**hf))(
        torch.tensor(x), torch.tensor(positions)
    )
    queries = torch.tensor(x)
    expected, _ = apply_rotary_pos_emb(queries, queries, cos, sin, unsqueeze_dim=2)

    config = LlamaConfig.from_hf(hf)
    frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    found = rotate(x, *rotation(frequencies, positions))
    # float32 angles of up to 2000 radians: one unit in the last place is 1.2e-4
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)
    near = positions < 100
    np.testing.assert_allclose(found[near], expected.numpy()[near], atol=2e-5)
