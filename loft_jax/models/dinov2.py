"""The DINOv2 family: a ViT with scales on its branches, for classification of images of any size.

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
from loft_jax.models.activations import laid_out
from loft_jax.models.family import (
    Family,
    ImageClassifier,
    ParameterTable,
    Remat,
    Tensor,
    linear,
    norm,
)
from loft_jax.models.stack import run_layers
from loft_jax.models.vit import (
    MLP,
    RENAMED,
    Attention,
    Embeddings,
    ImageEncoderConfig,
    ImageParts,
    attention_rows,
    embedding_rows,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config(ImageEncoderConfig):
    """Sizes and constants of a DINOv2, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = Dinov2Config.from_hf(
        ...     dict(model_type="dinov2", hidden_size=32, num_hidden_layers=2,
        ...          num_attention_heads=4, id2label={"0": "cat", "1": "dog"}))
        >>> config.intermediate_size, config.labels
        (128, ('cat', 'dog'))
    """

    model_type: ClassVar[str] = "dinov2"
    architecture: ClassVar[str] = "Dinov2ForImageClassification"
    others: ClassVar[tuple[str, ...]] = ("Dinov2Model", "Dinov2Backbone")
    only: ClassVar[Mapping[str, Any]] = {
        **ImageEncoderConfig.only,
        "drop_path_rate": 0,
        "num_register_tokens": 0,
    }

    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6
    patch_size: int = 14
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_values(
            self,
            sizes={"mlp_ratio": config_checks.MOST_FEATURES},
            positive=("layerscale_value",),
            flags=("use_swiglu_ffn",),
        )

    @property
    def intermediate_size(self) -> int:
        """The number of inner features of the MLP; of a gated one two thirds, in steps of 8."""
        width = self.hidden_size * self.mlp_ratio
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    def to_hf(self) -> dict[str, Any]:
        """Gives the contents of a `config.json` that transformers loads."""
        return {**super().to_hf(), "use_mask_token": False}  # which only pretraining uses


class LayerScale(nnx.Module):
    """A factor for each feature of a branch."""

    def __init__(self, config: Dinov2Config, parts: ImageParts) -> None:
        self.dtype = jnp.dtype(parts.dtype)
        self.lambda1 = nnx.Param(
            jnp.full(config.hidden_size, config.layerscale_value, parts.param_dtype)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Scales `(b, t, hidden)`."""
        return x * self.lambda1[...].astype(self.dtype)


class GatedMLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, with biases."""

    def __init__(self, config: Dinov2Config, parts: ImageParts) -> None:
        self.gate_proj = parts.linear(config.hidden_size, config.intermediate_size)
        self.up_proj = parts.linear(config.hidden_size, config.intermediate_size)
        self.down_proj = parts.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        gate, up = (laid_out(f(x), features=2) for f in (self.gate_proj, self.up_proj))
        return self.down_proj(jax.nn.silu(gate) * up)


class Layer(nnx.Module):
    """Attention and the MLP, each on normed input, scaled, and added to the residual stream."""

    def __init__(self, config: Dinov2Config, parts: ImageParts) -> None:
        self.norm1 = parts.norm()
        self.attention = Attention(parts)
        self.layer_scale1 = LayerScale(config, parts)
        self.norm2 = parts.norm()
        self.mlp: GatedMLP | MLP
        if config.use_swiglu_ffn:
            self.mlp = GatedMLP(config, parts)
        else:
            self.mlp = MLP(parts, config.intermediate_size)
        self.layer_scale2 = LayerScale(config, parts)

    def __call__(self, x: jax.Array, cache: None, layer: jax.Array) -> tuple[jax.Array, None]:
        """Applies layer number `layer` to `x (b, t, hidden)`."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x))), cache


class Encoder(nnx.Module):
    """All layers, stacked."""

    def __init__(self, config: Dinov2Config, parts: ImageParts) -> None:
        self.layer = parts.stack(config.num_hidden_layers, lambda own: Layer(config, own))


