"""The Gemma 2 family: soft caps, norms before and after, and windows in every other layer.

Module names are Hugging Face's. `layers` is one decoder layer whose parameters have a leading
axis of layers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.activations import embeddings_laid_out, laid_out
from loft_jax.models.attention import (
    KVCache,
    attend,
    positions_from,
    softcapped,
    visibility,
    windowed,
)
from loft_jax.models.family import (
    Family,
    LanguageModel,
    ParameterTable,
    Remat,
    embedding,
    linear,
    norm,
)
from loft_jax.models.rope import RopeScaling, inverse_frequencies, read_rope, rotate, rotation
from loft_jax.models.stack import PerLayer, run_layers, stack_layers

# Fields that change what a Gemma computes, with the one value that is implemented.
ONLY: Mapping[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Sizes and constants of a Gemma 2, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = Gemma2Config.from_hf(dict(model_type="gemma2", num_hidden_layers=2))
        >>> config.layer_types, config.sliding_window
        (('sliding_attention', 'full_attention'), 4096)
    """

    num_hidden_layers: int
    layer_types: tuple[str, ...]
    vocab_size: int = 256_000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0

    model_type: ClassVar[str] = "gemma2"
    architecture: ClassVar[str] = "Gemma2ForCausalLM"
    headless: ClassVar[str] = "Gemma2Model"
    only: ClassVar[Mapping[str, Any]] = ONLY

    def __post_init__(self) -> None:
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        config_checks.check_values(
            self,
            sizes={
                "vocab_size": config_checks.MOST_TOKENS,
                "hidden_size": config_checks.MOST_HIDDEN,
                "intermediate_size": config_checks.MOST_FEATURES,
                "num_hidden_layers": config_checks.MOST_LAYERS,
                "num_attention_heads": config_checks.MOST_HEADS,
                "num_key_value_heads": config_checks.MOST_HEADS,
                "head_dim": config_checks.MOST_HEAD_DIM,
                "max_position_embeddings": config_checks.MOST_POSITIONS,
                "sliding_window": config_checks.MOST_POSITIONS,
            },
            positive=(
                *("rms_norm_eps", "query_pre_attn_scalar", "rope_theta", "initializer_range"),
                *(name for name in caps if getattr(self, name) is not None),
            ),
            flags=("tie_word_embeddings", "attention_bias"),
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_key_value_heads is {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, expected an even number")
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"config: layer_types has {len(self.layer_types)} entries, expected "
                f"num_hidden_layers ({self.num_hidden_layers})"
            )
        for kind in self.layer_types:
            if kind not in LAYER_TYPES:
                raise InputError(
                    f"config: layer_types has {shown(kind)}, expected "
                    f"{' or '.join(map(repr, LAYER_TYPES))}"
                )

    @property
    def max_length(self) -> None:
        """None, since positions are computed."""

    @property
    def kinds(self) -> list[int]:
        """For each layer, 1 if its attention has a window, else 0."""
        return [LAYER_TYPES.index(kind) for kind in self.layer_types]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`.

        Absent fields take the defaults transformers gives them; a soft cap of null is none.

        Args:
            config: The parsed JSON.

        Returns:
            The configuration.

        Raises:
            InputError: Another architecture, or a field whose value is not supported.
        """
        rope_theta, rope_scaling = read_rope(config)
        return cls(
            **cls._fields(config, period=2), rope_theta=rope_theta, rope_scaling=rope_scaling
        )

    @classmethod
    def _fields(cls, config: Mapping[str, Any], *, period: int) -> dict[str, Any]:
        """Reads all but the rotary settings; by default each `period`-th layer has no window."""
        config_checks.check_kind(
            config,
            model_type=cls.model_type,
            architectures=[cls.architecture, cls.headless],
            only=cls.only,
        )
        layers = config_checks.required(config, "num_hidden_layers")
        kinds = config.get("layer_types")
        if kinds is None:
            kinds = [
                LAYER_TYPES[number % period != 0]
                for number in range(1, 1 + min(layers, config_checks.MOST_LAYERS))
            ]
        elif not isinstance(kinds, (list, tuple)):
            raise InputError(f"config: layer_types is {shown(kinds)}, expected a list")
        names = [f.name for f in dataclasses.fields(cls) if not f.name.startswith("rope_")]
        fields = {**config_checks.present(config, names), "layer_types": tuple(kinds)}
        # null has a meaning of its own: no cap, no such token
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if name in config:
                fields[name] = config[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if name in config:
                fields[name] = config_checks.tokens(config[name])
        return fields

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads.

        Rotary settings are written under the older keys, which every release reads.
        """
        fields = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            fields["rope_scaling"] = {
                name: value for name, value in fields["rope_scaling"].items() if value is not None
            }
        fields["layer_types"] = list(self.layer_types)
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_activation": "gelu_pytorch_tanh",
            **fields,
        }


class RMSNorm(nnx.Module):
    """`x / rms(x) * (1 + scale)`, rounded once, at the end."""

    def __init__(self, features: int, *, epsilon: float, param_dtype: DTypeLike) -> None:
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(features, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., features)` to `(..., features)` in the dtype of x."""
        wide = x.astype(jnp.float32)
        square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(square + self.epsilon)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Rotary grouped-query self-attention with a scale and a soft cap of its own."""

    def __init__(
        self, config: Gemma2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.head_dim = config.head_dim
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
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

    def projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Gives queries, keys and values before the rotation, `(b, t, heads, head_dim)` each."""
        heads = (*x.shape[:2], -1, self.head_dim)
        queries, keys, values = (
            laid_out(project(x).reshape(heads), features=2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return queries, keys, values

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
        queries, keys, values = self.projected(x)
        queries = rotate(queries, cos, sin)
        keys = rotate(keys, cos, sin).swapaxes(1, 2)  # (b, kv_heads, t, head_dim)
        values = values.swapaxes(1, 2)
        if cache is not None:
            cache, keys, values = cache.written(layer, keys, values)
        mixed = attend(queries, keys, values, visible, scale=self.scale, softcap=self.softcap)
        mixed = laid_out(mixed.reshape(*x.shape[:2], -1), features=2)
        return laid_out(self.o_proj(mixed)), cache


class MLP(nnx.Module):
    """GeGLU: `down(gelu(gate(x)) * up(x))`, with the tanh approximation of GELU."""

    def __init__(
        self, config: Gemma2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = functools.partial(
            nnx.Linear,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        gate, up = (laid_out(f(x), features=2) for f in (self.gate_proj, self.up_proj))
        return laid_out(self.down_proj(nnx.gelu(gate, approximate=True) * up))


class DecoderLayer(nnx.Module):
    """Attention, then the MLP, each between two norms and added to the residual stream."""

    attention: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(
        self, config: Gemma2Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(_norm, config, param_dtype=param_dtype)
        self.input_layernorm = norm()
        self.self_attn = self.attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_feedforward_layernorm = norm()

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
        x = x + self.post_attention_layernorm(mixed)
        inner = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(inner), cache


class Gemma2(LanguageModel):
    """A decoder-only language model of the Gemma 2 family.

    Args:
        config: Sizes and constants.
        dtype: What it computes in. Norms, rotations, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, drawn as Hugging Face draws them.

    Example:
        >>> config = Gemma2Config.from_hf(
        ...     dict(model_type="gemma2", vocab_size=64, hidden_size=32, intermediate_size=48,
        ...          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        ... )
        >>> Gemma2(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 64)

    Source:
        Gemma Team, https://arxiv.org/abs/2408.00118, section 2.
    """

    architecture = Gemma2Config.architecture
    decoder_layer: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(
        self,
        config: Gemma2Config,
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
        kept: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.embed_tokens = nnx.Embed(
            config.vocab_size, config.hidden_size, embedding_init=normal, rngs=rngs, **kept
        )
        self.layers = stack_layers(
            config.num_hidden_layers,
            lambda rngs: self.decoder_layer(config, rngs=rngs, **kept),
            rngs,
        )
        self.norm = _norm(config, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                preferred_element_type=jnp.float32,
                kernel_init=normal,
                rngs=rngs,
                **kept,
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
        config = self.config
        masks = PerLayer.of(config.kinds, visible, windowed(visible, config.sliding_window))
        # Rounded to the compute dtype before the product, as the model was trained.
        scale = jnp.sqrt(jnp.float32(config.hidden_size)).astype(self.dtype)
        x = embeddings_laid_out(self.embed_tokens(tokens)) * scale  # (b, t, hidden)
        x, cache = run_layers(
            self.layers, x, *self.rotations(positions), masks, cache=cache, remat=self.remat
        )
        if cache is not None:
            cache = dataclasses.replace(cache, length=cache.length + length)
        return self.norm(x), cache

    def rotations(self, positions: jax.Array) -> tuple[Any, Any]:
        """Gives the cosines and sines of positions `(b, t)`, as `run_layers` takes them."""
        config = self.config
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return rotation(frequencies, positions)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Applies the head, and the soft cap of its logits; see `LanguageModel.logits`."""
        return softcapped(super().logits(hidden), self.config.final_logit_softcapping)

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
    def parameter_table(config: Gemma2Config) -> ParameterTable:
        """Makes the parameter table of a Gemma 2."""
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
                **norm("layers.pre_feedforward_layernorm", f"{layer}.pre_feedforward_layernorm"),
                **linear("layers.mlp.gate_proj", f"{mlp}.gate_proj", ("embed", "mlp")),
                **linear("layers.mlp.up_proj", f"{mlp}.up_proj", ("embed", "mlp")),
                **linear("layers.mlp.down_proj", f"{mlp}.down_proj", ("mlp", "embed")),
                **norm("layers.post_feedforward_layernorm", f"{layer}.post_feedforward_layernorm"),
                **norm("norm", "model.norm"),
                **linear("lm_head", "lm_head", ("embed", "vocab")),
            },
            units={"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads},
        )


def _norm(config: Gemma2Config, *, param_dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype)


def _published(layers: int, **sizes: int) -> Gemma2Config:
    return Gemma2Config.from_hf({"model_type": "gemma2", "num_hidden_layers": layers, **sizes})


FAMILY = Family(
    model_type="gemma2",
    config=Gemma2Config,
    models={"causal-lm": Gemma2},
    prefix="model.",
    # As in the config.json that was published with each.
    sizes={
        "gemma-2-2b": _published(26),
        "gemma-2-9b": _published(
            42,
            hidden_size=3584,
            intermediate_size=14_336,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
        "gemma-2-27b": _published(
            46,
            hidden_size=4608,
            intermediate_size=36_864,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=144,
        ),
    },
)
