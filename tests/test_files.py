"""Files of strangers, and files that are replaced whole."""

import os
import subprocess
import sys
import threading

import pytest

from loft_jax.errors import InputError, cut, explained, reason, shown
from loft_jax.files import inside, locked, new_folder, read_json, regular_file, replacing

CHILD = """
import os, signal, sys
from pathlib import Path
from loft_jax.files import new_folder, replacing
with {how}(Path(sys.argv[1])) as partial:
    (partial / "part" if partial.is_dir() else partial).write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer():
    """Starts a process that is writing something, and ends it by a kill."""
    started = []

    def start(how, path):
        code = CHILD.format(how=how)
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(child)
        assert child.stdout.readline() == b"ready\n"
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


@pytest.mark.parametrize("how", [replacing, new_folder])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, writer, how):
    path = tmp_path / "out"
    child = writer(how.__name__, path)
    child.kill()
    child.wait()
    assert [entry.name for entry in tmp_path.iterdir()] != []
    with how(path) as partial:
        assert list(tmp_path.iterdir()) == [partial]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", [replacing, new_folder])
def test_what_a_living_writer_writes_stays(tmp_path, writer, how):
    path = tmp_path / "out"
    child = writer(how.__name__, path)
    (other,) = tmp_path.iterdir()
    with how(path):
        assert other.exists()
    child.communicate(b"")
    assert other.exists() is False


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as partial:
        partial.write_text("half \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_lock_is_held_against_others_only_while_it_is_held(tmp_path):
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_what_may_never_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "link", "zero"):
        with pytest.raises(InputError, match=f"{name}: is a pipe or a device, expected JSON"):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "a\0b")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2048\n")
    with pytest.raises(InputError, match="is a Git LFS pointer, expected safetensors"):
        regular_file(file, "safetensors")


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "{", "[" * 100_000, '{"a": ' * 50_000, "{'a': 1}", '{"a": "\ud800"}', "NaN"],
)
def test_what_is_no_json_object_is_refused(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_text(text, errors="surrogatepass")
    with pytest.raises(InputError, match=r"c\.json: ") as raised:
        read_json(file)
    assert len(str(raised.value)) < 600


def test_a_long_file_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "c.json"
    with file.open("wb") as handle:
        handle.truncate(2**40)  # of holes
    with pytest.raises(InputError, match=r"has 1,024\.0 GiB, expected JSON of at most \d+\.0 MiB"):
        read_json(file)


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/passwd", "out", "over/a"])
def test_names_that_leave_a_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "a").write_text("secret")
    (folder / "out").symlink_to("../a")
    (folder / "over").symlink_to("..")
    with pytest.raises(InputError, match="expected one inside the folder"):
        inside(folder, name)


def test_links_of_a_folder_and_of_the_hub_s_cache_are_followed(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    assert read_json(inside(snapshot, "config.json")) == {}
    (snapshot / "other.json").symlink_to("config.json")
    assert read_json(inside(snapshot, "other.json")) == {}
    (tmp_path / "here").symlink_to(snapshot)
    assert read_json(inside(tmp_path / "here", "config.json")) == {}


def test_whatever_a_library_raises_is_one_line():
    class PanicException(BaseException):
        pass

    for error in (
        RecursionError("deep"),
        Exception("bare\nmore"),
        OverflowError(),
        KeyError("k"),
        PanicException("called unwrap"),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ):
        with (
            pytest.raises(InputError, match=r"^file: no tokenizer: ") as raised,
            explained("file: no tokenizer"),
        ):
            raise error
        assert "\n" not in str(raised.value)
        assert raised.value.__cause__ is error
    with pytest.raises(KeyboardInterrupt), explained("x"):
        raise KeyboardInterrupt


def test_messages_repeat_little_of_what_they_are_about():
    deep = []
    for _ in range(50):
        deep = [deep, deep]  # 2^50 lists, were they written out
    done = []
    thread = threading.Thread(target=lambda: done.append(shown(deep)), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert len(done[0]) <= 200
    assert len(shown(10**6000)) <= 200
    assert len(shown({"a" * 10**6: "b" * 10**6})) <= 200
    assert len(reason(ValueError("x" * 10**6))) <= 200


def test_messages_hold_no_commands_for_a_terminal():
    said = cut("\x1b]0;pwned\x07\x1b[2J\u202e\nend")
    assert said == r"\x1b]0;pwned\x07\x1b[2J\u202e\nend"
    assert "\x1b" not in reason(ValueError("\x1b[2J"))


def test_a_file_of_very_many_values_is_refused_before_it_is_parsed(tmp_path):
    file = tmp_path / "c.json"
    file.write_text('{"a": [' + "[]," * 2**21 + "[]]}")
    with pytest.raises(InputError, match="has more than 4194304 values"):
        read_json(file)
