import json
import logging
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loft_jax.data import json_rows as module
from loft_jax.data import row_table
from loft_jax.data.json_rows import read_json_rows
from loft_jax.errors import InputError

KNOWN = frozenset({"messages", "prompt", "completion", "text"})


def table(path):
    return read_json_rows({"train": [path]}, "train", known=KNOWN)


def write(folder, text, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder, text):
    return list(table(write(folder, text)))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9)
    | st.sampled_from(["2021-01-11", "10:30", "1", '{"a": 1}', "null", "\x00\u2028", "\U0001f600"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
rows_of_any = st.lists(
    st.dictionaries(st.sampled_from("abc"), values, min_size=1), min_size=1, max_size=5
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows_of_any,
    st.sampled_from(["lines", "list", "indented", "indented list"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_rows_come_back_as_they_were_written(tmp_path, monkeypatch, rows, layout, ascii_, block):
    monkeypatch.setattr(module, "_BLOCK", block)  # values are cut at every place
    monkeypatch.setattr(row_table, "_BATCH", block)
    indent = 1 if "indented" in layout else None
    if "list" in layout:
        text = json.dumps(rows, ensure_ascii=ascii_, indent=indent)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_, indent=indent) for row in rows)
    fields = {field for row in rows for field in row}
    found = list(read_json_rows({"train": [write(tmp_path, text)]}, "train", known=fields))
    expected = [{field: row.get(field) for field in fields} for row in json.loads(json.dumps(rows))]
    # As text, since 1, 1.0 and True are equal.
    assert [json.dumps(row, sort_keys=True) for row in found] == [
        json.dumps(row, sort_keys=True) for row in expected
    ]


def test_fields_have_the_type_that_all_rows_have(tmp_path):
    rows = [
        {"text": "2021-01-11", "n": 1, "x": 0.5, "yes": True, "mixed": 1, "no": None, "deep": [1]},
        {"text": None, "n": 2, "mixed": "1"},
    ]
    found = table(write(tmp_path, "\n".join(map(json.dumps, rows))))
    assert {name: feature.dtype for name, feature in found.features.items() if name not in
            ("mixed", "deep")} == {
        "text": "string", "n": "int64", "x": "float64", "yes": "bool", "no": "null",
    }  # fmt: skip
    assert found[1] == {
        "text": None, "n": 2, "x": None, "yes": None, "mixed": "1", "no": None, "deep": None,
    }  # fmt: skip


TWO = [{"prompt": "a", "completion": "é"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + LINES,
        "\ufeff" + json.dumps(TWO),
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\r"),
        "\n\n" + LINES.replace("\n", "\n \t\n\n"),
        LINES.rstrip("\n"),
        LINES.replace("\n", ""),
        "  \n" + json.dumps(TWO, indent=1),
        json.dumps({"data": TWO}),
        json.dumps({"version": "1.1", "rows": TWO, "tags": ["x"]}, indent=1),
    ],
)
def test_two_rows_however_they_are_laid_out(tmp_path, text):
    assert read(tmp_path, text) == TWO


def test_list_of_texts(tmp_path):
    assert read(tmp_path, '["one", "2021-01-11"]') == [{"text": "one"}, {"text": "2021-01-11"}]


def test_one_example_is_no_container(tmp_path):
    row = {"messages": [{"role": "user", "content": "hi"}]}
    assert read(tmp_path, json.dumps(row, indent=1)) == [row]


def test_a_list_of_one_object_is_the_rows(tmp_path):
    row = {"any": [{"text": "a"}]}
    assert read(tmp_path, json.dumps([row])) == [row]


def test_a_container_is_told(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert read(tmp_path, json.dumps({"version": 1, "data": TWO})) == TWO
        assert read(tmp_path, json.dumps({"text": "a", "data": TWO})) == [
            {"text": "a", "data": TWO}
        ]
    assert "rows are read from the list in its field 'data'" in caplog.text
    assert "is one row, since it has a field text; the list in 'data' is not" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n{"text": ', "row 1 cannot be read as JSON: Expecting value at character"),
        ('{"text": "a"}\n{"text": "b\n"}', "row 1 .*Invalid control character at character 11"),
        ('{"text": "a"},\n{"text": "b"}', "row 1 .*Expecting value at character 0"),
        ('[{"text": "a"}', "row 1 .*expected a comma or the end of the list"),
        ('[{"text": "a"},]', "row 1 .*Expecting value"),
        ('[{"text": "a"}]\n{}', "row 1 .*expected nothing after the list"),
        ('{"text": "a"}\n3', "row 1 is 3; expected an object"),
        ('[{"text": "a"}, null]', "row 1 is None; expected an object"),
        ('[["a"]]', r"row 0 is \['a'\]; expected an object"),
        ('{"text": "a"}\n{"text": "a", "text": "b"}', "row 1 .* has the field 'text' twice"),
        ('{"text": "a"}\n{"text": "\\ud83d"}', "row 1 .*surrogates not allowed"),
        ('{"text": "a"}\n{"deep": [{"\\ud83d": 1}]}', "row 1 .*surrogates not allowed"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "row 1 .*line 2 is not UTF-8.* 0xe9"),
        ('{"text": "a"}\n'.encode("utf-16"), "row 0 .*line 1 is not UTF-8.* 0xff"),
        ('{"text": "a"}\n{"deep": ' + "[" * 20_000 + "]" * 20_000 + "}", "row 1 .*Recursion"),
        (json.dumps({f"f{i}": 1 for i in range(1001)}), "has more than 1000 fields"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_rows(tmp_path, text, message):
    with pytest.raises(InputError, match=f"rows.jsonl: .*{message}") as raised:
        read(tmp_path, text)
    assert len(str(raised.value)) < 400 + len(str(tmp_path))


def test_a_row_without_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2**10)
    monkeypatch.setattr(module, "_MOST_ROW", 2**14)
    path = write(tmp_path, '{"text": "' + "a" * 2**20)
    found = module._Scanner(path)
    with pytest.raises(ValueError, match="longer than 16384 characters"):
        found.value()
    assert len(found._text) < 2**17
    with pytest.raises(InputError, match=r"rows.jsonl: row 0 .*longer than 16384 characters"):
        table(path)


def test_a_row_of_too_many_values_is_refused(tmp_path, monkeypatch):
    """Each value becomes an object of Python, of many times its size in the file."""
    monkeypatch.setattr(module, "_BLOCK", 2**10)
    monkeypatch.setattr(module, "_MOST_VALUES", 1000)
    few = [{"text": '"a", [\\ ' * 2000}, {"values": [1] * 900}]
    assert read(tmp_path, json.dumps(few))[1]["values"] == [1] * 900
    with pytest.raises(InputError, match=r"row 0 .*: it has more than 1000 values"):
        read(tmp_path, json.dumps([{"values": [1] * 9000}]))


def test_few_rows_are_python_objects_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 2**15)
    monkeypatch.setattr(row_table, "_BATCH", 2**16)
    row = {"messages": [{"role": "user", "content": "word " * 20}] * 10}
    for text in ("\n".join([json.dumps(row)] * 1500), json.dumps([row] * 1500)):
        path = write(tmp_path, text)
        assert path.stat().st_size > 1_500_000
        tracemalloc.start()
        assert len(table(path)) == 1500
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1_500_000
