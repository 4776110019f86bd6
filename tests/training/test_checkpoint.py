import contextlib
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loft_jax import loft
from loft_jax.errors import InputError
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.step import TrainState


def state_at(step):
    rng = np.random.default_rng(step)
    params = {
        "q": {
            "lora_a": jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
            "lora_b": jnp.asarray(rng.normal(size=(2, 6)), jnp.float32),
        },
        "norm": jnp.asarray(rng.normal(size=3), jnp.float32),
    }
    opt_state = jax.tree.map(lambda x: x + step, loft(0.1).init(params))
    return TrainState(jnp.asarray(step, jnp.int32), jnp.zeros(2, jnp.int32), params, opt_state, {})


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_best=1)
    yield opened
    opened.close()


def opened_again(checkpoints, **options):
    """Opens the folder as a resumed run does."""
    checkpoints.wait()
    return contextlib.closing(Checkpoints(checkpoints.folder, keep_best=1, **options))


def assert_same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


def largest_file(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_round_trip(checkpoints):
    checkpoints.save(state_at(3), {"data": {"next_index": 7}}, None)
    state, run = checkpoints.restore_newest(jax.eval_shape(lambda: state_at(0)))
    assert_same(state, state_at(3))
    assert run["data"] == {"next_index": 7}


def test_keys_that_are_numbers_are_texts_once_they_are_read(checkpoints):
    checkpoints.save(state_at(3), {"seen": {10: 1, 9: {2: 3}}}, None)
    checkpoints.wait()
    assert checkpoints.run_of(3)["seen"] == {"10": 1, "9": {"2": 3}}


def test_an_evaluation_after_the_save_counts(checkpoints):
    for step, loss in ((1, None), (2, 3.0)):
        checkpoints.save(state_at(step), {"postponed": loss is None}, loss)
    checkpoints.save(state_at(1), {"postponed": False}, 2.0)
    assert checkpoints.best_step() == 1
    assert checkpoints.run_of(1)["postponed"] is False
    assert_same(checkpoints.restore_params(1, state_at(0).params), state_at(1).params)
    with opened_again(checkpoints, keep_last=1) as again:
        for step in (3, 4):
            again.save(state_at(step), {}, None)
        assert again.steps() == [4, 1]


def test_keeps_the_newest_and_the_best(checkpoints):
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None), (6, None)):
        checkpoints.save(state_at(step), {}, loss)
    assert checkpoints.steps() == [6, 5, 2]
    assert checkpoints.best_step() == 2


def test_parameters_are_read_without_what_training_alone_needs(checkpoints):
    checkpoints.save(state_at(3), {}, None)
    checkpoints.wait()
    shutil.rmtree(checkpoints.folder / "3" / "optimizer")
    assert_same(checkpoints.restore_params(3, state_at(0).params), state_at(3).params)


@pytest.mark.parametrize(
    ("damage", "item"),
    [
        ("truncate", "params"),
        ("flip", "optimizer"),
        ("delete", "params"),
        ("metadata", "optimizer"),
        pytest.param("truncate", "optimizer", marks=pytest.mark.slow),
        pytest.param("flip", "params", marks=pytest.mark.slow),
        pytest.param("delete", "optimizer", marks=pytest.mark.slow),
        pytest.param("metadata", "params", marks=pytest.mark.slow),
    ],
)
def test_falls_back_from_a_damaged_checkpoint(checkpoints, damage, item, caplog):
    for step in (1, 2):
        checkpoints.save(state_at(step), {"data": step}, None)
    checkpoints.wait()
    folder = checkpoints.folder / "2" / item
    victim = largest_file(folder / "d")  # of the arrays
    content = victim.read_bytes()
    if damage == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "delete":
        victim.unlink()
    else:
        (folder / "_METADATA").write_text("{")
    state, run = checkpoints.restore_newest(state_at(0))
    assert_same(state, state_at(1))
    assert run["data"] == 1
    assert "falling back" in caplog.text
    assert str(checkpoints.folder / "2") in caplog.text
    assert checkpoints.steps() == [1]
    assert (checkpoints.folder / "2-damaged" / "run").is_dir()  # put aside, not thrown away


def kinds_of_files(checkpoints, step):
    """Of each folder of a checkpoint one, and all that Orbax opens by name."""
    files = [f for f in (checkpoints.folder / str(step)).rglob("*") if f.is_file()]
    return sorted({f.parent if f.parent.name == "d" else f: f for f in files}.values())


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_of_a_checkpoint_is_never_opened(tmp_path, checkpoints, kind, caplog):
    for step in (1, 2):
        checkpoints.save(state_at(step), {}, float(step))
    checkpoints.wait()
    files = [f.relative_to(checkpoints.folder) for f in kinds_of_files(checkpoints, 2)]
    assert {"_CHECKPOINT_METADATA", "metrics", "manifest.ocdbt"} <= {f.name for f in files}
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(checkpoints.folder, folder)
        (folder / file).unlink()
        if kind == "pipe":
            os.mkfifo(folder / file)
        else:
            (folder / file).symlink_to(checkpoints.folder / file)
        with pytest.raises(InputError, match=f"{folder / file}: is a {kind}"):
            Checkpoints(folder, read_only=True)
        again = Checkpoints(folder, keep_last=2)
        assert f"{folder / file}: is a {kind}" in caplog.text
        assert again.steps() == [1]
        again.close()
        assert (folder / "2-damaged").is_dir()


