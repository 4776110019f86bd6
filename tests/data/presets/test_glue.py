"""Presets: files as published and as the hub has them, read by a name and a folder alone."""

import json

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from loft_jax.data import DataConfig, load_examples
from loft_jax.data.presets import PRESETS, find_preset
from loft_jax.errors import InputError
from loft_jax.tasks.registry import TASKS

STSB = ["genre", "filename", "year", "old_index", "source1", "source2"]

# Header (none for CoLA), a row, and a second row, as in the TSV files of GLUE; then the columns of
# `nyu-mll/glue`, and what both are read as.
FORMS = {
    "cola": (
        None,
        ["gj04", "1", "", 'The "cat" sat.'],
        ["bc01", "0", "*", "Cat the sat."],
        ("sentence",),
        [('The "cat" sat.', "acceptable"), ("Cat the sat.", "unacceptable")],
    ),
    "sst2": (
        ["sentence", "label"],
        ['a "joy ', "1"],
        ["dull", "0"],
        ("sentence",),
        [('a "joy ', "positive"), ("dull", "negative")],
    ),
    "mrpc": (
        ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["1", "702876", "702977", '" A , " he said .', '" A . "'],
        ["0", "1", "2", "A .", '"B .'],
        ("sentence1", "sentence2"),
        [('" A , " he said .', '" A . "', "equivalent"), ("A .", '"B .', "not_equivalent")],
    ),
    "stsb": (
        ["index", *STSB, "sentence1", "sentence2", "score"],
        ["0", *STSB, 'A "plane', "An air plane", "5.000"],
        ["1", *STSB, "A man", "A dog", "0.250"],
        ("sentence1", "sentence2"),
        [('A "plane', "An air plane", 5.0), ("A man", "A dog", 0.25)],
    ),
    "qqp": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["133273", "213221", "213222", 'How is the "life"?', "What is life?", "0"],
        ["402555", "536040", "536041", "Why?", "So?", "1"],
        ("question1", "question2"),
        [
            ('How is the "life"?', "What is life?", "not_duplicate"),
            ("Why?", "So?", "duplicate"),
        ],
    ),
    "mnli": (
        ["index", "promptID", "pairID", "genre", "sentence1", "sentence2", "label1", "gold_label"],
        ["0", "31193", "31193n", "slate", 'It "is" so', "It is", "neutral", "entailment"],
        ["1", "1", "1c", "fiction", "No", "Yes", "neutral", "contradiction"],
        ("premise", "hypothesis"),
        [('It "is" so', "It is", "entailment"), ("No", "Yes", "contradiction")],
    ),
    "qnli": (
        ["index", "question", "sentence", "label"],
        ["0", "Who?", 'The "king"', "entailment"],
        ["1", "When?", "There", "not_entailment"],
        ("question", "sentence"),
        [("Who?", 'The "king"', "entailment"), ("When?", "There", "not_entailment")],
    ),
    "rte": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", 'No "weapons', "Weapons.", "not_entailment"],
        ["1", "He left.", "He is gone.", "entailment"],
        ("sentence1", "sentence2"),
        [('No "weapons', "Weapons.", "not_entailment"), ("He left.", "He is gone.", "entailment")],
    ),
    "wnli": (
        ["index", "sentence1", "sentence2", "label"],
        ["0", "I stuck a pin.", "The pin", "1"],
        ["1", "He came.", "She came.", "0"],
        ("sentence1", "sentence2"),
        [("I stuck a pin.", "The pin", "entailment"), ("He came.", "She came.", "not_entailment")],
    ),
}
VALIDATION = {name: "dev_matched" if name == "mnli" else "dev" for name in FORMS}


def write_tsv(file, *lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(line) + "\n" for line in lines if line), "utf-8-sig")


def read(folder, preset, split=None):
    rows = load_examples(DataConfig(str(folder), preset=preset, split=split))
    label = rows.features["label"]
    names = label.int2str if isinstance(label, ClassLabel) else float
    fields = [field for field in ("text", "text_pair") if field in rows.features]
    return [(*(row[field] for field in fields), names(row["label"])) for row in rows]


def hub_rows(preset):
    """The same rows with the columns of the hub, whose labels are numbers."""
    *_, columns, rows = FORMS[preset]
    labels = PRESETS[preset].labels
    return [
        {
            **dict(zip(columns, row, strict=False)),
            "label": labels.index(row[-1]) if labels else row[-1],
            "idx": index,
        }
        for index, row in enumerate(rows)
    ]


def test_every_task_of_glue_has_its_form_here():
    assert [name for name in PRESETS if name in FORMS] == list(FORMS)
    assert all(preset.task in TASKS for preset in PRESETS.values())
    for preset in PRESETS.values():
        assert all(isinstance(name, str) for name in preset.best_metrics)
        assert preset.held_out in preset.files


