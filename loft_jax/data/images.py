"""Labelled images: decoded and checked before training, augmented and put into batches."""

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from loft_jax.data.batches import Batch
from loft_jax.data.config import DataConfig
from loft_jax.errors import InputError, explained, shown
from loft_jax.files import regular_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from loft_jax.hub.image_processor import ImageProcessor

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others run programs, or are rare
# Pillow's modes of numbers that need not lie in 0 to 255, where its conversion would cut them off.
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_MOST_PIXELS = 2**27  # of an image; more may be meant to exhaust memory
_AREAS = (0.08, 1.0)  # of a random crop, as a share of the image; as torchvision has it
_RATIOS = (3 / 4, 4 / 3)  # of its width to its height
_TRIES = 10
_CHUNK = 1000  # images decoded at once


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images with labels, decoded when they are used.

    Args:
        rows: Examples.
        labels: (n,) int32.
        processor: Of the model.
        config: Its `image_field` and its augmentations are used.
        fingerprint: A checksum of the images, the labels and the processor.
    """

    rows: Any
    labels: np.ndarray
    processor: "ImageProcessor"
    config: DataConfig
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, index: int) -> tuple[np.ndarray, np.int32]:
        """Gives an image `(height, width, 3)` float32 as for evaluation, and its label."""
        return self.processor(self._image(index)), self.labels[index]

    def augmented(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.int32]:
        """Gives an image as for training, and its label.

        Args:
            index: Of the example.
            rng: Source of the random crop and flip, which every step of a run has its own of.

        Returns:
            `(height, width, 3)` float32, and the label.
        """
        image, processor = self._image(index), self.processor
        if self.config.random_resized_crop:
            height, width = processor.size
            box = random_box(image.size, rng)
            part = image.crop(box).resize((width, height), processor.resample)
            values = processor.normalized(np.asarray(part))
        else:
            values = processor(image)
        if self.config.random_horizontal_flip and rng.random() < 0.5:
            values = values[:, ::-1]
        return values, self.labels[index]

    def batch(self, examples: Sequence[tuple[np.ndarray, np.int32]], batch_size: int) -> Batch:
        """Puts examples into a batch, and pads it with images without weight.

        Args:
            examples: At most `batch_size`, from `example` or `augmented`.
            batch_size: Number of rows.

        Returns:
            `pixel_values (batch_size, height, width, 3)` float32, `labels (batch_size,)` int32 and
            `weights (batch_size,)` float32.
        """
        pixels = np.zeros((batch_size, *self.processor.size, 3), np.float32)
        labels, weights = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.float32)
        for row, (values, label) in enumerate(examples):
            pixels[row], labels[row], weights[row] = values, label, 1.0
        return {"pixel_values": pixels, "labels": labels, "weights": weights}

    def _image(self, index: int) -> "Image":
        return open_image(self.rows[index][self.config.image_field], f"row {index}")


def read_images(
    rows: Any,
    processor: "ImageProcessor",
    config: DataConfig,
    *,
    label_of: Callable[[Mapping[str, Any], int], float],
) -> ImageData:
    """Checks labelled images, each of which is decoded once.

    Args:
        rows: Examples, as `load_examples` gives them or as plain dicts. An image is a `Path`, the
            bytes of a file, alone or as `{"bytes": ...}`, an array or nested lists `(height,
            width)` or `(height, width, 3)` of 0 to 255, or an image of Pillow.
        processor: Of the model.
        config: Its `image_field` and augmentations are used.
        label_of: Gives the label of a row and its index.

    Returns:
        The images.

    Raises:
        InputError: An image cannot be read, or a label is wrong; the message names the row.
    """
    if config.packing or config.buckets:
        found = "packing is true" if config.packing else f"buckets are {shown(config.buckets)}"
        raise InputError(f"{found}, but images are not padded to a length")
    digest = hashlib.blake2b(digest_size=16)
    settings = {
        name: getattr(processor, name)
        for name in ("resize", "resample", "crop", "scale", "mean", "std")
    }
    digest.update(json.dumps(settings).encode())

    def checked(index: int) -> tuple[float, bytes]:
        row = rows[index]
        kept = label_of(row, index)
        image = open_image(row.get(config.image_field), f"row {index}")
        size = repr(image.size).encode()
        return kept, hashlib.blake2b(size + image.tobytes(), digest_size=16).digest()

    labels: list[float] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(range(0, len(rows), _CHUNK), desc="images", leave=False, delay=2):
            some = range(start, min(start + _CHUNK, len(rows)))
            for kept, content in pool.map(checked, some):
                labels.append(kept)
                digest.update(content)
    kept_labels = np.asarray(labels, np.int32)
    digest.update(kept_labels.tobytes())
    return ImageData(rows, kept_labels, processor, config, digest.hexdigest())


def open_image(value: Any, where: str) -> "Image":
    """Decodes an image.

    Args:
        value: As for `read_images`.
        where: The row, for messages.

    Returns:
        The image in RGB, upright.

    Raises:
        InputError: It is not an image, is damaged or too large, or its one channel has more than 8
            bits; the message names row and file.
    """
    from PIL import Image, ImageOps

    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, Path):
        where = f"{where}: {regular_file(value, 'an image')}"
    with explained(f"{where}: cannot be read as an image"):
        if isinstance(value, (bytes, Path)):
            file = io.BytesIO(value) if isinstance(value, bytes) else value
            image: Image.Image = Image.open(file, formats=_FORMATS)
            if math.prod(image.size) > _MOST_PIXELS:
                raise ValueError(f"it has {image.size} pixels, expected {_MOST_PIXELS} at most")
        elif isinstance(value, Image.Image):
            image = value
        elif isinstance(value, (np.ndarray, list)):
            image = Image.fromarray(_pixels(value))
        else:
            raise ValueError(
                f"found {shown(value)}; expected the bytes of a file, an array of pixels, or an "
                "image of Pillow"
            )
        if image.mode in _DEEP:
            raise ValueError(
                f"its pixels are of mode {image.mode}, expected 8 bits; scale them first"
            )
        return ImageOps.exif_transpose(image).convert("RGB")


def _pixels(value: Any) -> np.ndarray:
    """Gives `(height, width)` or `(height, width, 3)` uint8."""
    pixels = np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    colored = pixels.ndim == 3 and pixels.shape[2] == 3
    if not (colored or pixels.ndim == 2) or not pixels.size:
        raise ValueError(f"it is {pixels.shape}, expected (height, width) or (height, width, 3)")
    if pixels.dtype != np.uint8:
        whole = np.issubdtype(pixels.dtype, np.integer)
        if not whole or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"it is {pixels.dtype}, expected whole numbers from 0 to 255")
        pixels = pixels.astype(np.uint8)
    return np.ascontiguousarray(pixels)


def random_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws a part of an image, of a random area and aspect ratio.

    As torchvision's `RandomResizedCrop`: if no part of ten fits, it is the middle.

    Args:
        size: Width and height.
        rng: Source of random numbers.

    Returns:
        Left, upper, right and lower bound.

    Source:
        Szegedy et al., "Going deeper with convolutions", arXiv 1409.4842, section 6.
    """
    width, height = size
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*_AREAS)
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left = int(rng.integers(width - wide, endpoint=True))
            upper = int(rng.integers(height - high, endpoint=True))
            return left, upper, left + wide, upper + high
    low, most = _RATIOS
    wide = min(width, round(height * most))
    high = min(height, round(width / low))
    left, upper = (width - wide) // 2, (height - high) // 2
    return left, upper, left + wide, upper + high
