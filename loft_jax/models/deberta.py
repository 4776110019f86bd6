"""The DeBERTa family, versions 2 and 3: an encoder with disentangled attention, for classification.

Module names are Hugging Face's. `encoder.layer` is one layer whose parameters have a leading axis
of layers; after attention it is BERT's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.tree_util import Partial
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.models import config_checks
from loft_jax.models.activations import embeddings_laid_out, gathered, laid_out
from loft_jax.models.bert import Intermediate, Output
from loft_jax.models.dropout import dropout, dropped
from loft_jax.models.encoder_config import EncoderConfig
from loft_jax.models.family import (
    Family,
    ParameterTable,
    Remat,
    SequenceClassifier,
    Tensor,
    embedding,
    linear,
    norm,
)
from loft_jax.models.nonlinearities import NONLINEARITIES
from loft_jax.models.parts import Parts
from loft_jax.models.stack import run_layers

# Sizes that 0 or -1 leave out.
_OPTIONAL = {
    "type_vocab_size": config_checks.MOST_TOKENS,
    "position_buckets": config_checks.MOST_POSITIONS,
    "max_relative_positions": config_checks.MOST_POSITIONS,
    "conv_kernel_size": config_checks.MOST_HIDDEN,
}

_POSITION_SCORES = ("c2p", "p2c")  # content to position, position to content


@dataclasses.dataclass(frozen=True)
class DebertaV2Config(EncoderConfig):
    """Sizes and constants of a DeBERTa, under the names of Hugging Face's `config.json`.

    `legacy`, which chooses between two heads of pretraining, has no effect on a classifier.

    Example:
        >>> config = DebertaV2Config.from_hf(
        ...     dict(model_type="deberta-v2", relative_attention=True, pos_att_type="p2c|c2p",
        ...          position_buckets=256, position_biased_input=False))
        >>> config.pos_att_type, config.relative_span, config.max_length
        (('c2p', 'p2c'), 256, None)
    """

    model_type: ClassVar[str] = "deberta-v2"
    architecture: ClassVar[str] = "DebertaV2ForSequenceClassification"
    others: ClassVar[tuple[str, ...]] = ("DebertaV2Model", "DebertaV2ForMaskedLM")
    only: ClassVar[Mapping[str, Any]] = {"z_steps": 0, "quantization_config": None}

    vocab_size: int = 128_100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    cls_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    embedding_size: int | None = None
    position_biased_input: bool = True
    relative_attention: bool = False
    pos_att_type: tuple[str, ...] = ()
    position_buckets: int = -1
    max_relative_positions: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1
    pooler_hidden_act: str = "gelu"
    pooler_dropout: float = 0.0
    layer_norm_eps: float = 1e-7
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        super().__post_init__()
        optional = {n: most for n, most in _OPTIONAL.items() if getattr(self, n) not in (0, -1)}
        if self.embedding_size is not None:
            optional["embedding_size"] = config_checks.MOST_HIDDEN
        config_checks.check_values(
            self,
            sizes={
                "vocab_size": config_checks.MOST_TOKENS,
                "intermediate_size": config_checks.MOST_FEATURES,
                "max_position_embeddings": config_checks.MOST_POSITIONS,
                "conv_groups": config_checks.MOST_HIDDEN,
                **optional,
            },
            rates=("pooler_dropout", *([] if self.cls_dropout is None else ["cls_dropout"])),
            flags=("position_biased_input", "relative_attention", "share_att_key"),
        )
        config_checks.check_multiple(self, "hidden_size", "conv_groups")
        for name in ("conv_act", "pooler_hidden_act"):
            config_checks.check_one_of(self, name, NONLINEARITIES)
        config_checks.check_one_of(self, "norm_rel_ebd", ("none", "layer_norm"))
        if unknown := set(self.pos_att_type) - set(_POSITION_SCORES):
            raise InputError(
                f"config: pos_att_type has {', '.join(map(shown, sorted(unknown)))}, expected only "
                f"{', '.join(map(repr, _POSITION_SCORES))}"
            )
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise InputError(
                f"config: conv_kernel_size is {self.conv_kernel_size}, expected an odd number"
            )
        # The formula of the buckets divides by half of them, and by the logarithm of a ratio.
        if self.position_buckets == 1 or (
            self.position_buckets > 1 and self.position_buckets // 2 == self.farthest - 1
        ):
            raise InputError(
                f"config: position_buckets is {self.position_buckets}, which has no buckets for "
                f"distances up to max_relative_positions ({self.farthest})"
            )

    @property
    def max_length(self) -> int | None:
        """The number of positions that have embeddings; None if only relative ones have."""
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def farthest(self) -> int:
        """The distance that the buckets extend to."""
        absolute, relative = self.max_position_embeddings, self.max_relative_positions
        return relative if relative > 0 else absolute

    @property
    def relative_span(self) -> int:
        """Half the number of relative positions that have embeddings."""
        return self.position_buckets if self.position_buckets > 0 else self.farthest

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a Hugging Face `config.json`; see `FamilyConfig.from_hf`."""
        found = super().from_hf(config)
        for name, expected in (
            ("pooler_hidden_size", found.hidden_size),
            ("attention_head_size", found.hidden_size // found.num_attention_heads),
        ):
            if config.get(name, expected) not in (expected, None):
                raise InputError(
                    f"config: {name} is {shown(config[name])}, only {expected} is supported, which "
                    "hidden_size and num_attention_heads give"
                )
        return found

    @classmethod
    def fields_from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the fields that the contents of a `config.json` of the family set."""
        fields = super().fields_from_hf(config)
        if "pos_att_type" in fields:
            fields["pos_att_type"] = _position_scores(fields["pos_att_type"])
        return fields

    def fields_to_hf(self) -> dict[str, Any]:
        """Gives the fields as `config.json` has them."""
        fields = super().fields_to_hf()
        if self.embedding_size is None:  # which transformers would take as a size
            del fields["embedding_size"]
        return fields


def _position_scores(value: Any) -> tuple[str, ...]:
    """Reads `pos_att_type`, a list of names or one string such as "p2c|c2p"."""
    if isinstance(value, str):
        value = [name.strip() for name in value.lower().split("|") if name.strip()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise InputError(f"config: pos_att_type is {shown(value)}, expected a list of names")
    return tuple(sorted(set(value)))


class Relative(NamedTuple):
    """Embeddings of relative positions, for texts of one length.

    Attributes:
        embeddings: `(u, hidden)`, those that distances within the length have.
        rows: `(2t + 1,)` int32, the row of each distance from `-t` to `t`.
    """

    embeddings: jax.Array
    rows: jax.Array


def relative_rows(config: DebertaV2Config, length: int) -> np.ndarray:
    """Gives the row of the table of relative positions that each distance has.

    With buckets, distances up to half their number `m` have a row each, and farther ones share
    rows by their logarithm: `m + ceil(log(d / m) / log((farthest - 1) / m) (m - 1))`.

    Args:
        config: Sizes of the table.
        length: Length of the texts, `t`.

    Returns:
        `(2t + 1,)` int32, for a query `-t` to `t` tokens after the key.

    Example:
        >>> config = DebertaV2Config(position_buckets=4, max_relative_positions=16)
        >>> relative_rows(config, 6)
        array([1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7], dtype=int32)

    Source:
        He et al., "DeBERTaV3", arXiv 2111.09543, and its code.
    """
    distances, span = np.arange(-length, length + 1), config.relative_span
    buckets = distances
    if config.position_buckets > 0:
        # In float32, as in PyTorch: ceil turns on the last bit.
        middle = np.float32(config.position_buckets // 2)
        far = np.maximum(np.abs(distances), middle).astype(np.float32)
        base = np.log(np.float32((config.farthest - 1) / (config.position_buckets // 2)))
        steps = np.ceil(np.log(far / middle) / base * (middle - 1)) + middle
        buckets = np.where(np.abs(distances) <= middle, distances, np.sign(distances) * steps)
    return np.clip(buckets + span, 0, 2 * span - 1).astype(np.int32)


class Embeddings(nnx.Module):
    """The sum of the embeddings that a DeBERTa has, with a norm, a mask and dropout."""

    def __init__(self, config: DebertaV2Config, parts: Parts):
        width = config.embedding_size or config.hidden_size
        positions = config.max_position_embeddings if config.position_biased_input else 0
        types = max(config.type_vocab_size, 0)
        self.word_embeddings = parts.embed(config.vocab_size, width)
        self.position_embeddings = parts.embed(positions, width) if positions else None
        self.token_type_embeddings = parts.embed(types, width) if types else None
        widened = width != config.hidden_size
        self.embed_proj = (
            parts.linear(width, config.hidden_size, use_bias=False) if widened else None
        )
        self.LayerNorm = parts.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.dropout = dropout(config.hidden_dropout_prob, parts.rngs)

    def __call__(self, tokens: jax.Array, token_types: jax.Array, real: jax.Array) -> jax.Array:
        """Looks up two of `(b, t)`, giving `(b, t, hidden)`; 0 where `real (b, t)` is not set."""
        x = embeddings_laid_out(self.word_embeddings(tokens))
        if self.position_embeddings is not None:
            # Rows of padding may be longer than there are positions.
            most = self.position_embeddings.num_embeddings - 1
            positions = jnp.minimum(jnp.arange(tokens.shape[1]), most)
            positions = jnp.broadcast_to(positions, tokens.shape)
            x = x + embeddings_laid_out(self.position_embeddings(positions))
        if self.token_type_embeddings is not None:
            x = x + embeddings_laid_out(self.token_type_embeddings(token_types))
        if self.embed_proj is not None:
            x = laid_out(self.embed_proj(x))
        return dropped(self.dropout, self.LayerNorm(x) * real[..., None])


class DisentangledSelfAttention(nnx.Module):
    """Self-attention whose scores are products of contents and of relative positions.

    With `δ(i, j)` the row of the distance `i - j`, and Q, K the queries and keys of contents (c)
    and of the embeddings of relative positions (r), the score of query i and key j is
    `(Qc_i·Kc_j + Qc_i·Kr_δ(i,j) + Kc_j·Qr_δ(i,j)) / sqrt(3 d)`; without the second term (c2p) or
    the third (p2c), the number under the root is less by d.

    Source:
        He et al., "DeBERTa", arXiv 2006.03654, section 3.1.
    """

    def __init__(self, config: DebertaV2Config, parts: Parts):
        self.heads = config.num_attention_heads
        self.scores = config.pos_att_type
        self.share_att_key = config.share_att_key
        hidden = config.hidden_size
        self.query_proj = parts.linear(hidden, hidden)
        self.key_proj = parts.linear(hidden, hidden)
        self.value_proj = parts.linear(hidden, hidden)
        if config.relative_attention:
            if "c2p" in self.scores and not self.share_att_key:
                self.pos_key_proj = parts.linear(hidden, hidden)
            if "p2c" in self.scores and not self.share_att_key:
                self.pos_query_proj = parts.linear(hidden, hidden)
            self.pos_dropout = dropout(config.hidden_dropout_prob, parts.rngs)
        self.dropout = dropout(config.attention_probs_dropout_prob, parts.rngs)

    def __call__(self, x: jax.Array, visible: jax.Array, relative: Relative | None) -> jax.Array:
        """Mixes `x (b, t, hidden)`; `visible (b, t, t)`."""
        heads = (*x.shape[:2], self.heads, -1)
        queries, keys, values = (
            laid_out(project(x).reshape(heads), features=2)  # (b, t, heads, head_dim)
            for project in (self.query_proj, self.key_proj, self.value_proj)
        )
        scores = jnp.einsum("bihd,bjhd->bhij", queries, keys, preferred_element_type=jnp.float32)
        if relative is not None:
            scores = scores + self.position_scores(queries, keys, relative)
        scale = (queries.shape[-1] * (1 + len(self.scores))) ** -0.5
        scores = jnp.where(visible[:, None], scores * scale, jnp.finfo(jnp.float32).min)
        weights = dropped(self.dropout, jax.nn.softmax(scores, axis=-1).astype(values.dtype))
        mixed = jnp.einsum("bhij,bjhd->bihd", weights, values)
        return laid_out(mixed.reshape(x.shape), features=2)

    def position_scores(
        self, queries: jax.Array, keys: jax.Array, relative: Relative
    ) -> jax.Array | float:
        """Gives the scores of content and position.

        A product with all 2t distances is `(b, heads, t, 2t)`; shifting its rows gives the scores.
        This takes 2 t² d multiplications a head, twice those of the contents. Products with the u
        rows and a gather would take t u d, no less while every distance has its own row, and the
        gradient of the gather would be a scatter of `(b, heads, t, t)` numbers.

        Args:
            queries: `(b, t, heads, head_dim)`.
            keys: `(b, t, heads, head_dim)`.
            relative: Of the length t.

        Returns:
            `(b, heads, t, t)` float32, not scaled.
        """
        embeddings = dropped(self.pos_dropout, relative.embeddings)

        def score(x: jax.Array, project: Any, rows: jax.Array) -> jax.Array:
            # On a mesh with fsdp and tensor, XLA otherwise gives LoRA factors wrong gradients.
            by_row = gathered(project(embeddings)).reshape(-1, *x.shape[2:])  # (u, heads, head_dim)
            products = jnp.einsum(
                "bihd,chd->bhic", x, by_row[rows], preferred_element_type=jnp.float32
            )
            return _shifted(products)

        total: jax.Array | float = 0.0
        if "c2p" in self.scores:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            total = total + score(queries, project, relative.rows[-2::-1])  # of t - 1 to -t
        if "p2c" in self.scores:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            total = total + score(keys, project, relative.rows[1:]).swapaxes(2, 3)
        return total


def _shifted(products: jax.Array) -> jax.Array:
    """Moves column `t - 1 + j - i` of row i of `(b, heads, t, 2t)` to column j of t columns."""
    *outer, length, columns = products.shape
    flat = products.reshape(*outer, -1)[..., length - 1 : -1]
    return flat.reshape(*outer, length, columns - 1)[..., :length]


class Attention(nnx.Module):
    """Self-attention and its output; Hugging Face's name of the former is `self`."""

    def __init__(self, config: DebertaV2Config, parts: Parts):
        self.self = DisentangledSelfAttention(config, parts)
        self.output = Output(config.hidden_size, config, parts)

    def __call__(self, x: jax.Array, visible: jax.Array, relative: Relative | None) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        return self.output(self.self(x, visible, relative), x)


class Layer(nnx.Module):
    """Attention, then the MLP, each added to the residual stream and then normed."""

    def __init__(self, config: DebertaV2Config, parts: Parts) -> None:
        self.attention = Attention(config, parts)
        self.intermediate = Intermediate(config.intermediate_size, config, parts)
        self.output = Output(config.intermediate_size, config, parts)

    def __call__(
        self,
        x: jax.Array,
        visible: jax.Array,
        relative: Relative | None,
        after_first: Partial | None,
        cache: None,
        layer: jax.Array,
    ) -> tuple[jax.Array, None]:
        """Applies layer number `layer` to `x (b, t, hidden)`, and `after_first` after number 0."""
        x = self.attention(x, visible, relative)
        x = self.output(self.intermediate(x), x)
        if after_first is not None:
            x = lax.cond(layer == 0, after_first, lambda x: x, x)
        return x, cache


class Convolution(nnx.Module):
    """A convolution of the embeddings, added to what the first layer gives, and a norm."""

    def __init__(self, config: DebertaV2Config, parts: Parts):
        self.conv = nnx.Conv(
            config.hidden_size,
            config.hidden_size,
            config.conv_kernel_size,
            feature_group_count=config.conv_groups,
            kernel_init=parts.draw,
            **parts.own,
        )
        self.act = NONLINEARITIES[config.conv_act]
        self.LayerNorm = parts.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.dropout = dropout(config.hidden_dropout_prob, parts.rngs)

    def __call__(self, x: jax.Array, real: jax.Array) -> Partial:
        """Gives the function to apply after the first layer, for embeddings `(b, t, hidden)`."""
        convolved = self.act(dropped(self.dropout, laid_out(self.conv(x))))
        return Partial(_with_convolution, self.LayerNorm, convolved, real)


def _with_convolution(
    norm: nnx.LayerNorm, convolved: jax.Array, real: jax.Array, x: jax.Array
) -> jax.Array:
    return laid_out(norm(x + convolved) * real[..., None])


class Encoder(nnx.Module):
    """All layers, stacked, with what they share: relative positions and the convolution."""

    def __init__(self, config: DebertaV2Config, parts: Parts) -> None:
        self.config = config
        self.layer = parts.stack(config.num_hidden_layers, lambda own: Layer(config, own))
        if config.relative_attention:
            self.rel_embeddings = parts.embed(2 * config.relative_span, config.hidden_size)
        if config.norm_rel_ebd == "layer_norm":
            self.LayerNorm = parts.layer_norm(config.hidden_size, config.layer_norm_eps)
        if config.conv_kernel_size > 0:
            self.conv = Convolution(config, parts)

    def __call__(self, x: jax.Array, real: jax.Array, remat: Remat) -> jax.Array:
        """Maps `x (b, t, hidden)` to the same; `real (b, t)` says what is not padding."""
        visible = real[:, :, None] & real[:, None, :]  # (b, t, t)
        relative = self.relative(x.shape[1]) if self.config.relative_attention else None
        after_first = self.conv(x, real) if self.config.conv_kernel_size > 0 else None
        x, _ = run_layers(self.layer, x, visible, relative, after_first, remat=remat)
        return x

    def relative(self, length: int) -> Relative:
        """Gives the embeddings of relative positions within texts of a length."""
        rows = relative_rows(self.config, length)
        used, rows = np.unique(rows, return_inverse=True)
        embeddings = self.rel_embeddings(jnp.asarray(used))  # (u, hidden)
        if self.config.norm_rel_ebd == "layer_norm":
            embeddings = self.LayerNorm(embeddings)
        return Relative(embeddings, jnp.asarray(rows, jnp.int32))


class ContextPooler(nnx.Module):
    """The pooler: a summary of the text, from its first token."""

    def __init__(self, config: DebertaV2Config, parts: Parts):
        self.dropout = dropout(config.pooler_dropout, parts.rngs)
        self.dense = parts.linear(config.hidden_size, config.hidden_size)
        self.act = NONLINEARITIES[config.pooler_hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, hidden)`."""
        return self.act(self.dense(dropped(self.dropout, x[:, 0])))


class DebertaV2ForSequenceClassification(SequenceClassifier):
    """A DeBERTa for classification or regression of texts or pairs of texts.

    Args:
        config: Sizes, constants and labels.
        dtype: What it computes in. Norms, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, and dropout.

    Example:
        >>> config = DebertaV2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2,
        ...                          num_attention_heads=4, intermediate_size=64)
        >>> DebertaV2ForSequenceClassification(config, rngs=nnx.Rngs(0)).eval()

    Source:
        He et al., "DeBERTa", arXiv 2006.03654, and "DeBERTaV3", arXiv 2111.09543.
    """

    architecture = DebertaV2Config.architecture
    output_modules = ("classifier",)

    def __init__(
        self,
        config: DebertaV2Config,
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
        self.embeddings = Embeddings(config, parts)
        self.encoder = Encoder(config, parts)
        self.pooler = ContextPooler(config, parts)
        rate = config.cls_dropout
        self.dropout = dropout(config.hidden_dropout_prob if rate is None else rate, rngs)
        self.classifier = parts.linear(
            config.hidden_size, len(config.labels), preferred_element_type=jnp.float32
        )

    def classified(self, tokens: jax.Array, real: jax.Array, token_types: jax.Array) -> jax.Array:
        """Gives one logit for each label; see `SequenceClassifier.classified`."""
        x = self.encoder(self.embeddings(tokens, token_types, real), real, self.remat)
        pooled = dropped(self.dropout, self.pooler(x))  # (b, hidden)
        return self.classifier(pooled)

    @staticmethod
    def parameter_table(config: DebertaV2Config) -> ParameterTable:
        """Makes the parameter table of a DeBERTa with a head."""
        embeddings, encoder = "deberta.embeddings", "deberta.encoder"
        ours, theirs = "encoder.layer", f"{encoder}.layer.{{}}"
        conv = "encoder.conv.conv"

        def words(name: str, axes: tuple[str | None, str]) -> dict[str, Tensor]:
            return embedding(f"embeddings.{name}", f"{embeddings}.{name}", axes)

        def layer(name: str, axes: tuple[str, str]) -> dict[str, Tensor]:
            return linear(f"{ours}.{name}", f"{theirs}.{name}", axes)

        return ParameterTable(
            {
                **words("word_embeddings", ("vocab", "embed")),
                **words("position_embeddings", (None, "embed")),
                **words("token_type_embeddings", (None, "embed")),
                **linear("embeddings.embed_proj", f"{embeddings}.embed_proj", (None, "embed")),
                **norm("embeddings.LayerNorm", f"{embeddings}.LayerNorm"),
                **layer("attention.self.query_proj", ("embed", "heads")),
                **layer("attention.self.key_proj", ("embed", "heads")),
                **layer("attention.self.value_proj", ("embed", "heads")),
                **layer("attention.self.pos_key_proj", ("embed", "heads")),
                **layer("attention.self.pos_query_proj", ("embed", "heads")),
                **layer("attention.output.dense", ("heads", "embed")),
                **norm(
                    f"{ours}.attention.output.LayerNorm", f"{theirs}.attention.output.LayerNorm"
                ),
                **layer("intermediate.dense", ("embed", "mlp")),
                **layer("output.dense", ("mlp", "embed")),
                **norm(f"{ours}.output.LayerNorm", f"{theirs}.output.LayerNorm"),
                **embedding("encoder.rel_embeddings", f"{encoder}.rel_embeddings", (None, "embed")),
                **norm("encoder.LayerNorm", f"{encoder}.LayerNorm"),
                # A convolution's is (out, in, width) in PyTorch, and (width, in, out) here.
                f"{conv}.kernel": Tensor(
                    f"{encoder}.conv.conv.weight", (None, None, "embed"), transposed=True
                ),
                f"{conv}.bias": Tensor(f"{encoder}.conv.conv.bias", ("embed",)),
                **norm("encoder.conv.LayerNorm", f"{encoder}.conv.LayerNorm"),
                **linear("pooler.dense", "pooler.dense", ("embed", None), optional=True),
                **linear("classifier", "classifier", ("embed", None), optional=True),
            },
            units={"heads": config.num_attention_heads},
        )


_VERSION_3 = DebertaV2Config(
    relative_attention=True,
    pos_att_type=_POSITION_SCORES,
    position_buckets=256,
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    position_biased_input=False,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
)

FAMILY = Family(
    model_type=DebertaV2Config.model_type,
    config=DebertaV2Config,
    models={"sequence-classification": DebertaV2ForSequenceClassification},
    prefix="deberta.",
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    # Numbers of positions, and heads of pretraining.
    ignored=r"deberta\.embeddings\.position_ids"
    r"|(deberta\.)?(cls|lm_predictions|mask_predictions)\..*",
    sizes={
        "deberta-v3-xsmall": dataclasses.replace(
            _VERSION_3, hidden_size=384, num_attention_heads=6, intermediate_size=1536
        ),
        "deberta-v3-small": dataclasses.replace(_VERSION_3, num_hidden_layers=6),
        "deberta-v3-base": _VERSION_3,
        "deberta-v3-large": dataclasses.replace(
            _VERSION_3,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
        ),
    },
)
