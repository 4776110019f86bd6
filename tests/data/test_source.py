import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loft_jax.data import DataConfig, load_examples, text_lines
from loft_jax.errors import InputError

ROWS = [{"prompt": "a b", "completion": " c"}, {"prompt": "d", "completion": ' "e", f'}]

pytestmark = pytest.mark.usefixtures("no_network")


def write(path, rows=ROWS):
    table = datasets.Dataset.from_list(rows)
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".csv":
            table.to_csv(path)
        case ".tsv":
            table.to_csv(path, sep="\t")
        case ".parquet":
            table.to_parquet(path)
    return path


def read(path, **options):
    return load_examples(DataConfig(str(path), **options)).to_list()


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_every_format_gives_the_rows_written(tmp_path, ending):
    assert read(write(tmp_path / f"rows.{ending}")) == ROWS


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"id": "1", "conversations": [{"from": "human", "value": "a"}]}, {}),
        ({"instruction": "a", "output": "b", "history": [{"prompt": "c"}]}, {}),
        ({"q": "a", "r": "b", "sources": [{"title": "c"}]}, {"prompt": "{q}", "completion": "{r}"}),
        ({"label": "a", "text_b": "b", "boxes": [{"x": 1}]}, {"text_field": "text_b"}),
    ],
)
def test_a_list_in_the_only_row_is_not_the_rows(tmp_path, ending, row, options):
    assert read(write(tmp_path / f"one.{ending}", [row]), **options) == [row]


def test_text_file_gives_a_row_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo three\n")
    assert read(path) == [{"text": "one"}, {"text": "two three"}]


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\nNA,None\n1,007\n,null\n")
    assert read(path) == [
        {"prompt": "NA", "completion": "None"},
        {"prompt": "1", "completion": "007"},
        {"prompt": "", "completion": "null"},
    ]


def test_glob_characters_in_a_path_are_plain(tmp_path):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    assert read(write(folder / "rows?[a].jsonl")) == ROWS


def test_folder_splits_by_file_name(tmp_path):
    write(tmp_path / "train-0.jsonl", ROWS[:1])
    write(tmp_path / "train-1.jsonl", ROWS[1:])
    write(tmp_path / "test.jsonl", ROWS[1:])
    (tmp_path / "README.md").write_text("what this is")
    (tmp_path / "._train-0.jsonl").write_bytes(b"\x00 of a file browser")
    assert read(tmp_path) == ROWS
    assert read(tmp_path, split="test") == ROWS[1:]
    assert read(tmp_path, split="train[:1]") == ROWS[:1]


def test_saved_dataset_and_saved_splits(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "one", split="train[1:]") == ROWS[1:]
    assert read(tmp_path / "two", split="test") == ROWS[1:]


def test_several_splits_of_every_form_are_one_after_the_other(tmp_path):
    for form in ("jsonl", "csv", "parquet", "saved"):
        (tmp_path / form).mkdir()
        splits = {"train": ROWS[:1], "test": ROWS[1:]}
        if form == "saved":
            tables = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
            datasets.DatasetDict(tables).save_to_disk(str(tmp_path / form))
        else:
            for name, rows in splits.items():
                write(tmp_path / form / f"{name}.{form}", rows)
        for split, found in (
            ("train+test", ROWS),
            ("test+train", [*ROWS[1:], *ROWS[:1]]),
            ("train+test[:0]", ROWS[:1]),
        ):
            assert read(tmp_path / form, split=split) == found, (form, split)
        assert sorted(map(str, read(tmp_path / form, split="all"))) == sorted(map(str, ROWS)), form


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_nothing_is_written_beside_the_data(tmp_path, ending):
    path = write(tmp_path / f"rows.{ending}")
    read(path)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_into_a_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    before = sorted(tmp_path.rglob("*"))
    read(tmp_path / "saved")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    read(path)
    write(path, ROWS[:1])
    assert read(path) == ROWS[:1]


