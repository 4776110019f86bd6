"""A grid of runs: which ones it has, how they compare, and how it goes on."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from loft_jax.cli import main
from loft_jax.cli.sweep import Sweep
from loft_jax.errors import InputError, NotFiniteError
from loft_jax.training import sweep
from loft_jax.training.config_io import save_config
from loft_jax.training.metrics import read_metrics
from loft_jax.training.run import Run
from tests.training.conftest import workspace  # noqa: F401


@pytest.fixture
def flags(workspace, tmp_path):  # noqa: F811
    return [
        *("--model", str(workspace / "model"), "--output", str(tmp_path / "sweep")),
        *("--data.path", str(workspace / "train.jsonl"), "--data.max-length", "64"),
        *(
            "--eval-path",
            str(workspace / "test.jsonl"),
            "--eval-every",
            "1",
            "--data.buckets",
            "64",
        ),
        *("--steps", "2", "--batch-size", "4", "--target-modules", "q_proj"),
    ]


def test_a_grid_of_options(flags):
    """Several values of an option of one, and several times an option of several or none."""
    more = ["--rank", "2", "4", "--balance", "--no-balance", "--learning-rate=1e-3", "--alpha", "8"]
    targets = ["--target-modules", "q_proj", "v_proj"]
    folder, runs = Sweep((*flags, *more, *targets)).runs()
    assert len(runs) == 8
    assert len({run.config.output for run in runs}) == 8
    last = runs[-1]
    assert last.settings == {
        "target-modules": "q_proj+v_proj",
        "rank": "4",
        "balance": "no-balance",
    }
    name = "target-modules=q_proj+v_proj,rank=4,balance=no-balance"
    assert last.config.output == str(folder / name)
    assert last.config.lora.target_modules == ("q_proj", "v_proj")
    assert (last.config.lora.rank, last.config.lora.alpha) == (4, 8.0)
    assert [run.config.method.balance for run in runs] == [True, False] * 4


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "no option has several values to compare"),
        (("--lr", "1", "2"), "unknown option --lr, did you mean --learning-rate"),
        (("--rank", "4", "4"), "two runs would be rank=4"),
        (("--rank", "4", "8", "--output", "x"), "--output has several values"),
        (("--rank", "4", "8", "--resume"), "--resume is given, but the same command"),
        (("--rank", "4", "8", "--eval-path="), "compares its runs by held-out examples"),
        (
            ("--rank", "4", "8", "--push-to-hub", "me/x"),
            r"push_to_hub is 'me/x', .*; expected `loft-jax export \.\.\. --push-to-hub me/x`",
        ),
        (("--epochs", "1", "0"), r"schedule\.epochs is 0\.0"),
    ],
)
def test_what_is_no_grid_is_refused(flags, more, told, monkeypatch):
    monkeypatch.setattr(sweep, "finetune", None)  # before any run
    if "--eval-path=" in more:
        place = flags.index("--eval-path")
        flags = flags[:place] + flags[place + 2 :]
        more = more[:-1]
    with pytest.raises(InputError, match=told):
        Sweep((*flags, *more))()


def test_a_sweep_goes_on_and_names_the_best(flags, tmp_path, capsys, monkeypatch):
    """With one rate at which no loss stays finite."""
    grid = ["--method", "lora", "--learning-rate", "1e-3", "3e-2", "1.0"]
    trained = []

    def counted(config, **options):
        trained.append(Path(config.output).name)
        if config.schedule.learning_rate == 1.0:
            raise NotFiniteError("loss or gradient was not finite")
        return finetune(config, **options)

    finetune = sweep.finetune
    monkeypatch.setattr(sweep, "finetune", counted)
    command = ["sweep", *flags, *grid]
    assert main(command) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "sweep"
    rows = {
        name: min(
            row["eval_loss"]
            for row in read_metrics(folder / name / "metrics.jsonl")
            if row["step"] and "eval_loss" in row
        )
        for name in ("learning-rate=1e-3", "learning-rate=3e-2")
    }
    best = min(rows, key=rows.get)
    lines = (folder / "sweep.md").read_text().splitlines()
    assert lines[0] == "| learning-rate | best step | loss |"
    assert lines[2].startswith(f"| {best.partition('=')[2]} | ")
    assert lines[2].endswith(f" | {rows[best]:.4f} |")
    assert lines[-1] == "| 1.0 | not finite |  |"
    assert f"best: {folder / best}, at step " in out
    assert f"plot: {folder / 'sweep.png'}\n" in out
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")

    trained.clear()
    shutil.rmtree(folder / best / "adapter")  # as if it had been killed before
    assert main(command) == 0
    assert trained == [best, "learning-rate=1.0"]
    settings = json.loads((folder / best / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 16
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "cannot resume with another seed" in capsys.readouterr().err


def test_an_extended_run_that_was_stopped_is_not_finished(flags, tmp_path, monkeypatch):
    """Before its first step, or after its last and before its adapter."""
    constant = ("--schedule", "constant", "--warmup-steps", "0")
    grid = [*flags, "--method", "lora", *constant, "--rank", "2", "4"]
    steps = grid.index("--steps") + 1
    short, longer = (
        Sweep((*grid[:steps], count, *grid[steps + 1 :])).runs()[1][0].config for count in "23"
    )
    assert not sweep._is_finished(short)
    sweep.finetune(short, progress=False)
    assert sweep._is_finished(short)
    save_config(longer, Path(longer.output) / "config.yaml")  # as a run that is stopped at once
    assert not sweep._is_finished(longer)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "export", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sweep.finetune(longer, resume=True, progress=False)
    assert not sweep._is_finished(longer)
    sweep.finetune(longer, resume=True, progress=False)
    assert sweep._is_finished(longer)


def test_runs_that_fail_or_have_no_score_come_last(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "sweep").mkdir()
    scores = {"rank=2": None, "rank=4": 1.5}

    class Scored:
        def __init__(self, folder, *, read_only):
            self._score = scores[folder.parent.name]

        def close(self):
            pass

        def best_step(self):
            return self._score and 2

        def run_of(self, step):
            return {"score": self._score, "best_metrics": ["loss"]}

    monkeypatch.setattr(sweep, "Checkpoints", Scored)
    monkeypatch.setattr(sweep, "_is_finished", lambda config: not config.output.endswith("=8"))
    monkeypatch.setattr(sweep, "finetune", Mock(side_effect=InputError("no such file")))
    monkeypatch.setattr(sweep, "read_metrics", lambda file: [{"step": 2, "eval_loss": 1.5}])
    assert main(["sweep", *flags, "--rank", "2", "8", "4"]) == 2
    table = (tmp_path / "sweep" / "sweep.md").read_text().splitlines()
    assert table[2:] == ["| 4 | 2 | 1.5000 |", "| 2 | not finite |  |", "| 8 | failed |  |"]
    shown = capsys.readouterr()
    assert "best: " in shown.out
    assert "1 of 3 runs failed: rank=8: no such file" in shown.err
    assert main(["sweep", *flags, "--rank", "8", "2", "4"]) == 2
    assert capsys.readouterr().err.endswith("loft-jax sweep: no such file\n")