class Dinov2ForImageClassification(ImageClassifier):
    """A DINOv2 for classification of images, by its class token and the mean of its patches.

    Args:
        config: Sizes, constants and labels.
        dtype: What it computes in. Norms, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, and dropout.

    Example:
        >>> config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                       image_size=16, patch_size=4)
        >>> model = Dinov2ForImageClassification(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 12, 20, 3))).shape
        (1, 2)

    Source:
        Oquab et al., "DINOv2", arXiv 2304.07193.
    """

    architecture = Dinov2Config.architecture
    output_modules = ("classifier",)

    def __init__(
        self,
        config: Dinov2Config,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: Remat = "dots",
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.remat = remat
        parts = ImageParts(config, dtype, param_dtype, rngs)
        self.embeddings = Embeddings(parts)
        self.encoder = Encoder(config, parts)
        self.layernorm = parts.norm()
        self.classifier = parts.linear(
            2 * config.hidden_size, len(config.labels), preferred_element_type=jnp.float32
        )

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Gives one logit for each label; see `ImageClassifier.__call__`."""
        x = self.embeddings(pixel_values)
        x, _ = run_layers(self.encoder.layer, x, remat=self.remat)
        x = self.layernorm(x)
        pooled = jnp.concatenate([x[:, 0], x[:, 1:].mean(axis=1)], axis=1)  # (b, 2 hidden)
        return self.classifier(pooled).astype(jnp.float32)

    @staticmethod
    def parameter_table(config: Dinov2Config) -> ParameterTable:
        """Makes the parameter table of a DINOv2 with a head."""
        ours, theirs = "encoder.layer", "dinov2.encoder.layer.{}"

        def layer(name: str, axes: tuple[str, str]) -> dict[str, Tensor]:
            return linear(f"{ours}.{name}", f"{theirs}.{name}", axes)

        return ParameterTable(
            {
                **embedding_rows("dinov2.embeddings"),
                **attention_rows(f"{ours}.attention", f"{theirs}.attention"),
                **norm(f"{ours}.norm1", f"{theirs}.norm1"),
                **norm(f"{ours}.norm2", f"{theirs}.norm2"),
                **{
                    f"{ours}.{name}.lambda1": Tensor(f"{theirs}.{name}.lambda1", ("norm",))
                    for name in ("layer_scale1", "layer_scale2")
                },
                **layer("mlp.fc1", ("embed", "mlp")),
                **layer("mlp.fc2", ("mlp", "embed")),
                **layer("mlp.gate_proj", ("embed", "mlp")),
                **layer("mlp.up_proj", ("embed", "mlp")),
                **layer("mlp.down_proj", ("mlp", "embed")),
                **norm("layernorm", "dinov2.layernorm"),
                **linear("classifier", "classifier", ("embed", None), optional=True),
            },
            units={"heads": config.num_attention_heads},
        )


def _of_size(width: int, layers: int, heads: int, **more: Any) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=518,
        **more,
    )


FAMILY = Family(
    model_type=Dinov2Config.model_type,
    config=Dinov2Config,
    models={"image-classification": Dinov2ForImageClassification},
    prefix="dinov2.",
    renamed={**RENAMED, r"\.mlp\.weights_out\.": ".mlp.down_proj."},
    fused={r"(.*)\.mlp\.weights_in\.(\w+)": (r"\1.mlp.gate_proj.\2", r"\1.mlp.up_proj.\2")},
    ignored=r"dinov2\.embeddings\.mask_token",  # of pretraining
    sizes={
        "dinov2-small": _of_size(384, 12, 6),
        "dinov2-base": _of_size(768, 12, 12),
        "dinov2-large": _of_size(1024, 24, 16),
        "dinov2-giant": _of_size(1536, 40, 24, use_swiglu_ffn=True),
    },
)
