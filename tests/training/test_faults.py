"""Whole runs that are killed, stopped, or find the disk full, and go on as if nothing had been."""

import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loft_jax.cli import main
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.training.config import MeshConfig
from loft_jax.training.loop import finetune
from tests.training.processes import (
    adapter,
    finish,
    losses,
    output,
    start,
    start_together,
    wait_for_step,
)


def saved_steps(folder):
    return sorted(int(f.name) for f in Path(folder, "checkpoints").iterdir() if f.name.isdigit())


@pytest.mark.slow
def test_killed_again_and_again_is_as_if_never_stopped(make_config, workspace, tmp_path):
    """To the bit, with dropout and packed rows, over ends of epochs, in saves and between them."""
    data = DataConfig(make_config().data.path, max_length=64, packing=True)
    common = {
        "method": "loft",
        "data": data,
        "batch_size": 4,
        "dropout": 0.2,
        "steps": 45,
        "save_every": 1,
    }
    common |= {"eval_path": str(workspace / "test.jsonl"), "eval_every": 5}
    whole = make_config(output=str(tmp_path / "whole"), **common)
    finetune(whole, progress=False)
    config = make_config(output=str(tmp_path / "killed"), **common)
    moment, kills = random.Random(0), 0
    process = start(config)
    while kills < 3:
        wait_for_step(config.output, 10 * (kills + 1), process)
        time.sleep(0.3 * moment.random())
        process.send_signal(signal.SIGKILL)
        finish(process)
        kills += 1
        assert not Path(config.output, "adapter").exists()
        process = start(config, "--resume")
    assert finish(process) == [0], output(process)
    assert losses(config.output) == losses(whole.output)
    expected = adapter(whole.output)
    for name, tensor in adapter(config.output).items():
        np.testing.assert_array_equal(tensor, expected[name], err_msg=name)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_saves_before_the_run_leaves(make_config, number):
    config = make_config(steps=20000, save_every=100000)
    process = start(config)
    wait_for_step(config.output, 3, process)
    with pytest.raises(InputError, match=f"being trained there already, by process {process.pid}"):
        finetune(config, resume=True, progress=False)
    process.send_signal(number)
    assert finish(process) == [130], output(process)
    assert "Traceback" not in output(process)
    assert "checkpoint saved" in output(process)
    assert saved_steps(config.output) == [max(losses(config.output))]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_what_was_saved(make_config, tmp_path):
    """On a file system of its own, in a namespace that ends with the run."""
    mount = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    config = make_config(steps=2000, save_every=1, keep_last=1000)
    folder, kept = Path(config.output), tmp_path / "kept"
    folder.mkdir()
    script = (
        f'mount -t tmpfs -o size=3m tmpfs "{folder}" && "$@"; code=$?;'
        f' cp -r "{folder}" "{kept}"; exit $code'
    )
    process = start(config, before=(*mount, "sh", "-c", script, "sh"))
    assert finish(process) == [2], output(process)
    [told] = [s for s in output(process).splitlines() if s.startswith("loft-jax finetune: ")]
    assert str(folder) in told
    assert "No space left on device" in told
    complete = saved_steps(kept)
    assert complete
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    resumed = make_config(steps=2000, save_every=1000, keep_last=1000)
    process = start(resumed, "--resume")
    wait_for_step(folder, complete[-1] + 5, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) == [130], output(process)
    assert f"resumed at step {complete[-1]} of 2000" in output(process)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_run_is_handed_from_process_to_process(make_config, tmp_path, count):
    """To other meshes too, by a notice of preemption and by a kill; it ends as if undisturbed."""
    # Of a size that rounding does not turn into another sign, as Adam's first steps else are.
    common = {"method": "loft", "eps": 1e-3, "steps": 30, "save_every": 5, "keep_last": 9}
    alone = make_config(output=str(tmp_path / "alone"), **common)
    finetune(alone, progress=False)

    def on(data, fsdp, tensor):
        mesh = MeshConfig(data, fsdp, tensor)
        return make_config(output=str(tmp_path / "together"), mesh=mesh, **common)

    folder = on(1, -1, 1).output
    first = start_together(on(2, count // 2, 2), count)
    wait_for_step(folder, 3, first[0])
    first[-1].send_signal(signal.SIGTERM)
    assert finish(*first) == [130] * count, output(first[0])
    stopped = max(losses(folder))
    assert saved_steps(folder)[-1] == stopped < 30
    assert "checkpoint saved" in output(first[0])
    assert "checkpoint saved" not in output(first[-1])

    two = start_together(on(1, 4, 1), 2, "--resume")
    wait_for_step(folder, stopped + 3, two[0])
    two[1].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    survivor, killed = finish(*two)
    assert time.monotonic() - begin < 60
    assert killed == -signal.SIGKILL
    assert survivor in (3, -signal.SIGABRT)  # the latter where JAX notices first
    if survivor == 3:
        assert "another process" in output(two[0])

    one = start(on(1, 2, 2), "--resume", devices=4)
    assert finish(one) == [0], output(one)
    found, expected = losses(folder), losses(alone.output)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    expected = adapter(alone.output)
    for name, tensor in adapter(folder).items():
        distance = np.linalg.norm(tensor - expected[name]) / np.linalg.norm(expected[name])
        assert distance < 1e-5, name
    # What was saved from a mesh is exported where there is one device.
    exported = tmp_path / "exported"
    assert main(["export", folder, "--output", str(exported)]) == 0
    for name, tensor in adapter(exported).items():
        np.testing.assert_array_equal(tensor, adapter(folder)[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_two_and_four_processes_evaluate_and_export_as_one(make_config, workspace, tmp_path, count):
    common = {
        "method": "loft",
        "eps": 1e-3,
        "target_modules": ("q_proj",),
        "steps": 10,
        "dropout": 0.1,
        "eval_path": str(workspace / "test.jsonl"),
        "choices": (" negative", " positive"),
    }
    alone = make_config(output=str(tmp_path / "alone"), **common)
    result = finetune(alone, progress=False)
    config = make_config(output=str(tmp_path / "together"), **common)
    processes = start_together(config, count)
    assert set(finish(*processes)) == {0}, output(processes[0])
    values = result.after["loss"], result.after["accuracy"]
    assert "after:  loss {:.4f}  accuracy {:.4f}".format(*values) in output(processes[0])
    expected = adapter(alone.output)
    for name, tensor in adapter(config.output).items():
        distance = np.linalg.norm(tensor - expected[name]) / np.linalg.norm(expected[name])
        assert distance < 1e-5, name


def of_other_rows(config, folder):
    lines = Path(config.data.path).read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(reversed(lines)))
    return "--data.path", str(folder / "rows.jsonl")


def of_other_weights(config, folder):
    shutil.copytree(config.model.path, folder / "model")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = 1.01 * tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    return "--model", str(folder / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--learning-rate", "0.5"), r"schedule.learning_rate is 0.01 on process 0 and 0.5 on"),
        (("--eval-every", "3"), r"evaluation.every is 0 on process 0 and 3 on process 1; expected"),
        (("--resume",), r"resume is False on process 0 and True on process 1"),
        (of_other_rows, r"the content of data.path is '\w+' on process 0 and '\w+' on process 1"),
        (of_other_weights, r"the content of model is '\w+' on process 0 and '\w+' on process 1"),
    ],
)
def test_processes_that_are_not_of_one_run_are_refused(make_config, tmp_path, flags, told):
    config = make_config(output=str(tmp_path / "run"), learning_rate=1e-2, steps=3)
    last = flags(config, tmp_path) if callable(flags) else flags
    processes = start_together(config, 2, devices=1, last=last)
    assert finish(*processes) == [2, 2], output(processes[0])
    for process in processes:
        assert re.search(told, output(process)), output(process)
    assert not (tmp_path / "run").exists()