BROKEN = {
    "broken.json": b'[{"prompt": "a", ',
    "broken.jsonl": b'{"prompt": "a"}\n{bad\n',
    "broken.parquet": b"this is not parquet",
    "broken.txt": b"\xff\xfe\x80 not utf-8\n",
    "first.csv": b"prompt,completion\na,b,c,d\n",
    "twice.csv": b"prompt,prompt,completion\na,b,c\n",
    "second.csv": b"prompt,completion\na,b\na,b,c,d\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(InputError, match=rf"{name}: (row \d )?cannot be read as \w+: .+"):
        read(path)


def test_date_like_texts_stay_texts(tmp_path):
    rows = [{"prompt": "When? ", "completion": day} for day in ("2021-01-11", "2021-02-12")]
    assert read(write(tmp_path / "rows.jsonl", rows)) == rows
    assert read(write(tmp_path / "rows.json", rows)) == rows


def test_files_of_a_folder_may_differ_in_their_fields(tmp_path):
    write(tmp_path / "a.jsonl", [{**ROWS[0], "id": 1}])
    write(tmp_path / "b.jsonl", [{**ROWS[1], "id": "x-2", "source": "web"}])
    assert list(load_examples(DataConfig(str(tmp_path)))) == [
        {**ROWS[0], "id": 1, "source": None},
        {**ROWS[1], "id": "x-2", "source": "web"},
    ]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_slices_are_those_of_datasets(tmp_path, ending):
    rows = [{"text": f"row {i}"} for i in range(7)]
    write(tmp_path / f"train.{ending}", rows)
    write(tmp_path / f"test.{ending}", rows[:3])
    splits = {"train": rows, "test": rows[:3]}
    by_hand = {
        "train[:50%]": rows[:4], "train[-2:]": rows[-2:], "test[1:]": rows[1:3],
        "train[5:]+test": rows[5:] + rows[:3], "train": splits["train"],
    }  # fmt: skip
    for split, expected in by_hand.items():
        assert read(tmp_path, split=split) == expected, split
    assert len(read(tmp_path, split="all")) == 10


def test_no_code_of_a_folder_is_run(tmp_path):
    write(tmp_path / "rows.jsonl")
    for name in (f"{tmp_path.name}.py", "rows.py", "__init__.py", "json.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert read(tmp_path) == ROWS
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "txt", "parquet"])
def test_a_pipe_is_not_waited_for(tmp_path, ending):
    os.mkfifo(tmp_path / f"rows.{ending}")
    for path in (tmp_path / f"rows.{ending}", tmp_path):
        with pytest.raises(InputError, match=rf"rows.{ending}: is a pipe or a device"):
            read(path)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_pipe_in_a_saved_dataset_is_not_waited_for(tmp_path, name):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "s"))
    (tmp_path / "s" / "train" / name).unlink()
    os.mkfifo(tmp_path / "s" / "train" / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe or a device"):
        read(tmp_path / "s")


def test_a_saved_dataset_names_only_what_is_in_it(tmp_path):
    for name in ("own", "other"):
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(
            str(tmp_path / name)
        )
    state = tmp_path / "own" / "train" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = "../../other/train/data-00000-of-00001.arrow"
    state.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected one inside the folder"):
        read(tmp_path / "own")
    for split in ("../other/train", "train::http://localhost/x"):
        (tmp_path / "own" / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
        with pytest.raises(InputError, match=r"names the split .*; expected a word"):
            read(tmp_path / "own")


@pytest.mark.parametrize("name", ["e.json", "e.jsonl", "e.csv", "e.txt", "e.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: the file is empty"):
        read(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("e.csv", "prompt,completion\n"), ("e.json", "[]")])
def test_file_without_examples(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}.*(no examples|no data)"):
        read(tmp_path / name)


def test_saved_dataset_without_examples(tmp_path):
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="saved: empty or damaged"):
        read(tmp_path / "saved")


def test_damaged_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(InputError, match=r"saved/data-.*arrow: no such file"):
        read(tmp_path / "saved")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"saved: .*cannot be loaded from disk: .+"):
        read(tmp_path / "saved")


@pytest.mark.parametrize("name", ["missing.jsonl", "sub/folder/missing.csv", "a b", "./nowhere"])
def test_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such file or folder; expected a file ending in"):
        read(name)


def test_unknown_ending(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"rows.xlsx: unknown ending '.xlsx'; expected .*\.jsonl"):
        read(tmp_path / "rows.xlsx")


def test_folder_without_data_and_with_two_formats(tmp_path):
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(InputError, match=r"no data file \(found notes.md\)"):
        read(tmp_path)
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.csv")
    with pytest.raises(InputError, match=r"several formats \(\.csv, \.jsonl\); expected one"):
        read(tmp_path)


