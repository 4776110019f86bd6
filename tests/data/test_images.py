"""Labelled images from folders, files and lists, and the batches that they become."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from loft_jax.data import DataConfig, eval_batches, load_examples, train_stream
from loft_jax.data.images import open_image, random_box
from loft_jax.errors import InputError
from loft_jax.evaluation import sampled
from loft_jax.hub.image_processor import ImageProcessor
from loft_jax.tasks import ImageClassification
from loft_jax.tasks.classification import labels_of
from loft_jax.training.held_out import rows_fingerprint

PROCESSOR = ImageProcessor.from_settings({"size": {"height": 8, "width": 6}})
TASK = ImageClassification(["cat", "dog"])
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 12, 10, 3), np.uint8)
LABELS = ["cat", "dog", "dog", "cat", "dog"]
ROWS = [{"image": x, "label": label} for x, label in zip(PIXELS, LABELS, strict=True)]


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def config(path="", **options):
    return DataConfig(str(path), **options)


def images_of(rows):
    return [np.asarray(open_image(row["image"], "row")) for row in rows]


@pytest.fixture
def folder(tmp_path):
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{index}.png").write_bytes(png(pixels))
    return tmp_path


def test_folders_by_class_are_read_in_the_order_of_their_names(folder):
    (folder / "dog" / "notes.txt").write_text("not an image")
    rows = load_examples(config(folder))
    order = [0, 3, 1, 2, 4]
    assert [row["label"] for row in rows] == [LABELS[index] for index in order]
    np.testing.assert_array_equal(images_of(rows), PIXELS[order])
    assert labels_of(rows, "label") == ("cat", "dog")
    assert len(load_examples(config(folder, split="train[:40%]"))) == 2


def test_files_beside_folders_of_images_do_not_hide_them(folder, caplog):
    (folder / "LICENSE.txt").write_text("some licence")
    (folder / "metadata.csv").write_text("file_name,label\n0.png,bird\n")
    assert len(load_examples(config(folder))) == 5
    (warning,) = caplog.messages
    assert warning.endswith("has images in folders by label; not read: LICENSE.txt, metadata.csv")
    for name in ("LICENSE.txt", "metadata.csv"):
        (folder / name).unlink()
    (folder / "rows.jsonl").write_text('{"text": "a"}')  # images may be of a page or of a run
    assert load_examples(config(folder)).to_list() == [{"text": "a"}]


def test_images_in_a_folder_around_those_of_labels_are_refused(folder):
    (folder / "all").mkdir()
    for label in ("cat", "dog"):
        (folder / label).rename(folder / "all" / label)
    with pytest.raises(InputError, match=r"no data file \(found all\)"):
        load_examples(config(folder))


def test_all_images_of_a_label_are_read_and_what_is_not_is_told(folder, caplog):
    for name in ("cat/2020/may/5.png", "cat/.hidden/6.png", "dog/x.avif", "dog/y.jfif", "7.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(PIXELS[0]))
    rows = load_examples(config(folder))
    names = [str(row["image"].relative_to(folder)) for row in rows]
    assert names == [
        "cat/0.png", "cat/3.png", "cat/2020/may/5.png", "dog/1.png", "dog/2.png", "dog/4.png",
    ]  # fmt: skip
    assert [row["label"] for row in rows] == ["cat"] * 3 + ["dog"] * 3
    (folder / "cat" / "all").symlink_to(folder / "dog")
    caplog.clear()
    assert len(load_examples(config(folder))) == len(rows)
    beside, deeper, others = caplog.messages
    assert "1 images in no folder of a label are not read; the first is 7.png" in beside
    assert "have this label; the first is cat/2020/may/5.png" in deeper
    assert "3 files are not read: expected images, ending in .bmp" in others
    assert others.endswith("the first is cat/all")


def test_folders_of_splits_hold_folders_by_class(folder, tmp_path):
    whole = tmp_path / "whole"
    for split in ("train", "val"):
        (whole / split).mkdir(parents=True)
        for label in ("cat", "dog"):
            (folder / label).rename(whole / split / label)
            (folder / label).mkdir()
            (folder / label / "0.png").write_bytes(png(PIXELS[0]))
    assert len(load_examples(config(whole))) == 5
    assert len(load_examples(config(whole, split="validation"))) == 2
    with pytest.raises(InputError, match=r"cannot be read as images by class.*test"):
        load_examples(config(whole, split="test"))


@pytest.mark.parametrize("name", ["image", "picture"])
def test_arrays_are_read_by_the_names_of_the_fields(tmp_path, name):
    np.savez(tmp_path / "digits.npz", **{name: PIXELS[..., 0], "label": [0, 1, 1, 0, 1]})
    rows = load_examples(config(tmp_path / "digits.npz", image_field=name))
    assert [row["label"] for row in rows] == [0, 1, 1, 0, 1]
    np.testing.assert_array_equal(rows[2][name], PIXELS[2, ..., 0])
    with pytest.raises(InputError, match=r"digits\.npz: array 'y' is missing; found \['"):
        load_examples(config(tmp_path / "digits.npz", image_field=name, label_field="y"))


def test_a_sample_of_images_is_that_of_other_rows():
    kept = sampled(datasets.Dataset.from_dict({"place": range(5)}), 3)["place"][:]
    assert [row["label"] for row in sampled(ROWS, 3)] == [LABELS[place] for place in kept]


def test_arrays_of_different_lengths_are_refused(tmp_path):
    np.savez(tmp_path / "digits.npz", image=PIXELS, label=[0, 1])
    with pytest.raises(InputError, match=r"image is \(5, 12, 10, 3\) and label is \(2,\)"):
        load_examples(config(tmp_path / "digits.npz"))


def test_images_of_parquet_are_read_from_their_bytes(tmp_path):
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    rows = [
        {"image": {"bytes": png(x), "path": "/nowhere.png"}, "label": label}
        for x, label in zip(PIXELS, LABELS, strict=True)
    ]
    made = datasets.Dataset.from_list(rows, features=features)
    made.to_parquet(tmp_path / "rows.parquet")
    found = load_examples(config(tmp_path / "rows.parquet"))
    np.testing.assert_array_equal(images_of(found), PIXELS)
    assert labels_of(found, "label") == ("cat", "dog")
    assert TASK.tokenize(found, PROCESSOR, config()).labels.tolist() == [0, 1, 1, 0, 1]


def test_every_kind_of_image_is_the_same_image(tmp_path):
    (tmp_path / "0.png").write_bytes(png(PIXELS[0]))
    kinds = [png(PIXELS[0]), tmp_path / "0.png", PIXELS[0], PIXELS[0].tolist()]
    kinds += [Image.fromarray(PIXELS[0]), {"bytes": png(PIXELS[0]), "path": None}]
    for kind in kinds:
        np.testing.assert_array_equal(np.asarray(open_image(kind, "row 0")), PIXELS[0])
    grey = np.asarray(open_image(PIXELS[0][..., :1], "row 0"))
    np.testing.assert_array_equal(grey, np.repeat(PIXELS[0][..., :1], 3, axis=2))


def test_a_photo_that_lies_on_its_side_is_turned():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS[0]).save(file, "PNG", exif=exif)
    turned = np.asarray(open_image(file.getvalue(), "row 0"))
    np.testing.assert_array_equal(turned, np.rot90(PIXELS[0], k=-1))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (png(PIXELS[0])[:150], "row 1: cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "row 1: cannot be read as an image"),
        ("cat.png", "row 1: cannot be read as an image: found 'cat.png'; expected the bytes"),
        (None, "row 1: cannot be read as an image: found None"),
        (np.zeros((4, 4)), "row 1: cannot be read as an image: it is float64, expected whole"),
        ([[256]], "row 1: cannot be read as an image: it is int64, expected whole numbers"),
        (png(PIXELS[0][..., 0].astype(np.uint16) * 257), "its pixels are of mode I;16, expected 8"),
        (Image.fromarray(np.zeros((4, 4), np.float32)), "its pixels are of mode F, expected 8"),
        (np.zeros((4, 4, 2), np.uint8), r"it is \(4, 4, 2\), expected \(height, width\)"),
    ],
)
def test_bad_images_are_refused_with_their_row(image, said):
    rows = [ROWS[0], {"image": image, "label": "cat"}]
    with pytest.raises(InputError, match=said):
        TASK.tokenize(rows, PROCESSOR, config())


def test_bad_files_are_refused_with_their_name(folder):
    (folder / "dog" / "2.png").write_bytes(png(PIXELS[2])[:99])
    with pytest.raises(InputError, match=r"row 3: .*dog/2\.png: cannot be read as an image"):
        TASK.tokenize(load_examples(config(folder)), PROCESSOR, config())


def test_images_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("loft_jax.data.images._MOST_PIXELS", 100)
    with pytest.raises(InputError, match=r"it has \(10, 12\) pixels, expected 100 at most"):
        open_image(png(PIXELS[0]), "row 0")


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"text": "a", "label": 1}], {}, "field 'image' is missing"),
        ([{"image": PIXELS[0]}], {}, "field 'label' is missing"),
        ([{"image": PIXELS[0], "label": "cow"}], {}, "row 0: field 'label' is 'cow'; expected one"),
        (ROWS, {"packing": True}, "packing is true, but images are not padded"),
        (ROWS, {"buckets": (2048,)}, r"buckets are \(2048,\), but images are not padded"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, options, said):
    with pytest.raises(InputError, match=said):
        TASK.tokenize(rows, PROCESSOR, config(**options))


def test_batches_hold_every_image_once_and_padding_weighs_nothing():
    batches = eval_batches(TASK.tokenize(ROWS, PROCESSOR, config()), config(), batch_size=3)
    assert [batch["weights"].tolist() for batch in batches] == [[1, 1, 1], [1, 1, 0]]
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1, 1], [0, 1, 0]]
    expected = PROCESSOR(Image.fromarray(PIXELS[4]))
    np.testing.assert_array_equal(batches[1]["pixel_values"][1], expected)
    assert batches.order.tolist() == [0, 1, 2, 3, 4]
    found = {name: (x.shape[0], x.dtype) for name, x in TASK.inputs(batches[0]).items()}
    assert found == {name: (x.shape[0], x.dtype) for name, x in TASK.shapes(3, 8).items()}


AUGMENTED = config(random_resized_crop=True, random_horizontal_flip=True)


def stream(rows=ROWS, data=AUGMENTED, seed=0):
    return train_stream(TASK.tokenize(rows, PROCESSOR, data), data, batch_size=2, seed=seed)


def test_augmentation_depends_on_seed_and_step_alone():
    one, again = stream(), stream()
    first = [next(one) for _ in range(6)]
    state = [again.get_state() for _ in range(4) if next(again)][-1]
    resumed = stream()
    resumed.set_state(json.loads(json.dumps(state)))
    for batch in first[4:]:
        np.testing.assert_array_equal(next(resumed)["pixel_values"], batch["pixel_values"])
    other = next(stream(seed=1))
    assert not np.array_equal(other["pixel_values"], first[0]["pixel_values"])
    epochs = np.concatenate([batch["pixel_values"] for batch in first])
    assert len(np.unique(epochs.reshape(12, -1), axis=0)) == 12  # another crop in every epoch


def test_images_are_as_in_evaluation_without_augmentation():
    batch = next(stream(data=config()))
    known = {PROCESSOR(Image.fromarray(x)).tobytes(): LABELS[i] for i, x in enumerate(PIXELS)}
    for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
        assert known[pixels.tobytes()] == ("cat", "dog")[label]


def test_a_flip_mirrors_half_of_the_images():
    flipped = config(random_horizontal_flip=True)
    known = [PROCESSOR(Image.fromarray(x)) for x in PIXELS]
    batches = stream(data=flipped)
    found = [x for _ in range(20) for x in next(batches)["pixel_values"]]
    plain = sum(any(np.array_equal(x, y) for y in known) for x in found)
    mirrored = sum(any(np.array_equal(x, y[:, ::-1]) for y in known) for x in found)
    assert plain + mirrored == 40
    assert 10 < mirrored < 30


def test_random_parts_have_the_areas_and_ratios_of_torchvision():
    rng = np.random.default_rng(0)
    boxes = np.asarray([random_box((400, 300), rng) for _ in range(2000)])
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= (400, 300)).all()
    shares = wide * high / 120_000
    assert 0.078 < shares.min() < 0.1
    assert 0.85 < shares.max() <= 1
    assert 0.74 < (wide / high).min() < 0.77
    assert 1.3 < (wide / high).max() < 1.36
    assert random_box((100, 1), rng) == (49, 0, 50, 1)  # no part fits: the middle


def test_a_position_is_not_one_of_other_images():
    changed = [*ROWS[:4], {"image": PIXELS[0], "label": "dog"}]
    state = stream().get_state()
    for other in (stream(changed), stream(data=config())):
        with pytest.raises(InputError, match="another data stream"):
            other.set_state(state)


def test_held_out_images_are_known_by_their_content(folder):
    rows = load_examples(config(folder))
    before = rows_fingerprint(rows)
    (folder / "cat" / "0.png").write_bytes(png(PIXELS[1]))
    assert rows_fingerprint(rows) != before
    large = np.zeros((64, 64), np.uint8)
    large[32, 32] = 1  # where `str` of an array leaves out the values
    one, other = ([{"image": x, "label": "cat"}] for x in (large, np.zeros_like(large)))
    assert rows_fingerprint(one) != rows_fingerprint(other)
