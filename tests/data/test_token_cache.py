import logging
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pytest

from loft_jax.data import DataConfig, encode, token_cache, tokenize
from loft_jax.files import cache_folder
from loft_jax.tasks.classification import Classification
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

ROWS = [{"prompt": "Q?", "completion": "A"}, {"prompt": "Q?", "completion": ""}]
DATA = DataConfig("rows")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(token_cache, "_WORTHWHILE", 0.0)
    return tmp_path / "loft_jax" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """The numbers of rows that were tokenized, and not read from the cache."""
    numbers, make = [], encode._tokenized

    def counted(rows, *others):
        numbers.append(len(rows))
        return make(rows, *others)

    monkeypatch.setattr(encode, "_tokenized", counted)
    return numbers


def test_a_user_without_a_home_has_no_cache(made, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", Mock(side_effect=RuntimeError))
    for _ in range(2):
        assert len(tokenize(ROWS, tiny_tokenizer(), DATA)) == 1
    assert made == [2, 2]
    assert cache_folder("programs") is None


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_the_same_content_is_tokenized_once_and_told_as_before(folder, made, caplog, kind):
    with caplog.at_level(logging.INFO):
        first = tokenize(kind(ROWS), tiny_tokenizer(), DATA)
        told = [record.message for record in caplog.records if "kept in" not in record.message]
        caplog.clear()
        again = tokenize(kind(ROWS), tiny_tokenizer(), DataConfig("elsewhere", packing=True))
    assert made == [2]
    for name in ("tokens", "loss_mask", "offsets"):
        one, other = getattr(first, name), getattr(again, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert first.pad_id == again.pad_id
    *repeated, found = [record.message for record in caplog.records]
    assert repeated == told
    assert any("left out 1 of 2" in message for message in told)
    assert found.startswith(f"tokens of 2 rows are read from {folder}")


def test_other_content_is_tokenized_anew(folder, made):
    other = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("<|end|>", "<|end|>!"))
    added = tiny_tokenizer()
    added.add_tokens(["<|tool|>"])
    split = tiny_tokenizer()
    split.split_special_tokens = True
    for rows, tokenizer, data in (
        (ROWS, tiny_tokenizer(), DATA),
        (ROWS[::-1], tiny_tokenizer(), DATA),
        (ROWS, tiny_tokenizer(bos=False), DATA),
        (ROWS, other, DATA),
        (ROWS, added, DATA),
        (ROWS, split, DATA),
        (ROWS, tiny_tokenizer(), DataConfig("rows", max_length=3)),
        (ROWS, tiny_tokenizer(), DataConfig("rows", chat=True)),
        (datasets.Dataset.from_list(ROWS), tiny_tokenizer(), DATA),
        (datasets.Dataset.from_list(ROWS).select([1, 0]), tiny_tokenizer(), DATA),
    ):
        tokenize(rows, tokenizer, data)
    assert len(made) == len(list(folder.iterdir())) == 10


def test_damaged_files_and_folders_that_cannot_be_written_do_no_harm(folder, made, caplog):
    expected = tokenize(ROWS, tiny_tokenizer(), DATA).tokens.tolist()
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert tokenize(ROWS, tiny_tokenizer(), DATA).tokens.tolist() == expected
    assert "cannot be read" in caplog.text
    file.unlink()
    folder.rmdir()
    folder.write_text("")
    assert tokenize(ROWS, tiny_tokenizer(), DATA).tokens.tolist() == expected
    assert "tokens are not kept there" in caplog.text
    assert made == [2, 2, 2]


def test_what_is_tokenized_at_once_is_not_kept_and_old_files_are_removed(folder, monkeypatch):
    monkeypatch.setattr(token_cache, "_WORTHWHILE", 60.0)
    tokenize(ROWS, tiny_tokenizer(), DATA)
    assert not folder.exists()
    monkeypatch.setattr(token_cache, "_WORTHWHILE", 0.0)
    tokenize(ROWS, tiny_tokenizer(), DATA)
    monkeypatch.setattr(token_cache, "_DAYS", -1)
    tokenize(ROWS[:1], tiny_tokenizer(), DATA)
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_labels_are_those_of_the_task_whatever_is_kept(folder, kind):
    class Turned(Classification):
        def label(self, value, where):
            return 1 - super().label(value, where)

    rows = kind([{"text": text, "label": label} for text, label in (("a", "x"), ("b", "y"))])
    for task, labels, expected in (
        (Classification, ["x", "y"], [0, 1]),
        (Classification, ["y", "x"], [1, 0]),
        (Turned, ["x", "y"], [1, 0]),
    ):
        found = task(labels).tokenize(rows, tiny_tokenizer(), DATA).labelled
        assert found.labels.tolist() == expected
        assert (found.labels.dtype, found.token_types.dtype) == (np.int32, np.int32)
    assert len(list(folder.iterdir())) == 1
