"""The GPT-2 family: learned positions, pre-norm blocks, one projection for queries, keys, values.

Module names are Hugging Face's. `h` is one block whose parameters have a leading axis of blocks.
Hugging Face stores these linear layers as `(in, out)`, as ours are (its Conv1D). `c_attn` stays
one layer, as PEFT adapts it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.models import config_checks
from loft_jax.models.activations import embeddings_laid_out, laid_out
from loft_jax.models.attention import KVCache, attend, positions_from, visibility
from loft_jax.models.dropout import dropout, dropped
from loft_jax.models.family import (
    Family,
    LanguageModel,
    ParameterTable,
    Remat,
    check_positions,
    embedding,
    linear,
    norm,
)
from loft_jax.models.family_config import FamilyConfig
from loft_jax.models.nonlinearities import NONLINEARITIES
from loft_jax.models.parts import Parts
from loft_jax.models.stack import run_layers

# Fields under the names that other families give them, which transformers reads before these.
_ALIASES: Mapping[str, str] = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}


@dataclasses.dataclass(frozen=True)
class GPT2Config(FamilyConfig):
    """Sizes and constants of a GPT-2, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = GPT2Config.from_hf(dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4))
        >>> config.n_inner, config.n_positions
        (128, 1024)
    """

    model_type: ClassVar[str] = "gpt2"
    architecture: ClassVar[str] = "GPT2LMHeadModel"
    others: ClassVar[tuple[str, ...]] = ("GPT2Model",)
    only: ClassVar[Mapping[str, Any]] = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "is_causal": True,
        "quantization_config": None,
    }

    vocab_size: int = 50_257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = 50_256
    eos_token_id: int | tuple[int, ...] | None = 50_256
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_checks.check_values(
            self,
            sizes={
                "vocab_size": config_checks.MOST_TOKENS,
                "n_positions": config_checks.MOST_POSITIONS,
                "n_embd": config_checks.MOST_HIDDEN,
                "n_layer": config_checks.MOST_LAYERS,
                "n_head": config_checks.MOST_HEADS,
                "n_inner": config_checks.MOST_FEATURES,
            },
            positive=("layer_norm_epsilon", "initializer_range"),
            rates=("embd_pdrop", "attn_pdrop", "resid_pdrop"),
            flags=("tie_word_embeddings",),
        )
        config_checks.check_multiple(self, "n_embd", "n_head")
        config_checks.check_one_of(self, "activation_function", NONLINEARITIES)

    @property
    def max_length(self) -> int:
        """The number of positions that have embeddings."""
        return self.n_positions

    @classmethod
    def fields_from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the fields that the contents of a `config.json` of the family set."""
        config = {**config, **{_ALIASES[key]: config[key] for key in _ALIASES if key in config}}
        fields = super().fields_from_hf(config)
        width = fields.get("n_embd", cls.n_embd)
        if "n_inner" not in fields and isinstance(width, int):
            fields["n_inner"] = 4 * width
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in config:  # null is no such token
                fields[name] = config_checks.tokens(config[name])
        return fields


