import pytest

from loft_jax.training.metrics import MetricsLog, read_metrics
from loft_jax.training.plot import plot_losses


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
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_new_log_forgets_all(tmp_path):
    first = MetricsLog(tmp_path)
    first.write(0, train_loss=1.0)
    first.close()
    MetricsLog(tmp_path).close()
    assert read_metrics(first.path) == []


@pytest.mark.parametrize("damage", [b"3\n", b"{}\n", b"[\n", b"\xff\xfe\n"])
def test_rows_end_where_the_file_is_damaged(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_plot(tmp_path):
    rows = [{"step": 0, "eval_loss": 2.0}, {"step": 1, "train_loss": 1.0}]
    assert plot_losses(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [f.name for f in tmp_path.iterdir()] == ["loss.png"]
