"""The Llama family in Flax NNX: all decoder layers stacked under one scan.

Module names are Hugging Face's. ``layers`` is one decoder layer whose parameters have a leading
axis of layers; so has whatever is added to it (LoRA factors, dropout streams).
"""

import dataclasses
import functools
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from loft_jax.models.activations import embeddings_laid_out, laid_out
from loft_jax.models.attention import KVCache, attend, positions_from, visibility
from loft_jax.models.llama_config import LlamaConfig
from loft_jax.models.llama_layout import hf_module_name
from loft_jax.models.rope import rotate, rotation

Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again; see :class:`Llama`."""


class SelfAttention(nnx.Module):
    """Rotary grouped-query self-attention."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.head_dim = config.head_dim
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.attention_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width)
        self.k_proj = linear(config.hidden_size, kv_width)
        self.v_proj = linear(config.hidden_size, kv_width)
        self.o_proj = linear(width, config.hidden_size)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: jax.Array,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Mixes ``x (b, t, hidden)`` over the visible tokens; writes the cache if there is one."""
        heads = (*x.shape[:2], -1, self.head_dim)
        queries, keys, values = (
            laid_out(project(x).reshape(heads), features=2)  # (b, t, heads, head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries = rotate(queries, cos, sin)
        keys = rotate(keys, cos, sin).swapaxes(1, 2)  # (b, kv_heads, t, head_dim)
        values = values.swapaxes(1, 2)
        if cache is not None:
            start = (layer, 0, 0, cache.length, 0)
            cache = dataclasses.replace(
                cache,
                keys=lax.dynamic_update_slice(
                    cache.keys, keys[None].astype(cache.keys.dtype), start
                ),
                values=lax.dynamic_update_slice(
                    cache.values, values[None].astype(cache.values.dtype), start
                ),
            )
            keys, values = cache.keys[layer], cache.values[layer]  # (b, kv_heads, s, head_dim)
        mixed = attend(queries, keys, values, visible)
        mixed = laid_out(mixed.reshape(*x.shape[:2], -1), features=2)
        return laid_out(self.o_proj(mixed)), cache


class MLP(nnx.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = functools.partial(
            nnx.Linear,
            use_bias=config.mlp_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``(b, t, hidden)`` to ``(b, t, hidden)``."""
        gate, up = (laid_out(f(x), features=2) for f in (self.gate_proj, self.up_proj))
        return laid_out(self.down_proj(nnx.silu(gate) * up))


class DecoderLayer(nnx.Module):
    """Attention, then the MLP, each behind a norm and beside the residual stream."""

    def __init__(
        self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(_norm, config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        visible: jax.Array,
        cache: KVCache | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies layer number ``layer`` to ``x (b, t, hidden)``."""
        mixed, cache = self.self_attn(self.input_layernorm(x), cos, sin, visible, cache, layer)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """A decoder-only language model of the Llama family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again: "full", each layer as a whole; "dots", all of
            a layer but the outputs of its linear layers, which are kept; "none", nothing.
        rngs: For the initial parameters, drawn as Hugging Face draws them.

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

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: Remat = "dots",
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        normal = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=normal,
            rngs=rngs,
        )

        @nnx.split_rngs(splits=config.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = _norm(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                preferred_element_type=jnp.float32,
                kernel_init=normal,
                rngs=rngs,
            )

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]: ...

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Gives the logits of the token after each token.

        Args:
            tokens: ``(b, t)`` int32.
            positions: ``(b, t)`` int32; by default each token's place within its segment.
            segment_ids: ``(b, t)`` int32: 0 for padding, equal numbers for tokens of one text.
                Texts in one row do not see each other. By default every row is one text, unpadded.
            cache: What came before these tokens, from :meth:`init_cache` or an earlier call.

        Returns:
            Logits ``(b, t, vocab)`` float32; with a cache, also the cache extended by the tokens.
        """
        hidden, cache = self.hidden_states(
            tokens, positions=positions, segment_ids=segment_ids, cache=cache
        )
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    def hidden_states(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        branch_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Gives what the head reads, for callers that want logits of a few tokens only.

        Args:
            tokens: As for :meth:`__call__`, and so are the others.
            positions: ``(b, t)`` int32.
            segment_ids: ``(b, t)`` int32.
            branch_ids: ``(b, t)`` int32: several ways to go on with one text, in one row. 0 for
                what all of them see, equal numbers for the tokens of one; branches do not see each
                other, and each is at the positions behind what all see. Not with a cache.
            cache: What came before.

        Returns:
            ``(b, t, hidden)`` in the compute dtype, and the extended cache (None without one).

        Raises:
            ValueError: Branches are given with a cache.
        """
        batch, length = tokens.shape
        visible, cache = visibility(batch, length, segment_ids, cache, branch_ids)
        if positions is None:
            positions = positions_from(visible)
        cos, sin = rotation(self.config, positions)
        x = embeddings_laid_out(self.embed_tokens(tokens))  # (b, t, hidden)
        graphdef, state = nnx.split(self.layers)
        params, rest = nnx.split_state(state, nnx.Param, ...)
        x, cache, rest = _scan_layers(
            graphdef, self.remat, params, rest, x, cos, sin, visible, cache
        )
        nnx.update(self.layers, rest)  # dropout streams that were drawn from
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the head, tied or not: ``(..., hidden)`` to ``(..., vocab)`` float32."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        embedding = self.embed_tokens.embedding[...].astype(self.dtype)  # (vocab, hidden)
        return jnp.einsum("...e,ve->...v", hidden, embedding, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Makes an empty cache for ``batch`` rows of at most ``length`` tokens."""
        return KVCache.empty(
            layers=self.config.num_hidden_layers,
            batch=batch,
            length=length,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
        )

    def hf_name(self, path: str, layer: int | None) -> str:
        """Hugging Face's name of a module; as :func:`llama_layout.hf_module_name`."""
        return hf_module_name(path, layer)


def _norm(
    config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


# Compiled on its own so that a model called outside jit does not compile its scan at every call.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _scan_layers(
    graphdef: nnx.GraphDef[DecoderLayer],
    remat: Remat,
    params: nnx.State,
    rest: nnx.State,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    visible: jax.Array,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None, nnx.State]:
    """Runs every layer; ``rest`` is all state that is no parameter, returned where it changed."""

    def body(carry: Any, scanned: Any) -> tuple[Any, nnx.State]:
        x, cache = carry
        params, rest, index = scanned
        before = {path: variable.get_value() for path, variable in nnx.to_flat_state(rest)}
        layer = nnx.merge(graphdef, params, rest)
        x, cache = layer(x, cos, sin, visible, cache, index)
        # What stays the same is left alone: NNX lets no outer variable be set from inside a trace.
        changed = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.Param)))
            if variable.get_value() is not before[path]
        ]
        return (laid_out(x), cache), nnx.from_flat_state(changed)

    # By default only the products with weights are kept for the backward pass: what lies between
    # them is cheap to compute again, and costs more memory traffic than it saves.
    policies = jax.checkpoint_policies
    keep = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "none": policies.everything_saveable,
    }[remat]
    body = jax.checkpoint(body, prevent_cse=False, policy=keep)
    count = jax.tree.leaves(params)[0].shape[0]
    (x, cache), rest = lax.scan(body, (x, cache), (params, rest, jnp.arange(count)))
    return x, cache, rest