class Attention(nnx.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, config: GPT2Config, parts: Parts):
        self.heads = config.n_head
        self.c_attn = parts.linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = parts.linear(config.n_embd, config.n_embd)
        self.attn_dropout = dropout(config.attn_pdrop, parts.rngs)
        self.resid_dropout = dropout(config.resid_pdrop, parts.rngs)

    def __call__(
        self, x: jax.Array, visible: jax.Array, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """Mixes `x (b, t, hidden)` over the visible tokens; writes the cache if there is one."""
        heads = (*x.shape[:2], self.heads, -1)
        queries, keys, values = (
            laid_out(part.reshape(heads), features=2)  # (b, t, heads, head_dim)
            for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # (b, heads, t, head_dim)
        if cache is not None:
            cache, keys, values = cache.written(layer, keys, values)
        mixed = attend(queries, keys, values, visible, self.attn_dropout)
        mixed = laid_out(mixed.reshape(x.shape), features=2)
        return laid_out(dropped(self.resid_dropout, self.c_proj(mixed))), cache


class MLP(nnx.Module):
    """`c_proj(act(c_fc(x)))`."""

    def __init__(self, config: GPT2Config, parts: Parts):
        self.act = NONLINEARITIES[config.activation_function]
        self.c_fc = parts.linear(config.n_embd, config.n_inner)
        self.c_proj = parts.linear(config.n_inner, config.n_embd)
        self.dropout = dropout(config.resid_pdrop, parts.rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        inner = self.act(laid_out(self.c_fc(x), features=2))
        return laid_out(dropped(self.dropout, self.c_proj(inner)))


class Block(nnx.Module):
    """Attention, then the MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: GPT2Config, parts: Parts) -> None:
        self.ln_1 = parts.layer_norm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, parts)
        self.ln_2 = parts.layer_norm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config, parts)

    def __call__(
        self, x: jax.Array, visible: jax.Array, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies block number `layer` to `x (b, t, hidden)`."""
        mixed, cache = self.attn(self.ln_1(x), visible, cache, layer)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), cache


class GPT2(LanguageModel):
    """A decoder-only language model of the GPT-2 family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, and dropout.

    Example:
        >>> config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4,
        ...                     n_inner=64)
        >>> GPT2(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """

    architecture = GPT2Config.architecture

    def __init__(
        self,
        config: GPT2Config,
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
        self.wte = parts.embed(config.vocab_size, config.n_embd)
        self.wpe = parts.embed(config.n_positions, config.n_embd)
        self.drop = dropout(config.embd_pdrop, parts.rngs)
        self.h = parts.stack(config.n_layer, lambda own: Block(config, own))
        self.ln_f = parts.layer_norm(config.n_embd, config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = parts.linear(
                config.n_embd,
                config.vocab_size,
                use_bias=False,
                preferred_element_type=jnp.float32,
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
            if cache is None and segment_ids is None and branch_ids is None:
                check_positions(length, self.config.max_length)
            positions = positions_from(visible)
        positions = jnp.broadcast_to(positions, (batch, length))
        x = embeddings_laid_out(self.wte(tokens)) + embeddings_laid_out(self.wpe(positions))
        x = dropped(self.drop, x)  # (b, t, hidden)
        x, cache = run_layers(self.h, x, visible, cache=cache, remat=self.remat)
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return self.ln_f(x), cache

    def init_cache(self, batch: int, length: int) -> KVCache:
        """Makes an empty cache for `batch` rows of at most `length` tokens."""
        return KVCache.empty(
            layers=self.config.n_layer,
            batch=batch,
            length=length,
            kv_heads=self.config.n_head,
            head_dim=self.config.n_embd // self.config.n_head,
            dtype=self.dtype,
        )

    @staticmethod
    def parameter_table(config: GPT2Config) -> ParameterTable:
        """Makes the parameter table of a GPT-2."""
        h = "transformer.h.{}"
        tied = "lm_head.weight" if config.tie_word_embeddings else ""
        conv1d = functools.partial(linear, transposed=False)
        return ParameterTable(
            {
                **embedding("wte", "transformer.wte", ("vocab", "embed"), tied=tied),
                **embedding("wpe", "transformer.wpe", (None, "embed")),
                **norm("h.ln_1", f"{h}.ln_1"),
                # Queries, keys and values of all heads side by side: no even parts are whole heads.
                **conv1d("h.attn.c_attn", f"{h}.attn.c_attn", ("embed", None)),
                **conv1d("h.attn.c_proj", f"{h}.attn.c_proj", ("heads", "embed")),
                **norm("h.ln_2", f"{h}.ln_2"),
                **conv1d("h.mlp.c_fc", f"{h}.mlp.c_fc", ("embed", "mlp")),
                **conv1d("h.mlp.c_proj", f"{h}.mlp.c_proj", ("mlp", "embed")),
                **norm("ln_f", "transformer.ln_f"),
                **linear("lm_head", "lm_head", ("embed", "vocab")),
            },
            units={"heads": config.n_head},
        )


FAMILY = Family(
    model_type=GPT2Config.model_type,
    config=GPT2Config,
    models={"causal-lm": GPT2},
    prefix="transformer.",
    # Masks, which older checkpoints carry.
    ignored=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    sizes={
        "gpt2": GPT2Config(),
        "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16, n_inner=4096),
        "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20, n_inner=5120),
        "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25, n_inner=6400),
    },
)
