"""The image processor of a model: resizing, cropping and normalization of its images.

The settings are those of `preprocessor_config.json`, and the result is that of transformers' image
processors with Pillow.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loft_jax.errors import InputError, naming, shown
from loft_jax.files import MOST_CONFIG, inside, read_json

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_NAME = "preprocessor_config.json"

_HALF = [0.5, 0.5, 0.5]
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

# What the classes of transformers have where a file says nothing. Files of older versions name no
# class, and say all that differs.
_USUAL: Mapping[str, Any] = {
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 2,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _HALF,
    "image_std": _HALF,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ViT": _USUAL,
    "Bit": {
        **_USUAL,
        "size": {"shortest_edge": 224},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    },
}
_CLASSES = {
    f"{name}{kind}": name
    for name in _DEFAULTS
    for kind in ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
}
_OFF = ("do_pad", "do_flip_channel_order", "do_reduce_labels")  # what is not implemented
_MOST_PIXELS = 2**12  # of a side that a file asks for
_MOST_LONGER = 2**14  # of the longer side, where a file asks for the shorter one
_FILTERS = range(6)  # Pillow's


@dataclass(frozen=True, eq=False)
class ImageProcessor:
    """The settings of an image processor.

    Attributes:
        settings: Content of `preprocessor_config.json`.
        resize: Height and width to resize to, or the length of the shorter side; None resizes
            nothing.
        resample: Pillow's number of the filter.
        crop: Height and width of the part in the middle; None crops nothing.
        scale: Factor of the values, which are 0 to 255.
        mean: What is then subtracted, for each channel.
        std: What is then divided by, for each channel.
    """

    settings: Mapping[str, Any]
    resize: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> "ImageProcessor":
        """Reads a file.

        Args:
            path: Of `preprocessor_config.json`.

        Returns:
            The processor.

        Raises:
            InputError: The file is missing or damaged, or a setting is not supported.
        """
        content = read_json(inside(path.parent, path.name), most_bytes=MOST_CONFIG)
        with naming(path):
            return cls.from_settings(content)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "ImageProcessor":
        """Makes a processor from the content of a `preprocessor_config.json`.

        Raises:
            InputError: A setting is not supported; the message names it.

        Example:
            >>> size = {"height": 32, "width": 32}
            >>> ImageProcessor.from_settings({"do_resize": True, "size": size}).size
            (32, 32)
        """
        name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
        if name is not None and (not isinstance(name, str) or name not in _CLASSES):
            raise InputError(
                f"image_processor_type is {shown(name)}, expected one of {', '.join(_CLASSES)}"
            )
        kind = _CLASSES[name] if name is not None else "ViT"
        given = {field: value for field, value in settings.items() if value is not None}
        used = {**_DEFAULTS[kind], **given}
        for field in _OFF:
            if used.get(field, False) is not False:
                raise InputError(f"{field} is {shown(used[field])}, only false is supported")
        for field in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not isinstance(used[field], bool):
                raise InputError(f"{field} is {shown(used[field])}, expected true or false")
        if type(used["resample"]) is not int or used["resample"] not in _FILTERS:
            raise InputError(f"resample is {shown(used['resample'])}, expected 0 to 5")
        resize: tuple[int, int] | int | None = None
        if used["do_resize"]:
            square = isinstance(used["size"], int) and kind == "ViT"
            resize = _side(used["size"]) if not square and _has_one_side(used["size"]) else None
            resize = resize or _sides("size", used["size"])
        crop = _sides("crop_size", used.get("crop_size")) if used["do_center_crop"] else None
        if crop is None and not isinstance(resize, tuple):
            raise InputError(
                f"size is {shown(used['size'])} and do_center_crop is false, so that images differ "
                "in size; expected height and width, or a crop"
            )
        (scale,) = (
            _numbers("rescale_factor", used["rescale_factor"]) if used["do_rescale"] else (1.0,)
        )
        mean: tuple[float, ...] = (0.0,) * 3
        std: tuple[float, ...] = (1.0,) * 3
        if used["do_normalize"]:
            mean = _numbers("image_mean", used["image_mean"], 3)
            std = _numbers("image_std", used["image_std"], 3, positive=True)
        return cls(settings, resize, used["resample"], crop, scale, mean, std)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what it gives."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)
        return size

    def __call__(self, image: "Image") -> np.ndarray:
        """Processes an image, as for evaluation.

        Args:
            image: In RGB.

        Returns:
            `(height, width, 3)` float32.
        """
        if self.resize is not None:
            image = image.resize(self._resized(image.size), self.resample)
        values = np.asarray(image)
        return self.normalized(values if self.crop is None else _center(values, self.crop))

    def normalized(self, values: np.ndarray) -> np.ndarray:
        """Rescales and normalizes an image.

        Args:
            values: `(height, width, 3)` uint8.

        Returns:
            `(height, width, 3)` float32.
        """
        scaled = (values.astype(np.float64) * self.scale).astype(np.float32)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `preprocessor_config.json` to a folder."""
        text = json.dumps(self.settings, indent=2) + "\n"
        (Path(folder) / PROCESSOR_NAME).write_text(text, encoding="utf-8")

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """The width and height to resize an image of some width and height to."""
        if isinstance(self.resize, tuple):
            return self.resize[::-1]
        assert self.resize is not None
        short, long = sorted(size)
        longer = int(self.resize * long / short)
        if longer > _MOST_LONGER:
            raise InputError(
                f"an image is {size[0]} x {size[1]}, {longer} pixels long where its shorter side "
                f"is {self.resize}, expected {_MOST_LONGER} at most"
            )
        width, height = size
        return (self.resize, longer) if width <= height else (longer, self.resize)


def _has_one_side(size: Any) -> bool:
    return isinstance(size, int) or (isinstance(size, Mapping) and set(size) == {"shortest_edge"})


def _side(size: Any) -> int:
    side = size["shortest_edge"] if isinstance(size, Mapping) else size
    return _sides("size", side)[0]


def _sides(field: str, size: Any) -> tuple[int, int]:
    """Reads height and width, which one number stands for both of."""
    sides = (size, size)
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        sides = (size["height"], size["width"])
    if not all(type(side) is int and 1 <= side <= _MOST_PIXELS for side in sides):
        raise InputError(
            f"{field} is {shown(size)}, expected height and width from 1 to {_MOST_PIXELS}"
        )
    return sides


def _numbers(
    field: str, values: Any, count: int = 1, *, positive: bool = False
) -> tuple[float, ...]:
    values = [values] * count if type(values) in (int, float) else values
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(
        type(x) in (int, float) and abs(x) < 1e30 and (x > 0 or not positive) for x in values
    ):
        raise InputError(f"{field} is {shown(values)}, expected numbers, {count} of them")
    return tuple(map(float, values))


def _center(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image; one that is smaller is surrounded by zeros."""
    for axis, wanted in enumerate(size):
        found = values.shape[axis]
        if found < wanted:
            before = -(-(wanted - found) // 2)
            pad = [(0, 0)] * values.ndim
            pad[axis] = (before, wanted - found - before)
            values = np.pad(values, pad)
        else:
            start = (found - wanted) // 2
            values = values[(slice(None),) * axis + (slice(start, start + wanted),)]
    return values
