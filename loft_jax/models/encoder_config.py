"""What the configurations of encoders of texts and of images have in common."""

from collections.abc import Mapping
from typing import Any

from loft_jax.models import config_checks
from loft_jax.models.family_config import FamilyConfig
from loft_jax.models.nonlinearities import NONLINEARITIES


class EncoderConfig(FamilyConfig):
    """The common part of the configurations of encoders.

    It is no dataclass, so that each family has these fields in an order of its own. `labels` are
    the names in `id2label`; a single one is the number that a regression gives.
    """

    hidden_size: int
    hidden_act: str
    hidden_dropout_prob: float
    layer_norm_eps: float
    initializer_range: float
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        config_checks.check_values(
            self,
            sizes={
                "hidden_size": config_checks.MOST_HIDDEN,
                "num_hidden_layers": config_checks.MOST_LAYERS,
                "num_attention_heads": config_checks.MOST_HEADS,
            },
            positive=("layer_norm_eps", "initializer_range"),
            rates=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        )
        config_checks.check_multiple(self, "hidden_size", "num_attention_heads")
        config_checks.check_one_of(self, "hidden_act", NONLINEARITIES)

    @classmethod
    def fields_from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the fields that the contents of a `config.json` of the family set."""
        return {**super().fields_from_hf(config), "labels": config_checks.labels(config)}

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""
        fields = super().to_hf()
        labels = fields.pop("labels")
        return {**fields, **config_checks.labels_to_hf(labels)}
