"""Classification of images."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from loft_jax.data import DataConfig
from loft_jax.data.batches import Batch
from loft_jax.data.images import ImageData, read_images
from loft_jax.data.log_once import log_unused
from loft_jax.data.row_formats import column_names, require_fields
from loft_jax.models.family import ImageClassifier, PretrainedConfig
from loft_jax.tasks.classification import LabelTask
from loft_jax.tasks.task import Arrays, Given, Rows

if TYPE_CHECKING:
    from loft_jax.hub.image_processor import ImageProcessor


class ImageClassification(LabelTask):
    """Predicts one of several labels of an image."""

    name = "image-classification"
    head = "image-classification"
    fields = ("image_field", "label_field")
    peft_type = None

    @classmethod
    def fits(cls, given: Given) -> bool:
        """Whether rows have an image and a label."""
        return {given.data.image_field, given.data.label_field} <= set(column_names(given.rows))

    def tokenize(
        self,
        rows: Rows,
        tokenizer: "ImageProcessor",
        data: DataConfig,
        *,
        vocab_size: int | None = None,
    ) -> ImageData:
        """Decodes every image once, to refuse those that cannot be read."""
        used = [data.image_field, data.label_field]
        columns = require_fields(rows, used, f"for {self.name}")
        log_unused(tokenizer, columns, used, data)
        label_of = self.reader(rows, data.label_field)
        return read_images(rows, tokenizer, data, label_of=label_of)

    def inputs(self, batch: Batch) -> Batch:
        """Gives the batch: images, labels, and a weight of 0 for rows of padding."""
        return batch

    def tokens(self, batch: Batch, sizes: PretrainedConfig) -> tuple[int, int]:
        """Counts the patches of the images, and the class token of each."""
        patch: int = sizes.patch_size  # type: ignore[attr-defined]  # of every model of images
        _, height, width, _ = batch["pixel_values"].shape
        length = 1 + (height // patch) * (width // patch)
        return int(batch["weights"].sum()) * length, length

    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Gives the shapes of a batch of square images; `length` is that of a side, in pixels."""
        return {
            "pixel_values": jax.ShapeDtypeStruct((rows, length, length, 3), jnp.float32),
            "labels": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
        }

    def logits(self, model: ImageClassifier, inputs: Arrays) -> jax.Array:
        """Computes the logits of a batch, (b, labels) float32."""
        return model(jnp.asarray(inputs["pixel_values"]))
