import contextlib
import json
import os
import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from loft_jax.errors import InputError
from loft_jax.training.metrics import MetricsLog, check_wandb, read_metrics


def test_a_resumed_log_forgets_what_is_done_again(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.write(step, train_loss=float(step))
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 5, "train_l')  # cut off by a kill
    resumed = MetricsLog(tmp_path, resumed_at=2)
    resumed.write(3, train_loss=33.0)
    resumed.close()
    assert [(row["step"], row["train_loss"]) for row in read_metrics(log.path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 33.0),
    ]
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) >= 1


def test_a_new_log_forgets_all(tmp_path):
    first = MetricsLog(tmp_path)
    first.write(0, train_loss=1.0)
    first.close()
    MetricsLog(tmp_path).close()
    assert read_metrics(first.path) == []


@pytest.mark.parametrize(
    "damage",
    [
        b"3\n",
        b"{}\n",
        b"[\n",
        b"\xff\xfe\n",
        b'{"step": true}\n',
        b'{"step": 2, "train_loss": "low"}\n',
        b'{"step": 2, "train_loss": NaN}\n',
        b'{"step": 2, "train_loss": 1' + b"0" * 400 + b"}\n",
        b'{"step": 1' + b"0" * 5000 + b"}\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=range(10),
)
def test_rows_end_where_the_file_is_damaged(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_metrics_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match="is a pipe or a device, expected the metrics of a run"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tags_of_tensorboard_are_in_groups(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(3, train_loss=2.0, eval_accuracy=0.5, grad_norm=1.0, host_bytes=8.0, mfu=0.1)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    events = [Event.FromString(bytes(record)) for record in records(file.read_bytes())]
    assert {(event.step, value.tag) for event in events for value in event.summary.value} == {
        (3, tag)
        for tag in (
            *("train/loss", "eval/accuracy", "optimizer/grad_norm", "memory/host_bytes"),
            "speed/mfu",
        )
    }


def records(data):
    """The records of a file of TensorBoard: a length, its checksum, the record, its checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_what_is_no_number_stays_out(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, train_loss=float("nan"), grad_norm=float("inf"), skipped_steps=1)
    log.close()
    assert json.loads(log.path.read_text()) == {"step": 1, "skipped_steps": 1}


class Recorded:
    """What Weights & Biases would be told."""

    def __init__(self):
        self.runs, self.rows, self.axes, self.finished = [], [], [], 0

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def init(self, **settings):
        self.runs.append(settings)
        return self

    def log(self, values):
        self.rows.append(values)

    def finish(self):
        self.finished += 1


def test_weights_and_biases_is_told_the_same(tmp_path, monkeypatch):
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", recorded)
    (tmp_path / "run").mkdir()
    for resumed_at in (None, 1, None):
        log = MetricsLog(tmp_path / "run", resumed_at=resumed_at, wandb="project")
        log.write(1 if resumed_at is None else 2, train_loss=2.0, grad_norm=float("nan"))
        log.close()
    assert recorded.rows == [{"step": step, "train_loss": 2.0} for step in (1, 2, 1)]
    first, resumed, another = recorded.runs
    assert first == resumed
    assert (first["project"], first["name"], first["resume"]) == ("project", "run", "allow")
    assert another["id"] != first["id"]
    assert recorded.axes == [("*", "step")] * 3
    assert recorded.finished == 3


def test_without_wandb_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'loft-jax\[wandb\]'"):
        check_wandb("project")
    check_wandb("")


def test_a_log_that_cannot_be_written_names_the_folder(tmp_path):
    log = MetricsLog(tmp_path)
    log._file.close()
    with Path("/dev/full").open("w") as log._file:
        told = f"{tmp_path}: cannot write metrics: .*No space left"
        with pytest.raises(InputError, match=told):
            log.write(1, train_loss=1.0)
        with contextlib.suppress(OSError):  # what is buffered is tried again
            log._file.close()


def test_a_link_in_place_of_the_name_of_a_run_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Recorded())
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb_id").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="wandb_id: is a link"):
        MetricsLog(tmp_path / "run", resumed_at=1, wandb="project")
    MetricsLog(tmp_path / "run", wandb="project").close()
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "run" / "wandb_id").is_file()