@pytest.mark.parametrize("preset", FORMS)
def test_files_as_published(tmp_path, preset):
    header, first, second, _, rows = FORMS[preset]
    write_tsv(tmp_path / "train.tsv", header, first, second)
    write_tsv(tmp_path / f"{VALIDATION[preset]}.tsv", header, second)
    (tmp_path / "README.txt").write_text("no data")
    assert read(tmp_path, preset) == rows
    config = DataConfig(str(tmp_path), preset=preset)
    assert read(tmp_path, preset, config.held_out().split) == rows[1:]
    assert read(tmp_path / "train.tsv", preset, "train[1:]") == rows[1:]
    assert read(tmp_path, preset, f"{VALIDATION[preset]}+train") == [*rows[1:], *rows]
    assert DataConfig(str(tmp_path / "train.tsv"), preset=preset).held_out().split is None
    labels = load_examples(config).features["label"]
    assert tuple(getattr(labels, "names", ())) == find_preset(preset).labels


@pytest.mark.parametrize("preset", FORMS)
def test_files_of_the_hub(tmp_path, preset):
    rows = hub_rows(preset)
    held_out = PRESETS[preset].held_out
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / f"{held_out}.jsonl").write_text(lines)
    assert read(tmp_path / "json", preset, held_out) == FORMS[preset][-1]
    (tmp_path / "parquet").mkdir()
    for number in (0, 1):
        file = tmp_path / "parquet" / f"{held_out}-0000{number}-of-00002.parquet"
        Dataset.from_list(rows[number : number + 1]).to_parquet(file)
    assert read(tmp_path / "parquet", preset, held_out) == FORMS[preset][-1]


def test_numbers_are_those_of_the_names_that_the_file_has(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    other = Features({**features, "label": ClassLabel(names=["positive", "negative"])})
    rows = {"sentence": ["a joy"], "label": [0]}
    DatasetDict({"validation": Dataset.from_dict(rows, other)}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", "sst2", "validation") == [("a joy", "positive")]
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"row 0 of train has the label 'good'; expected one of"):
        read(tmp_path, "sst2")


def test_both_validation_splits_of_mnli(tmp_path):
    header, first, second, _, rows = FORMS["mnli"]
    write_tsv(tmp_path / "dev_matched.tsv", header, first)
    write_tsv(tmp_path / "dev_mismatched.tsv", header, second)
    assert read(tmp_path, "mnli", "validation_matched") == rows[:1]
    assert read(tmp_path, "mnli", "validation_mismatched") == rows[1:]


def test_of_two_files_for_validation_the_published_one_is_read_and_each_has_its_name(tmp_path):
    _, first, second, _, rows = FORMS["cola"]
    write_tsv(tmp_path / "val.tsv", first)
    write_tsv(tmp_path / "dev.tsv", second)
    assert read(tmp_path, "cola", "validation") == read(tmp_path, "cola", "dev") == rows[1:]
    assert read(tmp_path, "cola", "val") == rows[:1]


def test_test_sets_of_ones_own_with_labels_are_read_and_those_without_refused(tmp_path):
    header, first, *_ = FORMS["sst2"]
    write_tsv(tmp_path / "test.tsv", header, first)
    assert read(tmp_path, "sst2", "test") == [('a "joy ', "positive")]
    write_tsv(tmp_path / "test.tsv", ["index", "sentence"], ["0", "a joy"])
    with pytest.raises(InputError, match=r"test.tsv: line 2 has no label, as in GLUE's test sets"):
        read(tmp_path, "sst2", "test")
    Dataset.from_dict({"sentence": ["a"], "label": [-1]}).to_parquet(tmp_path / "hub.parquet")
    with pytest.raises(InputError, match="row 0 of train has no label"):
        read(tmp_path / "hub.parquet", "sst2")


def test_lines_of_other_lengths_are_left_out_and_told(tmp_path, caplog):
    header, first, second, _, rows = FORMS["qqp"]
    write_tsv(tmp_path / "train.tsv", header, first, ["42", "half a", "row"], second, [""])
    assert read(tmp_path, "qqp") == rows
    assert "left out 1 of its lines, which do not have the 6 cells of the header" in caplog.text
    assert "the first of them line 3" in caplog.text


@pytest.mark.parametrize(
    ("preset", "files", "message"),
    [
        (
            "rte",
            {"train.tsv": "sentence\tlabel\na\t1\n"},
            "line 2 has the columns",
        ),
        ("sst2", {"train.tsv": "sentence\tlabel\na\t2\n"}, "label '2'; expected one of"),
        ("sst2", {"train.tsv": "sentence\tlabel\na\tgood\n"}, "label 'good'; expected one of"),
        ("stsb", {"train.tsv": "sentence1\tsentence2\tscore\na\tb\tc\n"}, "expected a number"),
        ("sst2", {"dev.tsv": "sentence\tlabel\na\t1\n"}, "no file for the split 'train'; found"),
        (
            "sst2",
            {"train.tsv": "a", "train.csv": "a"},
            "has train.csv, train.tsv; expected one",
        ),
        ("sst2", {"train.tsv": "sentence\tlabel\n"}, "split 'train' has no examples"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, preset, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read(tmp_path, preset)


def test_settings_that_a_preset_has_are_refused():
    with pytest.raises(InputError, match="preset is 'sst', expected one of cola, sst2"):
        DataConfig("SST-2", preset="sst")
    with pytest.raises(InputError, match="text_field is 'sentence', but preset sst2 has columns"):
        DataConfig("SST-2", preset="sst2", text_field="sentence")