def test_a_compressed_file_of_a_folder_is_refused_as_it_is_alone(tmp_path):
    write(tmp_path / "train-0.jsonl")
    (tmp_path / "train-1.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "code.tar.gz").write_bytes(b"no rows")
    for path in (tmp_path, tmp_path / "train-1.jsonl.gz"):
        with pytest.raises(InputError, match=r"train-1.jsonl.gz: is compressed; expected"):
            read(path)


@pytest.mark.parametrize("saved", [False, True])
def test_unknown_split_names_those_there_are(tmp_path, saved):
    path = write(tmp_path / "rows.jsonl")
    if saved:
        path = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    with pytest.raises(InputError, match=r"(?s)test.*train"):
        read(path, split="test")


def test_unreachable_hub(monkeypatch):
    def refuse(path, name):
        assert (path, name) == ("someone/reviews", "small")
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    message = r"someone/reviews: not a file or folder here.* hub: no route to the hub"
    with pytest.raises(InputError, match=message):
        read("someone/reviews", name="small", split="test")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv"])
def test_hub_dataset_is_read_as_its_files_would_be(tmp_path, monkeypatch, ending):
    # A repository of the hub, as `datasets` sees it: a folder whose card names the files.
    rows = [{"prompt": "When? ", "completion": "on 2021-01-11"}, ROWS[1]]
    if ending != "csv":
        rows[0]["completion"] = rows[1]["completion"] = "2021-01-11"
    card = f"configs:\n- config_name: small\n  data_files:\n  - split: test\n    path: a.{ending}\n"
    (tmp_path / "README.md").write_text(f"---\n{card}---\n")
    write(tmp_path / ("a.csv" if ending == "csv" else "a.jsonl"), rows)
    if ending == "jsonl.gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    builder, load = datasets.load_dataset_builder, datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _, name: builder(
        str(tmp_path), name
    ))  # fmt: skip
    monkeypatch.setattr(datasets, "load_dataset", lambda _, name, split: load(
        str(tmp_path), name, split=split
    ))  # fmt: skip
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert read("someone/reviews", name="small", split="test") == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, r"data\.max_length is 0, expected at least 1"),
        ({"max_length": 2**31}, r"data\.max_length is 2147483648, expected at most"),
        ({"max_length": -(10**5000)}, "max_length is <int>"),
        (
            {"buckets": (10**4000, 5), "max_length": 32},
            r"buckets is 1000.{0,99}, expected at most",
        ),
        ({"buckets": (64, 32), "max_length": 32}, "increasing"),
        ({"buckets": (0, 64), "max_length": 32}, "positive"),
        ({"buckets": (16, 32), "max_length": 64}, "below max_length 64"),
    ],
)
def test_config_out_of_range(options, message):
    with pytest.raises(InputError, match=message):
        DataConfig("rows.jsonl", **options)


def test_texts_of_parquet_that_are_no_utf8_are_refused_when_they_are_read(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a dull film"] * 3}), file, compression="none")
    file.write_bytes(file.read_bytes().replace(b"a dull", b"a \xf1ull"))
    with pytest.raises(InputError, match=r"rows\.parquet: cannot be read as parquet: row 0: "):
        load_examples(DataConfig(str(file)))


FEATURES = [
    datasets.Image(), datasets.Audio(), datasets.Video(), datasets.Pdf(),
    {"in": datasets.Image()}, datasets.List(datasets.Audio()),
]  # fmt: skip


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("feature", FEATURES, ids=str)
def test_what_columns_name_is_not_opened(tmp_path, caplog, saved, feature):
    os.mkfifo(tmp_path / "pipe")
    kept = {
        "text": datasets.Value("string"),
        "tags": datasets.List({"kind": datasets.ClassLabel(names=["a", "b"])}),
    }
    stored = datasets.Features({**kept, "file": feature})
    value = {"bytes": None, "path": str(tmp_path / "pipe")}
    value = {"in": value} if isinstance(feature, dict) else value
    value = [value] if isinstance(feature, datasets.List) else value
    row = {"text": "a joy", "tags": [{"kind": 1}]}
    table = pa.Table.from_pylist([{**row, "file": value}], schema=stored.arrow_schema)
    path = tmp_path / "rows.parquet"
    if saved:
        path = tmp_path / "saved"
        datasets.Dataset(table.replace_schema_metadata()).save_to_disk(str(path))
        info = path / "dataset_info.json"
        content = json.loads(info.read_text())
        info.write_text(json.dumps({**content, "features": stored.to_dict()}))
    else:
        pq.write_table(table, path)
    assert read(path) == [row]
    assert "the columns ['file'] hold no plain values" in caplog.text


def test_rows_of_a_saved_dataset_are_handed_out_plain(tmp_path):
    datasets.Dataset.from_list(ROWS).with_format("arrow").save_to_disk(str(tmp_path / "saved"))
    assert load_examples(DataConfig(str(tmp_path / "saved")))[0] == ROWS[0]


def test_a_folder_has_no_links_that_leave_it(tmp_path):
    write(tmp_path / "outside.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(InputError, match=r"data: names the file 'train.jsonl', expected one insid"):
        read(tmp_path / "data")
    assert read(tmp_path / "data" / "train.jsonl") == ROWS


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.txt", "one\n" + "x" * 101, "line 2"),
        ("a.csv", "text\n" + "x" * 101, "line 2"),
        ("a.tsv", "x" * 101, "line 1"),
        ("a.csv", 'text\nb\n"' + "x\n" * 60, "the row at line 52"),
    ],
)
def test_lines_that_do_not_end_are_refused(tmp_path, monkeypatch, name, text, found):
    monkeypatch.setattr(text_lines, "MOST_CHARACTERS", 100)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: {found} is longer than 100 characters"):
        read(tmp_path / name)
    (tmp_path / name).write_text("text\n" + f"{'x' * 90}\n" * 9)
    assert len(read(tmp_path / name)) >= 9


