"""The Llama family: configuration, model, parameters, and its GGUF files.

Module names are Hugging Face's. `layers` is one decoder layer whose parameters have a leading
axis of layers. Families that differ from it in a few points are subclasses in their own files.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.activations import embeddings_laid_out, laid_out
from loft_jax.models.attention import KVCache, attend, positions_from, visibility
from loft_jax.models.family import (
    Family,
    LanguageModel,
    ParameterTable,
    Remat,
    embedding,
    linear,
    norm,
)
from loft_jax.models.rope import inverse_frequencies, rotate, rotation
from loft_jax.models.rope_config import read_rope, rope_scaling_to_hf
from loft_jax.models.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
)
from loft_jax.models.stack import PerLayer, run_layers, stack_layers

_SIZES: Mapping[str, int] = {
    "vocab_size": config_checks.MOST_TOKENS,
    "hidden_size": config_checks.MOST_HIDDEN,
    "intermediate_size": config_checks.MOST_FEATURES,
    "num_hidden_layers": config_checks.MOST_LAYERS,
    "num_attention_heads": config_checks.MOST_HEADS,
    "num_key_value_heads": config_checks.MOST_HEADS,
    "head_dim": config_checks.MOST_HEAD_DIM,
    "max_position_embeddings": config_checks.MOST_POSITIONS,
}


Norm = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The part of the configuration that Llama and the families made of its modules share.

    Attributes:
        model_type: Hugging Face's name of the family.
        architecture: Name of Hugging Face's class of the model.
        headless: Names of their classes without a head whose checkpoints are read too.
        only: Fields that change the computation, with the one value that is implemented.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    headless: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_checks.check_values(
            self,
            sizes=_SIZES,
            positive=("rms_norm_eps", "rope_theta", "initializer_range"),
            flags=[field.name for field in dataclasses.fields(self) if field.type is bool],
        )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"config: num_key_value_heads is {self.num_key_value_heads}, "
                f"expected a divisor of num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim % 2:
            raise InputError(f"config: head_dim is {self.head_dim}, expected an even number")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.rotary_dim, self.rope_theta)

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return False

    @property
    def output_bias(self) -> bool:
        """Whether the projection from the heads has a bias."""
        return False

    @property
    def mlp_bias(self) -> bool:
        """Whether the projections of the MLP have biases."""
        return False

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head that rotate."""
        return self.head_dim

    @property
    def max_length(self) -> None:
        """None, since positions are computed."""

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`.

        Takes the older keys (`rope_theta`, `rope_scaling`) as well as the newer one
        (`rope_parameters`). Absent fields take the defaults transformers gives them; fields that
        transformers' own model does not read either (a version, a cache switch) have no effect.

        Args:
            config: The parsed JSON.

        Returns:
            The configuration.

        Raises:
            InputError: Another architecture, or a field whose value is not supported.
        """
        config_checks.check_kind(
            config,
            model_type=cls.model_type,
            architectures=[cls.architecture, *cls.headless],
            only=cls.only,
        )
        sizes: dict[str, Any] = {
            name: config_checks.required(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
            )
        }
        heads = sizes["num_attention_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            if sizes["hidden_size"] % heads:
                raise InputError(
                    f"config: hidden_size is {shown(sizes['hidden_size'])}, expected a multiple of "
                    f"num_attention_heads ({heads})"
                )
            head_dim = sizes["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads")
        apart = {"num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "eos_token_id"}
        names = {field.name for field in dataclasses.fields(cls)}
        optional = config_checks.present(config, names - sizes.keys() - apart)
        rope_theta, rope_scaling = read_rope(config)
        return cls(
            **sizes,
            **optional,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            eos_token_id=config_checks.tokens(config.get("eos_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads.

        Rotary settings are written under the older keys, which every release reads.
        """
        fields = dataclasses.asdict(self)
        fields["rope_scaling"] = rope_scaling_to_hf(self.rope_scaling)
        if isinstance(self.eos_token_id, tuple):
            fields["eos_token_id"] = list(self.eos_token_id)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **fields,
        }


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

    @property
    def qkv_bias(self) -> bool:
        """As `attention_bias` says."""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """As `attention_bias` says."""
        return self.attention_bias


class SelfAttention(nnx.Module):
    """Rotary grouped-query self-attention.

    Attributes:
        scale: As for `attend`.
        softcap: As for `attend`.
    """

    scale: float | None = None
    softcap: float | None = None

    def __init__(
        self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.head_dim = config.head_dim
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, width, use_bias=config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_width, use_bias=config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_width, use_bias=config.qkv_bias)
        self.o_proj = linear(width, config.hidden_size, use_bias=config.output_bias)

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

    def __init__(
        self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
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

    def __init__(
        self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(_norm, config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm: Norm = norm()
        self.self_attn = self.attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm: Norm = norm()
        self.mlp = self.feed_forward(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

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
        normal = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=normal,
            rngs=rngs,
        )

        self.layers = stack_layers(
            config.num_hidden_layers,
            lambda rngs: self.layer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
            rngs,
        )
        self.norm: Norm = _norm(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
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
        return visible

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


def _norm(
    config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


class DecoderGGUF:
    """Maps Llama and the families made of its modules to GGUF files; see `GGUFAdapter`.

    Attributes:
        architecture: GGUF's name of the family.
        constants: Names of tensors that belong to the configuration.
        config_class: Class of its configurations.
        in_layer: Hugging Face's names of modules in a layer by those of GGUF.
    """

    architecture: str
    config_class: type[DecoderConfig]
    constants: Collection[str] = ("rope_freqs.weight",)

    _top: Mapping[str, str] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    in_layer: Mapping[str, str] = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }

    def name(self, name: str) -> str:
        """Gives Hugging Face's name of a tensor; a tensor without one keeps its own."""
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, module, parameter = match.groups()
            if module in self.in_layer:
                return f"model.layers.{layer}.{self.in_layer[module]}.{parameter}"
        module, _, parameter = name.rpartition(".")
        return f"{self._top[module]}.{parameter}" if module in self._top else name

    def stored_name(self, name: str) -> str:
        """Gives GGUF's name of a tensor of Hugging Face's name."""
        module, _, parameter = name.rpartition(".")
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            layer, within = match.groups()
            return f"blk.{layer}.{_key_of(within, self.in_layer)}.{parameter}"
        return f"{_key_of(module, self._top)}.{parameter}"

    def stored_rows(self, name: str, rows: np.ndarray, config: Any) -> np.ndarray:
        """Gives the stored positions of rows: here, their own."""
        return rows

    def contents(self, config: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Gives the metadata and the constants of a configuration; see `GGUFAdapter.contents`."""
        own, scaling = self.architecture, config.rope_scaling
        metadata = {
            f"{own}.vocab_size": config.vocab_size,
            f"{own}.context_length": config.max_position_embeddings,
            f"{own}.embedding_length": config.hidden_size,
            f"{own}.block_count": config.num_hidden_layers,
            f"{own}.feed_forward_length": config.intermediate_size,
            f"{own}.attention.head_count": config.num_attention_heads,
            f"{own}.attention.head_count_kv": config.num_key_value_heads,
            f"{own}.attention.key_length": config.head_dim,
            f"{own}.attention.value_length": config.head_dim,
            f"{own}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            f"{own}.rope.dimension_count": config.head_dim,
            f"{own}.rope.freq_base": float(config.rope_theta),
        }
        if isinstance(scaling, LinearScaling):
            metadata[f"{own}.rope.scaling.type"] = "linear"
            metadata[f"{own}.rope.scaling.factor"] = float(scaling.factor)
        if isinstance(scaling, Llama3Scaling):
            plain = np.asarray(inverse_frequencies(config.head_dim, config.rope_theta, None))
            divisors = plain / scaling.scaled(plain, config.rope_theta, None)
            return metadata, {"rope_freqs.weight": divisors.astype(np.float32)}
        if isinstance(scaling, LongRopeScaling):  # as they are read
            return metadata, {"rope_freqs.weight": np.array(scaling.short_factor, np.float32)}
        return metadata, {}

    def config(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, np.ndarray],
    ) -> DecoderConfig:
        """Makes the configuration; see `GGUFAdapter.config`."""
        return self.config_class(**self.fields(metadata, shapes, constants))

    def fields(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, np.ndarray],
    ) -> dict[str, Any]:
        """Gives the fields of the configuration; arguments are those of `config`."""
        own = self.architecture
        for key in (f"{own}.expert_count", f"{own}.attention.sliding_window"):
            if metadata.get(key):
                raise InputError(f"{key} is {shown(metadata[key])}, which is not supported")
        hidden_size = _field(metadata, f"{own}.embedding_length")
        heads = _field(metadata, f"{own}.attention.head_count")
        head_dim = metadata.get(f"{own}.attention.key_length", hidden_size // heads)
        for key in (f"{own}.attention.value_length", f"{own}.rope.dimension_count"):
            if metadata.get(key, head_dim) != head_dim:
                raise InputError(
                    f"{key} is {shown(metadata[key])}, expected the head size, {shown(head_dim)}"
                )
        context = _field(metadata, f"{own}.context_length")
        theta = _shortest(metadata.get(f"{own}.rope.freq_base", 10_000.0))
        if (divisors := constants.get("rope_freqs.weight")) is None:
            scaling = self._rope_scaling(metadata)
        else:
            scaling = self._scaling_by(divisors, metadata, head_dim, theta, context)
        return {
            "vocab_size": shapes.get("model.embed_tokens.weight", (0,))[0],
            "hidden_size": hidden_size,
            "intermediate_size": _field(metadata, f"{own}.feed_forward_length"),
            "num_hidden_layers": _field(metadata, f"{own}.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{own}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": context,
            # float32 in the file: the shortest decimal that is the same float32 was meant
            "rms_norm_eps": _shortest(_field(metadata, f"{own}.attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": "lm_head.weight" not in shapes,
            "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def _scaling_by(
        self,
        divisors: np.ndarray,
        metadata: Mapping[str, Any],
        head_dim: int,
        theta: float,
        context: int,
    ) -> RopeScaling:
        """Gives the scaling of a file with a divisor of each frequency, as those of Llama 3.x."""
        own = self.architecture
        kind = metadata.get(f"{own}.rope.scaling.type", "none")
        if kind != "none":
            raise InputError(
                f"{own}.rope.scaling.type is {shown(kind)} beside the tensor 'rope_freqs.weight', "
                "expected one of them"
            )
        if divisors.shape != (head_dim // 2,) or not all(
            map(config_checks.is_positive, divisors.tolist())
        ):
            raise InputError(
                f"tensor 'rope_freqs.weight' of shape {divisors.shape} is "
                f"{shown(divisors.tolist())}, expected {head_dim // 2} positive numbers"
            )
        # The constants that all published models have.
        llama3 = Llama3Scaling(_shortest(divisors.max()), 1.0, 4.0, 8192)
        plain = np.asarray(inverse_frequencies(head_dim, theta, None))
        if np.allclose(plain / divisors, llama3.scaled(plain, theta, None), rtol=1e-5, atol=0):
            return llama3
        each = tuple(map(_shortest, divisors))
        return LongRopeScaling(each, each, context, context, attention_factor=1.0)

    def _rope_scaling(self, metadata: Mapping[str, Any]) -> RopeScaling | None:
        own = self.architecture
        kind = metadata.get(f"{own}.rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind == "linear":
            return LinearScaling(_shortest(_field(metadata, f"{own}.rope.scaling.factor")))
        raise InputError(
            f"{own}.rope.scaling.type is {shown(kind)}, only 'none' and 'linear' are supported"
        )


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


def _key_of(value: str, names: Mapping[str, str]) -> str:
    return next(key for key, name in names.items() if name == value)


def _field(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise InputError(f"field {key!r} is missing")
    return metadata[key]


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))


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
