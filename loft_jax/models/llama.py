"""The Llama family: configuration, model, parameters, and what its GGUF files have of their own.

Module names are Hugging Face's. `layers` is one decoder layer whose parameters have a leading
axis of layers. Families that differ from it in a few points are subclasses in their own files.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.models.activations import embeddings_laid_out, laid_out
from loft_jax.models.attention import KVCache, attend, positions_from, visibility, windowed
from loft_jax.models.decoder_config import DecoderConfig
from loft_jax.models.decoder_gguf import DecoderGGUF
from loft_jax.models.family import (
    Family,
    LanguageModel,
    ParameterTable,
    Remat,
    embedding,
    linear,
    norm,
)
from loft_jax.models.parts import Parts
from loft_jax.models.rope import rotate, rotation
from loft_jax.models.stack import PerLayer, run_layers

Norm = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Sizes and constants of a Llama, under the names of Hugging Face's `config.json`.

    Reads what Llama 1, 2 and 3.x, SmolLM2 and TinyLlama write.

    Example:
        >>> config = LlamaConfig.from_hf(
        ...     dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4)
        ... )
        >>> config.num_key_value_heads, config.head_dim
        (4, 8)
    """

    model_type: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    only: ClassVar[Mapping[str, Any]] = {
        **DecoderConfig.only,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "sliding_window": None,
    }

    attention_bias: bool = False
    mlp_bias: bool = False


