"""The BERT family: a post-norm encoder with token types and a pooler, for sequence classification.

Module names are Hugging Face's. `encoder.layer` is one layer whose parameters have a leading axis
of layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.models import config_checks
from loft_jax.models.activations import embeddings_laid_out, laid_out
from loft_jax.models.attention import attend
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


@dataclasses.dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Sizes and constants of a BERT, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = BertConfig.from_hf(
        ...     dict(model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...          intermediate_size=64, id2label={"0": "negative", "1": "positive"}))
        >>> config.labels
        ('negative', 'positive')
    """

    model_type: ClassVar[str] = "bert"
    architecture: ClassVar[str] = "BertForSequenceClassification"
    others: ClassVar[tuple[str, ...]] = (
        "BertModel",
        "BertForMaskedLM",
        "BertForPreTraining",
        "BertForNextSentencePrediction",
    )
    only: ClassVar[Mapping[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "quantization_config": None,
    }

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = 0
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_values(
            self,
            sizes={
                "vocab_size": config_checks.MOST_TOKENS,
                "intermediate_size": config_checks.MOST_FEATURES,
                "max_position_embeddings": config_checks.MOST_POSITIONS,
                "type_vocab_size": config_checks.MOST_TOKENS,
            },
            rates=() if self.classifier_dropout is None else ("classifier_dropout",),
        )

    @property
    def max_length(self) -> int:
        """The number of positions that have embeddings."""
        return self.max_position_embeddings


class Embeddings(nnx.Module):
    """The sum of the embeddings of tokens, positions and token types, with a norm and dropout."""

    def __init__(self, config: BertConfig, parts: Parts):
        self.word_embeddings = parts.embed(config.vocab_size, config.hidden_size)
        self.position_embeddings = parts.embed(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = parts.embed(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = parts.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.dropout = dropout(config.hidden_dropout_prob, parts.rngs)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, token_types: jax.Array
    ) -> jax.Array:
        """Looks up three of `(b, t)`, giving `(b, t, hidden)`."""
        x = embeddings_laid_out(self.word_embeddings(tokens))
        x = x + embeddings_laid_out(self.token_type_embeddings(token_types))
        x = x + embeddings_laid_out(self.position_embeddings(positions))
        return dropped(self.dropout, self.LayerNorm(x))


class SelfAttention(nnx.Module):
    """Self-attention over all tokens but padding."""

    def __init__(self, config: BertConfig, parts: Parts):
        self.heads = config.num_attention_heads
        self.query = parts.linear(config.hidden_size, config.hidden_size)
        self.key = parts.linear(config.hidden_size, config.hidden_size)
        self.value = parts.linear(config.hidden_size, config.hidden_size)
        self.dropout = dropout(config.attention_probs_dropout_prob, parts.rngs)

    def __call__(self, x: jax.Array, visible: jax.Array) -> jax.Array:
        """Mixes `x (b, t, hidden)`; `visible (b, 1, t)`."""
        heads = (*x.shape[:2], self.heads, -1)
        queries, keys, values = (
            laid_out(project(x).reshape(heads), features=2)  # (b, t, heads, head_dim)
            for project in (self.query, self.key, self.value)
        )
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # (b, heads, t, head_dim)
        mixed = attend(queries, keys, values, visible, self.dropout)
        return laid_out(mixed.reshape(x.shape), features=2)


class Output(nnx.Module):
    """A linear layer with dropout, added to the residual stream, and a norm."""

    def __init__(self, width: int, config: EncoderConfig, parts: Parts):
        self.dense = parts.linear(width, config.hidden_size)
        self.LayerNorm = parts.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.dropout = dropout(config.hidden_dropout_prob, parts.rngs)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """Maps `(b, t, width)` beside `(b, t, hidden)` to `(b, t, hidden)`."""
        return laid_out(self.LayerNorm(dropped(self.dropout, self.dense(x)) + residual))


class Attention(nnx.Module):
    """Self-attention and its output; Hugging Face's name of the former is `self`."""

    def __init__(self, config: BertConfig, parts: Parts):
        self.self = SelfAttention(config, parts)
        self.output = Output(config.hidden_size, config, parts)

    def __call__(self, x: jax.Array, visible: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        return self.output(self.self(x, visible), x)


class Intermediate(nnx.Module):
    """The first layer of the MLP."""

    def __init__(self, width: int, config: EncoderConfig, parts: Parts):
        self.act = NONLINEARITIES[config.hidden_act]
        self.dense = parts.linear(config.hidden_size, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, intermediate)`."""
        return self.act(laid_out(self.dense(x), features=2))


class Layer(nnx.Module):
    """Attention, then the MLP, each added to the residual stream and then normed."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        self.attention = Attention(config, parts)
        self.intermediate = Intermediate(config.intermediate_size, config, parts)
        self.output = Output(config.intermediate_size, config, parts)

    def __call__(
        self, x: jax.Array, visible: jax.Array, cache: None, layer: jax.Array
    ) -> tuple[jax.Array, None]:
        """Applies layer number `layer` to `x (b, t, hidden)`."""
        x = self.attention(x, visible)
        return self.output(self.intermediate(x), x), cache


class Encoder(nnx.Module):
    """All layers, stacked."""

    def __init__(self, config: BertConfig, parts: Parts) -> None:
        self.layer = parts.stack(config.num_hidden_layers, lambda own: Layer(config, own))


class Pooler(nnx.Module):
    """The pooler: a summary of the text, from its first token."""

    def __init__(self, config: BertConfig, parts: Parts):
        self.dense = parts.linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, hidden)`."""
        return jnp.tanh(self.dense(x[:, 0]))


class BertForSequenceClassification(SequenceClassifier):
    """A BERT for classification or regression of texts or pairs of texts.

    Args:
        config: Sizes, constants and labels.
        dtype: What it computes in. Norms, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, and dropout.

    Example:
        >>> config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
        ...                     num_attention_heads=4, intermediate_size=64)
        >>> BertForSequenceClassification(config, rngs=nnx.Rngs(0)).eval()

    Source:
        Devlin et al., "BERT", arXiv 1810.04805.
    """

    architecture = BertConfig.architecture
    output_modules = ("classifier",)

    def __init__(
        self,
        config: BertConfig,
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
        self.pooler = Pooler(config, parts)
        rate = config.classifier_dropout
        self.dropout = dropout(config.hidden_dropout_prob if rate is None else rate, rngs)
        self.classifier = parts.linear(
            config.hidden_size, len(config.labels), preferred_element_type=jnp.float32
        )

    def classified(self, tokens: jax.Array, real: jax.Array, token_types: jax.Array) -> jax.Array:
        """Gives one logit for each label; see `SequenceClassifier.classified`."""
        visible = real[:, None, :]  # (b, 1, t)
        # Rows of padding may be longer than there are positions.
        most = self.config.max_position_embeddings - 1
        positions = jnp.broadcast_to(jnp.minimum(jnp.arange(tokens.shape[1]), most), tokens.shape)
        x = self.embeddings(tokens, positions, token_types)
        x, _ = run_layers(self.encoder.layer, x, visible, remat=self.remat)
        pooled = dropped(self.dropout, self.pooler(x))  # (b, hidden)
        return self.classifier(pooled)

    @staticmethod
    def parameter_table(config: BertConfig) -> ParameterTable:
        """Makes the parameter table of a BERT with a head."""
        return ParameterTable(
            {
                **encoder_rows("bert"),
                **linear("pooler.dense", "bert.pooler.dense", ("embed", None), optional=True),
                **linear("classifier", "classifier", ("embed", None), optional=True),
            },
            units={"heads": config.num_attention_heads},
        )


def encoder_rows(prefix: str) -> dict[str, Tensor]:
    """The rows of a table for embeddings and layers.

    Args:
        prefix: What Hugging Face calls the model without its head.

    Returns:
        Rows by path of ours, as for `ParameterTable`.
    """
    ours, theirs = "encoder.layer", f"{prefix}.encoder.layer.{{}}"

    def words(name: str, axes: tuple[str | None, str]) -> dict[str, Tensor]:
        return embedding(f"embeddings.{name}", f"{prefix}.embeddings.{name}", axes)

    def layer(name: str, axes: tuple[str, str]) -> dict[str, Tensor]:
        return linear(f"{ours}.{name}", f"{theirs}.{name}", axes)

    return {
        **words("word_embeddings", ("vocab", "embed")),
        **words("position_embeddings", (None, "embed")),
        **words("token_type_embeddings", (None, "embed")),
        **norm("embeddings.LayerNorm", f"{prefix}.embeddings.LayerNorm"),
        **layer("attention.self.query", ("embed", "heads")),
        **layer("attention.self.key", ("embed", "heads")),
        **layer("attention.self.value", ("embed", "heads")),
        **layer("attention.output.dense", ("heads", "embed")),
        **norm(f"{ours}.attention.output.LayerNorm", f"{theirs}.attention.output.LayerNorm"),
        **layer("intermediate.dense", ("embed", "mlp")),
        **layer("output.dense", ("mlp", "embed")),
        **norm(f"{ours}.output.LayerNorm", f"{theirs}.output.LayerNorm"),
    }


FAMILY = Family(
    model_type=BertConfig.model_type,
    config=BertConfig,
    models={"sequence-classification": BertForSequenceClassification},
    prefix="bert.",
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    # Numbers of positions, and heads of pretraining.
    ignored=r"bert\.embeddings\.position_ids|(bert\.)?cls\..*",
    sizes={
        "bert-base-uncased": BertConfig(),
        "bert-large-uncased": BertConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
    },
)