def test_long_cells_are_read(tmp_path):
    rows = [{"prompt": "a" * 200_000, "completion": "\n".join(["b"] * 90_000)}]
    assert read(write(tmp_path / "rows.csv", rows)) == rows


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_files_may_differ_in_their_columns(tmp_path, ending):
    write(tmp_path / f"a.{ending}", ROWS)
    write(tmp_path / f"b.{ending}", [{"completion": "d", "prompt": "c"}])
    write(tmp_path / f"c.{ending}", [{"prompt": "e", "source": "web"}])
    rows = read(tmp_path)
    assert rows[2:] == [
        {"prompt": "c", "completion": "d", "source": None},
        {"prompt": "e", "completion": None, "source": "web"},
    ]
    assert read(tmp_path, split="train[:2]+train[3:]") == [*rows[:2], rows[3]]


def test_columns_of_files_without_a_header_are_named(tmp_path):
    (tmp_path / "a.csv").write_text('good,"a, b"\n\n2024-01-02,007\nshort\n')
    rows = read(tmp_path / "a.csv", columns=("label", "text"))
    assert rows == [
        {"label": "good", "text": "a, b"},
        {"label": "2024-01-02", "text": "007"},
        {"label": "short", "text": None},
    ]
    with pytest.raises(InputError, match=r"row 0 cannot be .* has 2 cells; .* columns \['text'\]"):
        read(tmp_path / "a.csv", columns=("text",))
    with pytest.raises(InputError, match="expected columns for CSV and TSV alone"):
        read(write(tmp_path / "a.jsonl"), columns=("text",))


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.csv", 'a, b\nc," d\ne, f\ng, h\n', "line 3 .*: it has a quote that is never closed"),
        ("a.csv", 'a,"b\n\nc"\n\nd,"', "line 6 .*: it has a quote that is never closed"),
        ("a.tsv", 'a\tb\n"c" d\te', "line 3 .*: at line 3, text follows .* expected '.t' or"),
        ("a.csv", 'a,"b\nc","d\ne" f\n', "line 2 .*: at line 4, text follows .* expected ',' or"),
    ],
)
def test_quotes_that_are_not_closed_or_not_doubled_are_refused(tmp_path, name, text, found):
    header = "prompt\tcompletion\n" if name == "a.tsv" else "prompt,completion\n"
    (tmp_path / name).write_text(header + text)
    with pytest.raises(InputError, match=f"{name}: the row at {found}"):
        read(tmp_path / name)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quotes_within_cells_are_read(tmp_path, name, separator, end):
    lines = ["text,label", '"say ""a""","b', "", 'c"', '5" long, "d"', 'it"s,""', 'e,"f"']
    text = end.join(lines).replace(",", separator)
    (tmp_path / name).write_bytes(text.encode())
    rows = [('say "a"', f"b{end}{end}c"), ('5" long', ' "d"'), ('it"s', ""), ("e", "f")]
    assert read(tmp_path / name) == [{"text": text, "label": label} for text, label in rows]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("a.csv", "line 4001"),
        ("a.tsv", "line 4001"),
        ("a.txt", "line 4001"),
        ("a.jsonl", "row 3999"),
    ],
)
def test_what_is_not_utf8_is_refused_with_file_and_row(tmp_path, name, place):
    row = '{"text": "good"}' if name == "a.jsonl" else "good"
    lines = [*["text"] * (name != "a.jsonl"), *[row] * 3999, row.replace("good", "caf\xe9")]
    (tmp_path / name).write_text("\n".join(lines), encoding="latin-1")
    with pytest.raises(InputError, match=rf"{name}: .*{place} .*byte 0xe9"):
        read(tmp_path / name)


@pytest.mark.parametrize("path", ["~nosuchuser/x.jsonl", "x" * 30_000, "a\0.jsonl"])
def test_path_that_cannot_be_looked_for(path):
    with pytest.raises(InputError, match=r"cannot be looked for|no such file") as raised:
        read(path)
    assert len(str(raised.value)) < 1000
