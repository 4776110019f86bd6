"""The RoBERTa family: BERT's encoder, positions from the padding token on, a head of two layers.

Module names are Hugging Face's; embeddings and layers are BERT's.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.errors import InputError, shown
from loft_jax.models.bert import BertConfig, Embeddings, Encoder, encoder_rows
from loft_jax.models.dropout import dropout, dropped
from loft_jax.models.family import Family, ParameterTable, Remat, SequenceClassifier, linear
from loft_jax.models.parts import Parts
from loft_jax.models.stack import run_layers


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes and constants of a RoBERTa, under the names of Hugging Face's `config.json`.

    The fields are BERT's. The first token of a text is at position `pad_token_id + 1`.

    Example:
        >>> config = RobertaConfig.from_hf(
        ...     dict(model_type="roberta", max_position_embeddings=514, type_vocab_size=1))
        >>> config.max_length
        512
    """

    model_type: ClassVar[str] = "roberta"
    architecture: ClassVar[str] = "RobertaForSequenceClassification"
    others: ClassVar[tuple[str, ...]] = ("RobertaModel", "RobertaForMaskedLM")

    vocab_size: int = 50_265
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.max_position_embeddings - 2
        if type(self.pad_token_id) is not int or not 0 <= self.pad_token_id <= most:
            raise InputError(
                f"config: pad_token_id is {shown(self.pad_token_id)}, expected 0 to {most}: "
                "positions are counted from it, and there are max_position_embeddings"
            )

    @property
    def max_length(self) -> int:
        """Positions after that of padding."""
        return self.max_position_embeddings - self.pad_token_id - 1


class ClassificationHead(nnx.Module):
    """Two layers, over what the encoder says of the first token."""

    def __init__(self, config: RobertaConfig, parts: Parts):
        self.dense = parts.linear(config.hidden_size, config.hidden_size)
        rate = config.classifier_dropout
        self.dropout = dropout(config.hidden_dropout_prob if rate is None else rate, parts.rngs)
        self.out_proj = parts.linear(
            config.hidden_size, len(config.labels), preferred_element_type=jnp.float32
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to logits `(b, labels)`."""
        x = jnp.tanh(self.dense(dropped(self.dropout, x[:, 0])))
        return self.out_proj(dropped(self.dropout, x))


class RobertaForSequenceClassification(SequenceClassifier):
    """A RoBERTa that classifies texts or pairs of texts, or predicts a number.

    Args:
        config: Sizes, constants and labels.
        dtype: What it computes in. Norms, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, and dropout.

    Example:
        >>> config = RobertaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2,
        ...                        num_attention_heads=4, intermediate_size=64)
        >>> RobertaForSequenceClassification(config, rngs=nnx.Rngs(0)).eval()

    Source:
        Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", arXiv 1907.11692.
    """

    architecture = RobertaConfig.architecture
    output_modules = ("classifier",)

    def __init__(
        self,
        config: RobertaConfig,
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
        self.classifier = ClassificationHead(config, parts)

    def classified(self, tokens: jax.Array, real: jax.Array, token_types: jax.Array) -> jax.Array:
        """Gives one logit a label; as `SequenceClassifier.classified`.

        A model with one token type gives it to all tokens.
        """
        visible = real[:, None, :]  # (b, 1, t)
        x = self.embeddings(tokens, _positions(tokens, self.config.pad_token_id), token_types)
        x, _ = run_layers(self.encoder.layer, x, visible, remat=self.remat)
        return self.classifier(x)

    @staticmethod
    def parameter_table(config: RobertaConfig) -> ParameterTable:
        """The parameters of a RoBERTa with a head of its own."""
        head = "classifier"
        return ParameterTable(
            {
                **encoder_rows("roberta"),
                **linear(f"{head}.dense", f"{head}.dense", ("embed", None), optional=True),
                **linear(f"{head}.out_proj", f"{head}.out_proj", ("embed", None), optional=True),
            },
            units={"heads": config.num_attention_heads},
        )


def _positions(tokens: jax.Array, padding: int) -> jax.Array:
    """Positions of `(b, t)` tokens: those of padding at its own number, the others from there on.

    As in Hugging Face's RoBERTa, they are read from the tokens, not from a mask.
    """
    real = (tokens != padding).astype(jnp.int32)
    return padding + jnp.cumsum(real, axis=1) * real


FAMILY = Family(
    model_type=RobertaConfig.model_type,
    config=RobertaConfig,
    models={"sequence-classification": RobertaForSequenceClassification},
    prefix="roberta.",
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    # Numbers of positions, the pooler, which no classifier has, and the head of pretraining.
    ignored=r"roberta\.embeddings\.position_ids|roberta\.pooler\..*|lm_head\..*",
    sizes={
        "roberta-base": RobertaConfig(
            max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
        ),
        "roberta-large": RobertaConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
    },
)
