"""The ViT family: a pre-norm encoder of image patches and a class token, for image classification.

Module names are Hugging Face's. `layers` is one layer whose parameters have a leading axis of
layers. Images have their channels last, `(b, height, width, 3)`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from loft_jax.errors import InputError
from loft_jax.models import config_checks
from loft_jax.models.activations import laid_out
from loft_jax.models.attention import attend
from loft_jax.models.dropout import dropout, dropped
from loft_jax.models.encoder_config import EncoderConfig
from loft_jax.models.family import (
    Family,
    ImageClassifier,
    ParameterTable,
    Remat,
    Tensor,
    linear,
    norm,
)
from loft_jax.models.nonlinearities import NONLINEARITIES
from loft_jax.models.parts import Parts
from loft_jax.models.stack import run_layers

CHANNELS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(EncoderConfig):
    """The sizes and constants that encoders of image patches have in common.

    Names are those of Hugging Face's `config.json`.
    """

    only: ClassVar[Mapping[str, Any]] = {"num_channels": CHANNELS, "quantization_config": None}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    qkv_bias: bool = True
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_values(
            self,
            sizes={
                "image_size": config_checks.MOST_PIXELS,
                "patch_size": config_checks.MOST_PIXELS,
            },
            flags=("qkv_bias",),
        )
        if self.patch_size > self.image_size:
            raise InputError(
                f"config: patch_size is {self.patch_size}, expected image_size "
                f"({self.image_size}) at most"
            )

    @property
    def grid(self) -> int:
        """The number of patches of a side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def vocab_size(self) -> None:
        """None: it reads no tokens of a text."""

    @property
    def max_length(self) -> None:
        """None: positions are interpolated for images of other sizes."""

    @property
    def eos_token_id(self) -> None:
        """None: it reads no tokens of a text."""

    @classmethod
    def fields_from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gives the fields that the contents of a `config.json` of the family set."""
        fields = super().fields_from_hf(config)
        for name in ("image_size", "patch_size"):
            match fields.get(name):
                case [height, width] if height == width:
                    fields[name] = height
        return fields

    def fields_to_hf(self) -> dict[str, Any]:
        """Gives the fields as `config.json` has them, and the number of channels."""
        return {**super().fields_to_hf(), "num_channels": CHANNELS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageEncoderConfig):
    """Sizes and constants of a ViT, under the names of Hugging Face's `config.json`.

    Example:
        >>> config = ViTConfig.from_hf(
        ...     dict(model_type="vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...          intermediate_size=64, id2label={"0": "cat", "1": "dog"}))
        >>> config.labels
        ('cat', 'dog')
    """

    model_type: ClassVar[str] = "vit"
    architecture: ClassVar[str] = "ViTForImageClassification"
    others: ClassVar[tuple[str, ...]] = ("ViTModel", "ViTForMaskedImageModeling")

    intermediate_size: int = 3072

    def __post_init__(self) -> None:
        super().__post_init__()
        config_checks.check_values(self, sizes={"intermediate_size": config_checks.MOST_FEATURES})


class ImageParts(Parts):
    """Makes the layers of a model of images."""

    @property
    def draw(self) -> Callable[..., jax.Array]:
        """The initializer of weights."""
        return nnx.initializers.truncated_normal(self.config.initializer_range)

    def norm(self) -> nnx.LayerNorm:
        """Makes a norm of the residual stream."""
        return self.layer_norm(self.config.hidden_size, self.config.layer_norm_eps)

    def parameter(self, *shape: int) -> nnx.Param[jax.Array]:
        """Makes a parameter of its own, such as a class token."""
        return nnx.Param(self.draw(self.rngs.params(), shape, self.param_dtype))


class PatchEmbeddings(nnx.Module):
    """The convolution from patches to vectors."""

    def __init__(self, parts: ImageParts) -> None:
        side = (parts.config.patch_size,) * 2
        self.projection = nnx.Conv(
            CHANNELS,
            parts.config.hidden_size,
            side,
            strides=side,
            padding="VALID",
            kernel_init=parts.draw,
            **parts.own,
        )

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Maps `(b, height, width, 3)` to `(b, rows, columns, hidden)`."""
        return laid_out(self.projection(pixel_values))


class Embeddings(nnx.Module):
    """A class token and the vectors of the patches, each with its position."""

    def __init__(self, parts: ImageParts) -> None:
        config = parts.config
        self.dtype = jnp.dtype(parts.dtype)
        self.cls_token = parts.parameter(1, 1, config.hidden_size)
        self.position_embeddings = parts.parameter(1, 1 + config.grid**2, config.hidden_size)
        self.patch_embeddings = PatchEmbeddings(parts)
        self.dropout = dropout(config.hidden_dropout_prob, parts.rngs)

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Maps `(b, height, width, 3)` to `(b, 1 + patches, hidden)`."""
        x = self.patch_embeddings(pixel_values)
        batch, rows, columns, width = x.shape
        positions = interpolated(self.position_embeddings[...], rows, columns).astype(self.dtype)
        x = x.reshape(batch, rows * columns, width)
        first = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (batch, 1, width))
        return dropped(self.dropout, laid_out(jnp.concatenate([first, x], axis=1) + positions))


def interpolated(positions: jax.Array, rows: int, columns: int) -> jax.Array:
    """Interpolates the embeddings of positions for an image of another size.

    As in transformers: bicubic, between the centers of patches, in float32.

    Args:
        positions: `(1, 1 + n * n, hidden)`: that of the class token, and those of a square of
            patches.
        rows: Number of rows of the patches of an image.
        columns: Number of their columns.

    Returns:
        `(1, 1 + rows * columns, hidden)`.

    Raises:
        InputError: The image is smaller than a patch.

    Example:
        >>> interpolated(jnp.ones((1, 1 + 4 * 4, 8)), 2, 3).shape
        (1, 7, 8)
    """
    if not (rows and columns):
        raise InputError("an image is smaller than a patch of the model; expected a larger one")
    side = round((positions.shape[1] - 1) ** 0.5)
    if (rows, columns) == (side, side):
        return positions
    square = positions[0, 1:].reshape(side, side, -1).astype(jnp.float32)
    down, across = _cubic_weights(side, rows), _cubic_weights(side, columns)
    placed = jnp.einsum("ri,cj,ijh->rch", down, across, square, precision="highest")
    placed = placed.reshape(1, rows * columns, -1).astype(positions.dtype)
    return jnp.concatenate([positions[:, :1], placed], axis=1)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """The weights `(new, old)` of a cubic convolution with a = -0.75, as PyTorch has it."""
    places = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(places).astype(int)
    weights = np.zeros((new, old))
    for offset in range(-1, 3):
        far = np.abs(places - first - offset)
        near = (1.25 * far - 2.25) * far**2 + 1  # within 1
        outer = -0.75 * (((far - 5) * far + 8) * far - 4)  # within 2
        index = np.clip(first + offset, 0, old - 1)  # the border is repeated
        np.add.at(weights, (np.arange(new), index), np.where(far <= 1, near, outer))
    return weights.astype(np.float32)


class Attention(nnx.Module):
    """Self-attention over all patches and the class token."""

    def __init__(self, parts: ImageParts) -> None:
        config = parts.config
        width, bias = config.hidden_size, config.qkv_bias
        self.heads = config.num_attention_heads
        self.q_proj = parts.linear(width, width, use_bias=bias)
        self.k_proj = parts.linear(width, width, use_bias=bias)
        self.v_proj = parts.linear(width, width, use_bias=bias)
        self.o_proj = parts.linear(width, width)
        self.dropout = dropout(config.attention_probs_dropout_prob, parts.rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes `(b, t, hidden)`."""
        heads = (*x.shape[:2], self.heads, -1)
        queries, keys, values = (
            laid_out(project(x).reshape(heads), features=2)  # (b, t, heads, head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # (b, heads, t, head_dim)
        everything = jnp.ones((1, 1, x.shape[1]), bool)
        mixed = attend(queries, keys, values, everything, self.dropout)
        return self.o_proj(laid_out(mixed.reshape(x.shape), features=2))


class MLP(nnx.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, parts: ImageParts, width: int) -> None:
        self.act = NONLINEARITIES[parts.config.hidden_act]
        self.fc1 = parts.linear(parts.config.hidden_size, width)
        self.fc2 = parts.linear(width, parts.config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(b, t, hidden)` to `(b, t, hidden)`."""
        return self.fc2(self.act(laid_out(self.fc1(x), features=2)))


class Layer(nnx.Module):
    """Attention and the MLP, each on normed input and added to the residual stream."""

    def __init__(self, config: ViTConfig, parts: ImageParts) -> None:
        self.attention = Attention(parts)
        self.layernorm_before = parts.norm()
        self.layernorm_after = parts.norm()
        self.mlp = MLP(parts, config.intermediate_size)
        self.dropout = dropout(config.hidden_dropout_prob, parts.rngs)

    def __call__(self, x: jax.Array, cache: None, layer: jax.Array) -> tuple[jax.Array, None]:
        """Applies layer number `layer` to `x (b, t, hidden)`."""
        x = x + dropped(self.dropout, self.attention(self.layernorm_before(x)))
        return x + dropped(self.dropout, self.mlp(self.layernorm_after(x))), cache


class ViTForImageClassification(ImageClassifier):
    """A ViT for classification of images.

    Args:
        config: Sizes, constants and labels.
        dtype: What it computes in. Norms, softmax and logits are float32 whatever it is.
        param_dtype: What its parameters are stored in.
        remat: What the backward pass computes again.
        rngs: For the initial parameters, and dropout.

    Example:
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                    intermediate_size=64, image_size=16, patch_size=4)
        >>> model = ViTForImageClassification(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 16, 16, 3))).shape
        (1, 2)

    Source:
        Dosovitskiy et al., "An image is worth 16x16 words", arXiv 2010.11929.
    """

    architecture = ViTConfig.architecture
    output_modules = ("classifier",)

    def __init__(
        self,
        config: ViTConfig,
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
        self.layers = parts.stack(config.num_hidden_layers, lambda own: Layer(config, own))
        self.layernorm = parts.norm()
        self.classifier = parts.linear(
            config.hidden_size, len(config.labels), preferred_element_type=jnp.float32
        )

    def __call__(self, pixel_values: jax.Array) -> jax.Array:
        """Gives one logit for each label; see `ImageClassifier.__call__`."""
        x = self.embeddings(pixel_values)
        x, _ = run_layers(self.layers, x, remat=self.remat)
        return self.classifier(self.layernorm(x)[:, 0]).astype(jnp.float32)

    @staticmethod
    def parameter_table(config: ViTConfig) -> ParameterTable:
        """Makes the parameter table of a ViT with a head."""
        theirs = "vit.layers.{}"
        return ParameterTable(
            {
                **embedding_rows("vit.embeddings"),
                **attention_rows("layers.attention", f"{theirs}.attention"),
                **norm("layers.layernorm_before", f"{theirs}.layernorm_before"),
                **norm("layers.layernorm_after", f"{theirs}.layernorm_after"),
                **linear("layers.mlp.fc1", f"{theirs}.mlp.fc1", ("embed", "mlp")),
                **linear("layers.mlp.fc2", f"{theirs}.mlp.fc2", ("mlp", "embed")),
                **norm("layernorm", "vit.layernorm"),
                **linear("classifier", "classifier", ("embed", None), optional=True),
            },
            units={"heads": config.num_attention_heads},
        )


def embedding_rows(theirs: str) -> dict[str, Tensor]:
    """Makes the rows of a table for `Embeddings`, from Hugging Face's name of the module."""
    ours, patches = "embeddings", "patch_embeddings.projection"
    kernel = Tensor(f"{theirs}.{patches}.weight", (None, None, None, "embed"), transposed=True)
    return {
        f"{ours}.{patches}.kernel": kernel,
        f"{ours}.{patches}.bias": Tensor(f"{theirs}.{patches}.bias", ("embed",)),
        f"{ours}.cls_token": Tensor(f"{theirs}.cls_token", (None, None, "norm")),
        f"{ours}.position_embeddings": Tensor(
            f"{theirs}.position_embeddings", (None, None, "norm")
        ),
    }


def attention_rows(ours: str, theirs: str) -> dict[str, Tensor]:
    """Makes the rows of a table for `Attention`, from the names of both modules."""
    rows: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        rows |= linear(f"{ours}.{name}", f"{theirs}.{name}", ("embed", "heads"))
    return rows | linear(f"{ours}.o_proj", f"{theirs}.o_proj", ("heads", "embed"))


RENAMED: Mapping[str, str] = {
    r"attention\.attention\.query\.": "attention.q_proj.",
    r"attention\.attention\.key\.": "attention.k_proj.",
    r"attention\.attention\.value\.": "attention.v_proj.",
    r"attention\.output\.dense\.": "attention.o_proj.",
}
"""Names of the attention in the checkpoints that transformers writes, and the modules' own."""

FAMILY = Family(
    model_type=ViTConfig.model_type,
    config=ViTConfig,
    models={"image-classification": ViTForImageClassification},
    prefix="vit.",
    renamed={
        **RENAMED,
        r"encoder\.layer\.": "layers.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"(layers\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
    },
    # What a classifier does not use, and the head of masked pretraining.
    ignored=r"vit\.pooler\..*|vit\.embeddings\.mask_token|(vit\.)?decoder\..*",
    sizes={
        "vit-base-patch16-224": ViTConfig(),
        "vit-large-patch16-224": ViTConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        ),
    },
)