def test_a_pipe_that_came_later_is_not_opened_and_the_only_checkpoint_stays(checkpoints):
    checkpoints.save(state_at(1), {}, None)
    checkpoints.wait()
    victim = checkpoints.folder / "1" / "optimizer" / "manifest.ocdbt"
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(InputError, match="is a pipe or a device"):
        checkpoints.restore(1, state_at(0))
    with pytest.raises(InputError, match="is a pipe or a device"):
        Checkpoints(checkpoints.folder)
    assert victim.exists()


def test_what_a_link_leads_to_is_left_alone(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "seen-by-all").symlink_to(tmp_path / "made")
    Checkpoints(tmp_path / "checkpoints").close()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_an_unfinished_checkpoint_is_not_one(tmp_path, checkpoints, read_only):
    """It is removed, unless the one who looks only reads: a run may be writing it."""
    checkpoints.save(state_at(1), {}, None)
    checkpoints.wait()
    unfinished = checkpoints.folder / "2.orbax-checkpoint-tmp"
    (unfinished / "metrics").mkdir(parents=True)
    (unfinished / "metrics" / "metrics").write_text("{")
    (unfinished / "x").write_text("half")
    again = Checkpoints(checkpoints.folder, keep_last=2, read_only=read_only)
    assert again.steps() == [1]
    assert_same(again.restore(1, state_at(0))[0], state_at(1))
    again.close()
    assert unfinished.exists() == read_only


def test_the_end_of_another_process_is_no_fault_of_the_disk(checkpoints, monkeypatch):
    def gone(self):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    with monkeypatch.context() as other:
        other.setattr(ocp.CheckpointManager, "wait_until_finished", gone)
        with pytest.raises(ValueError, match=r"^UNKNOWN: Gloo"):
            checkpoints.wait()


def test_a_missing_folder_is_not_made_to_read_it(tmp_path):
    with pytest.raises(InputError, match="cannot hold checkpoints"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_the_best_of_those_that_can_be_read(checkpoints):
    for step, loss in ((1, 1.0), (2, 2.0)):
        checkpoints.save(state_at(step), {}, loss)
    checkpoints.wait()
    for file in (checkpoints.folder / "1" / "run").rglob("*"):
        if file.is_file():
            file.write_text("{")
    assert checkpoints.best_step() == 2


def test_nothing_to_restore(checkpoints):
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        checkpoints.restore_newest(state_at(0))


def test_a_state_of_another_shape(checkpoints):
    checkpoints.save(state_at(1), {}, None)
    checkpoints.wait()
    other = state_at(0)._replace(params={"w": jnp.zeros(3)})
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.restore(1, other)
    with pytest.raises(InputError, match=r"no checkpoint .*: none of those of steps \[1\]"):
        checkpoints.restore_newest(other)
    assert checkpoints.steps() == [1]  # nothing is thrown away for it


@pytest.mark.parametrize("path", ["file", "file/checkpoints"])
def test_a_folder_that_cannot_be_made(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot hold checkpoints"):
        Checkpoints(tmp_path / path)


@pytest.mark.parametrize(
    "places", [(1 / 2,), pytest.param((0, 1 / 3, 1), marks=pytest.mark.slow)], ids=["one", "more"]
)
def test_a_flipped_bit_in_any_file_is_noticed_or_harmless(checkpoints, places):
    checkpoints.save(state_at(1), {"data": {"next_index": 7}}, None)
    checkpoints.wait()
    folder, noticed = checkpoints.folder / "1", []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        content = file.read_bytes()
        for place in sorted({int(place * (len(content) - 1)) for place in places}):
            damaged = bytearray(content)
            damaged[place] ^= 4
            file.write_bytes(damaged)
            try:
                state, run = checkpoints.restore(1, state_at(0))
            except InputError:
                noticed.append(file.relative_to(folder).parts[0])
            else:
                assert_same(state, state_at(1))
                assert run["data"] == {"next_index": 7}
            file.write_bytes(content)
    assert {"params", "optimizer", "run"} <= set(noticed)


@pytest.mark.parametrize(
    "damage",
    [
        *(None, b"{", b'{"score": 9.0}'),
        *(pytest.param(damage, marks=pytest.mark.slow) for damage in (b"", b"\xff")),
    ],
)
def test_the_best_stay_over_a_resume_whatever_befell_their_scores(tmp_path, damage, caplog):
    first = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step, loss in ((1, 1.0), (2, 2.0), (3, None)):
        first.save(state_at(step), {}, loss)
    first.wait()
    first.close()
    file = tmp_path / "1" / "metrics" / "metrics"
    if damage is not None:
        file.write_bytes(damage)
    second = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    second.save(state_at(4), {}, 3.0)
    assert second.steps() == [4, 1]
    second.close()
    assert ("the score of its evaluation is 1.0" in caplog.text) == (damage is not None)


def test_a_score_of_zero_is_known(tmp_path, caplog):
    first = Checkpoints(tmp_path)
    first.save(state_at(1), {}, 0.0)
    first.wait()
    first.close()
    (tmp_path / "1" / "metrics" / "metrics").write_text("{")
    Checkpoints(tmp_path).close()
    assert "the score of its evaluation is 0.0" in caplog.text
