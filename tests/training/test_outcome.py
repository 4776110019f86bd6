import numpy as np
import pytest

from loft_jax.training.metrics import rise_of_loss

INF = float("inf")


def rows_of(losses, before=None, after=None):
    """As they are in `metrics.jsonl`, which leaves out what is not finite."""
    trained = [
        {"step": i + 1, "learning_rate": 0.1, **({"train_loss": x} if x < INF else {})}
        for i, x in enumerate(losses)
    ]
    held_out = [
        [] if x is None else [{"step": step, **({"eval_loss": x} if x < INF else {})}]
        for step, x in ((0, before), (len(losses), after))
    ]
    return [*held_out[0], *trained, *held_out[1]]


@pytest.mark.parametrize(
    ("losses", "held_out", "told"),
    [
        ([2.0, 9.0, 8.0, 7.0], (), "the training loss was 2.0000 at first and 8.0000 at the end"),
        ([2.0, 2.1, INF, INF, INF], (), "was 2.0000 at first and no finite number at the end"),
        ([0.1, 0.7, 0.7], (), "was 0.1000 at first and 0.7000"),
        ([0.01, 0.5, 0.5], (), "was 0.0100 at first and 0.5000"),
        ([2.0, 1.0], (2.0, 3.6), "the held-out loss was 2.0000 at first and 3.6000 at the end"),
        ([2.0, 1.0], (2.0, INF), "the held-out loss was 2.0000 at first and no finite number"),
        ([2.0, 9.0], (2.0, 9.0), "9.0000 at the end, the held-out loss was 2.0000"),
    ],
)
def test_what_is_told(losses, held_out, told):
    assert told in rise_of_loss(rows_of(losses, *held_out), held_out=bool(held_out))


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        ([], ()),
        ([2.0], (2.0,)),
        ([2.0, 3.4], (2.0, 3.4)),
        ([2.0, 1.0, INF, 1.0, 1.0, 1.0], ()),  # one step was skipped
        ([0.01, 0.1], (0.01, 0.1)),
        ([INF, 3.0, 2.0], (INF, 2.0)),  # it got better
    ],
)
def test_what_is_not(losses, held_out):
    assert not rise_of_loss(rows_of(losses, *held_out), held_out=bool(held_out))


def test_scatter_of_batches_is_no_rise():
    """Around a loss that stays, a fifth of it from batch to batch, over 20 lines of the log."""
    rng = np.random.default_rng(0)
    told = [
        bool(rise_of_loss(rows_of(list(rng.gamma(25, level / 25, size=20))), held_out=False))
        for level in (0.03, 0.1, 0.3, 1.0, 3.0)
        for _ in range(200)
    ]
    assert np.mean(told) < 0.01


def test_rows_of_others_are_no_held_out_losses_of_a_run_without():
    rows = [{"step": 0, "eval_loss": 1.0}, *rows_of([2.0, 1.0]), {"step": 2}]
    assert not rise_of_loss(rows, held_out=False)
