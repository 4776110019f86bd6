"""Floating-point operations of a step, and of the chips that compute it."""

import jax

from loft_jax.models import LlamaConfig

# Dense bfloat16 operations a second, by JAX's name of the device: Google's and NVIDIA's figures.
_PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(config: LlamaConfig, length: int, *, full: bool) -> float:
    """Model FLOPs of one trained token: 2 a weight and pass, and those of the attention scores.

    There are three passes: forward, the gradient of activations, and the gradient of weights. The
    last one is left out where the base is frozen; adapters are not counted, nor is what is
    computed again.

    Args:
        config: Of the model.
        length: Tokens of a row, which a token attends to; masked ones count, as is the custom.
        full: Whether all weights are trained.

    Returns:
        Multiplications and additions.

    Example:
        >>> from loft_jax.models.llama_sizes import LLAMA_SIZES
        >>> f"{flops_per_token(LLAMA_SIZES['llama-2-7b'], 4096, full=True):.3g}"
        '4.61e+10'

    Source:
        Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    width, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    kv_width = config.num_key_value_heads * config.head_dim
    layer = hidden * (2 * width + 2 * kv_width) + 3 * hidden * config.intermediate_size
    weights = config.num_hidden_layers * layer + hidden * config.vocab_size
    scores = config.num_hidden_layers * 4 * width * length
    passes = 3 if full else 2
    return float(passes * 2 * weights + 3 * scores)


def peak_flops(device: jax.Device) -> float | None:
    """FLOPs a second that a device is sold with, in bfloat16; None for one that is not known."""
    return _PEAK.get(device.device_kind)
