"""Images against the image processors of transformers."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from loft_jax.errors import InputError
from loft_jax.hub.image_processor import ImageProcessor

VARIANTS = {
    "ViT": (ViTImageProcessorPil, {"size": {"height": 20, "width": 28}}),
    "ViT, cubic": (ViTImageProcessorPil, {"size": {"height": 16, "width": 16}, "resample": 3}),
    "as it is": (
        ViTImageProcessorPil,
        {"size": {"height": 9, "width": 9}, "do_rescale": False, "do_normalize": False},
    ),
    "Bit": (
        BitImageProcessorPil,
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 21, "width": 20}},
    ),
    "crop larger than the image": (
        BitImageProcessorPil,
        {"size": {"shortest_edge": 12}, "crop_size": {"height": 17, "width": 17}},
    ),
    "crop alone": (BitImageProcessorPil, {"do_resize": False, "crop_size": 16}),
    "defaults": (BitImageProcessorPil, {}),
}
SIZES = [(40, 31), (19, 64), (24, 24), (15, 16)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_are_those_of_transformers(tmp_path, variant):
    make, options = VARIANTS[variant]
    theirs = make(**options)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.read(tmp_path / "preprocessor_config.json")
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        expected = np.asarray(theirs(image, return_tensors="np")["pixel_values"][0])
        found = ours(image)
        assert found.shape == (*ours.size, 3)
        np.testing.assert_allclose(found, expected.transpose(1, 2, 0), atol=1e-5)


def test_files_of_older_versions_are_read():
    """Without a class, and with a size that is one number."""
    older = {"do_normalize": True, "do_resize": True, "resample": 2, "size": 24}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 31, 3), np.uint8))
    expected = ViTImageProcessorPil(size={"height": 24, "width": 24})(image, return_tensors="np")
    found = ImageProcessor.from_settings(older)(image)
    np.testing.assert_allclose(found, expected["pixel_values"][0].transpose(1, 2, 0), atol=1e-5)


def test_a_file_is_written_as_it_was_read(tmp_path):
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    ImageProcessor.from_settings(settings).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImage"),
        ({"do_pad": True}, "do_pad is True, only false is supported"),
        ({"do_resize": 1}, "do_resize is 1, expected true or false"),
        ({"resample": 9}, "resample is 9, expected 0 to 5"),
        ({"size": {"longest_edge": 9}}, "size is {'longest_edge': 9}, expected height and width"),
        ({"size": {"height": 0, "width": 8}}, "size is {'height': 0, 'width': 8}, expected"),
        ({"size": {"shortest_edge": 8}}, "so that images differ in size"),
        ({"do_center_crop": True}, "crop_size is None, expected height and width"),
        ({"image_std": [1, 0, 1]}, "image_std is [1, 0, 1], expected numbers, 3 of them"),
        ({"image_mean": [1, 0]}, "image_mean is [1, 0], expected numbers, 3 of them"),
        ({"rescale_factor": "x"}, "rescale_factor is 'x', expected numbers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings, said):
    with pytest.raises(InputError) as raised:
        ImageProcessor.from_settings(settings)
    assert said in str(raised.value)