class SelfAttention(nnx.Module):
    """Rotary grouped-query self-attention.

    Attributes:
        scale: As for `attend`.
        softcap: As for `attend`.
    """

    scale: float | None = None
    softcap: float | None = None

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = parts.linear(config.hidden_size, width, use_bias=config.qkv_bias)
        self.k_proj = parts.linear(config.hidden_size, kv_width, use_bias=config.qkv_bias)
        self.v_proj = parts.linear(config.hidden_size, kv_width, use_bias=config.qkv_bias)
        self.o_proj = parts.linear(width, config.hidden_size, use_bias=config.attention_bias)

    def projected(self, x: jax.Array) -> Sequence[jax.Array]:
        """Gives queries, keys and values `(b, t, heads * head_dim)` of `x (b, t, hidden)`."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def normalized(self, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gives what is rotated of queries and keys `(b, t, heads, head_dim)`: here, themselves."""
        return queries, keys

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: jax.Array,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Mixes `x (b, t, hidden)` over the visible tokens; writes the cache if there is one."""
        queries, keys, values = (
            laid_out(part.reshape(*x.shape[:2], -1, self.head_dim), features=2)
            for part in self.projected(x)
        )  # (b, t, heads, head_dim)
        queries, keys = self.normalized(queries, keys)
        queries = rotate(queries, cos, sin)
        keys = rotate(keys, cos, sin).swapaxes(1, 2)  # (b, kv_heads, t, head_dim)
        values = values.swapaxes(1, 2)
        if cache is not None:
            cache, keys, values = cache.written(layer, keys, values)
        mixed = attend(queries, keys, values, visible, scale=self.scale, softcap=self.softcap)
        mixed = laid_out(mixed.reshape(*x.shape[:2], -1), features=2)
        return laid_out(self.o_proj(mixed)), cache


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = parts.linear(width, inner, use_bias=bias)
        self.up_proj = parts.linear(width, inner, use_bias=bias)
        self.down_proj = parts.linear(inner, width, use_bias=bias)

    def projected(self, x: jax.Array) -> Sequence[jax.Array]:
        """Gives the gate and what it multiplies, `(b, t, inner)`, of `x (b, t, hidden)`."""
        return self.gate_proj(x), self.up_proj(x)

    def activated(self, gate: jax.Array) -> jax.Array:
        """Applies the activation, elementwise."""
        return nnx.silu(gate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        gate, up = (laid_out(part, features=2) for part in self.projected(x))
        return laid_out(self.down_proj(self.activated(gate) * up))


class DecoderLayer(nnx.Module):
    """Attention, then the MLP, each after a norm and added to the residual stream.

    Attributes:
        attention: Class of its attention.
        feed_forward: Class of its MLP.
    """

    attention: ClassVar[type[SelfAttention]] = SelfAttention
    feed_forward: ClassVar[type[MLP]] = MLP

    def __init__(self, config: DecoderConfig, parts: Parts) -> None:
        self.input_layernorm: Norm = parts.rms_norm(config.hidden_size)
        self.self_attn = self.attention(config, parts)
        self.post_attention_layernorm: Norm = parts.rms_norm(config.hidden_size)
        self.mlp = self.feed_forward(config, parts)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: jax.Array,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies layer number `layer` to `x (b, t, hidden)`."""
        mixed, cache = self.self_attn(self.input_layernorm(x), cos, sin, visible, cache, layer)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(LanguageModel):
    """A decoder-only language model of the Llama family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again: "full", each layer as a whole; "dots", all of
            a layer but the outputs of its linear layers, which are kept; "none", nothing.
        rngs: For the initial parameters, drawn as Hugging Face draws them.

    Attributes:
        layer: Class of its layers.

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=8)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Touvron et al., https://arxiv.org/abs/2302.13971; Grattafiori et al.,
        https://arxiv.org/abs/2407.21783.
    """

    architecture = LlamaConfig.architecture
    layer: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: Remat = "dots",
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        parts = Parts(config, dtype, param_dtype, rngs)
        width, words = config.hidden_size, config.vocab_size
        self.embed_tokens = parts.embed(words, width)
        self.layers = parts.stack(config.num_hidden_layers, lambda own: self.layer(config, own))
        self.norm: Norm = parts.rms_norm(width)
        if not config.tie_word_embeddings:
            self.lm_head = parts.linear(
                width, words, use_bias=False, preferred_element_type=jnp.float32
            )

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branch_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes the input of the head; see `LanguageModel.hidden_states`."""
        batch, length = tokens.shape
        visible, cache = visibility(batch, length, segment_ids, cache, branch_ids)
        if positions is None:
            positions = positions_from(visible)
        cos, sin = self.rotations(positions, segment_ids)
        x = self.embedded(tokens)  # (b, t, hidden)
        masks = self.masks(visible)
        x, cache = run_layers(self.layers, x, cos, sin, masks, cache=cache, remat=self.remat)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return self.norm(x), cache

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """Gives the input of the first layer, `(b, t, hidden)`, of tokens `(b, t)`."""
        return embeddings_laid_out(self.embed_tokens(tokens))

    def rotations(
        self, positions: jax.Array, segment_ids: jax.Array | None
    ) -> Sequence[jax.Array | PerLayer]:
        """Gives cosines and sines as `rotation` does, one of each for all layers or for each."""
        config = self.config
        return rotation(
            positions,
            segment_ids,
            dim=config.rotary_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
        )

    def masks(self, visible: jax.Array) -> jax.Array | PerLayer:
        """Gives the mask of attention, one for all layers or one for each.

        Args:
            visible: `(b, t, s)`: keys of the same text that are not later.

        Returns:
            Mask `(b, t, s)`, or a `PerLayer` of such masks.
        """
        return windowed(visible, self.config.sliding_window)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Makes an empty cache for `batch` rows of at most `length` tokens."""
        return KVCache.empty(
            layers=self.config.num_hidden_layers,
            batch=batch,
            length=length,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
        )

    @staticmethod
    def parameter_table(config: DecoderConfig) -> ParameterTable:
        """Makes the parameter table of a model of this configuration."""
        layer = "model.layers.{}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        tied = "lm_head.weight" if config.tie_word_embeddings else ""
        return ParameterTable(
            {
                **embedding("embed_tokens", "model.embed_tokens", ("vocab", "embed"), tied=tied),
                **norm("layers.input_layernorm", f"{layer}.input_layernorm"),
                **linear("layers.self_attn.q_proj", f"{attention}.q_proj", ("embed", "heads")),
                **linear("layers.self_attn.k_proj", f"{attention}.k_proj", ("embed", "kv_heads")),
                **linear("layers.self_attn.v_proj", f"{attention}.v_proj", ("embed", "kv_heads")),
                **linear("layers.self_attn.o_proj", f"{attention}.o_proj", ("heads", "embed")),
                **norm("layers.post_attention_layernorm", f"{layer}.post_attention_layernorm"),
                **linear("layers.mlp.gate_proj", f"{mlp}.gate_proj", ("embed", "mlp")),
                **linear("layers.mlp.up_proj", f"{mlp}.up_proj", ("embed", "mlp")),
                **linear("layers.mlp.down_proj", f"{mlp}.down_proj", ("mlp", "embed")),
                **norm("norm", "model.norm"),
                **linear("lm_head", "lm_head", ("embed", "vocab")),
            },
            units={"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads},
        )


def with_norms(table: ParameterTable, names: Sequence[str]) -> ParameterTable:
    """Adds norms of a layer, by their names in it, to a table."""
    rows = dict(table.tensors)
    for name in names:
        rows |= norm(f"layers.{name}", f"model.layers.{{}}.{name}")
    return dataclasses.replace(table, tensors=rows)


class _LlamaGGUF(DecoderGGUF):
    """GGUF files of the architecture "llama", to which Mistral's belong too."""

    architecture = "llama"
    config_class = LlamaConfig

    def stored_rows(self, name: str, rows: np.ndarray, config: LlamaConfig) -> np.ndarray:
        """Gives the stored positions of rows: files keep rows that rotate together adjacent."""
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
        }.get(name.split(".")[-2])
        if heads is None:
            return rows
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)  # (heads, 2, head_dim / 2)

    def fields(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """Gives the fields of the configuration, with those of biases."""
        return {
            **super().fields(metadata, shapes, constants),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
        }


def _llama_2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llama_3(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
    )


# As in the config.json that was published with each.
_WELL_KNOWN: Mapping[str, LlamaConfig] = {
    "llama-2-7b": _llama_2(4096, 11_008, 32, 32, 32),
    "llama-2-13b": _llama_2(5120, 13_824, 40, 40, 40),
    "llama-2-70b": _llama_2(8192, 28_672, 80, 64, 8),
    "llama-3-8b": _llama_3(4096, 14_336, 32, 32),
    "llama-3-70b": _llama_3(8192, 28_672, 80, 64),
}

FAMILY = Family(
    model_type=LlamaConfig.model_type,
    config=LlamaConfig,
    models={"causal-lm": Llama},
    prefix="model.",
    # Older checkpoints carry the rotary frequencies, which the configuration already gives.
    ignored=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    sizes=_WELL_KNOWN,
    gguf=_LlamaGGUF(),
)
