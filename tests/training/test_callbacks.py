"""Callbacks: when they are called, how they end a run, what a resumed run knows of them."""

import contextlib
import dataclasses
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers

from loft_jax.errors import InputError
from loft_jax.generation import generate_text
from loft_jax.hub import load_tokenizer
from loft_jax.training import loop, sample_generations
from loft_jax.training.callbacks import Callback, Callbacks
from loft_jax.training.checkpoint import Checkpoints
from loft_jax.training.early_stopping import EarlyStopping
from loft_jax.training.loop import finetune
from tests.tiny import tiny_tokenizer
from tests.training.processes import adapter, losses


class Recorder(Callback):
    """Writes down what it is called with; ends the run after a step."""

    def __init__(self, last=10**6):
        self.calls, self.last, self.steps = [], last, 0

    def on_step(self, run, metrics):
        self.calls.append(("step", run.step, "train_loss" in metrics))
        self.steps += 1
        if run.step == self.last:
            run.stop("enough")

    def on_evaluate(self, run, metrics, score):
        self.calls.append(("evaluate", run.step, metrics.get("loss") == score))

    def on_save(self, run, folder):
        self.calls.append(("save", run.step, folder.name == str(run.step)))

    def on_end(self, run, result):
        self.calls.append(("end", run.step, result.trained.is_dir()))

    def get_state(self):
        return {"steps": self.steps}

    def set_state(self, state):
        self.steps = state["steps"]


def test_calls_in_their_order_and_an_end_before_the_last_step(make_config, workspace, caplog):
    """The run that a callback ended is complete, and a resumed one has nothing to do."""
    recorder = Recorder(last=5)
    config = make_config(
        steps=12, save_every=4, eval_path=str(workspace / "test.jsonl"), eval_every=3, log_every=2
    )
    result = finetune(config, callbacks=[recorder], progress=False)
    assert recorder.calls == [
        ("evaluate", 0, True),
        ("step", 1, True),
        ("step", 2, True),
        ("step", 3, False),
        ("evaluate", 3, True),
        ("save", 3, True),
        ("step", 4, True),
        ("save", 4, True),
        ("step", 5, False),
        ("evaluate", 5, True),
        ("save", 5, True),
        ("end", 5, True),
    ]
    assert (result.steps, result.interrupted, result.stopped) == (5, False, "enough")
    assert set(result.after) == {"loss"}
    assert "ended at step 5 of 12: enough" in caplog.text
    again = Recorder()
    resumed = finetune(config, callbacks=[again], resume=True, progress=False)
    assert again.calls == [("end", 5, True)]
    assert again.steps == 5
    assert dataclasses.replace(resumed, model=None) == dataclasses.replace(result, model=None)
    with pytest.raises(InputError, match=r"cannot resume with other callbacks: .*\['Recorder'\]"):
        finetune(config, resume=True, progress=False)


@pytest.mark.slow
def test_an_end_that_is_asked_for_at_a_save_is_after_the_next_step(make_config, workspace):
    class EndAtSave(Callback):
        def on_save(self, run, folder):
            run.stop("saved")

    path = str(workspace / "test.jsonl")
    config = make_config(steps=12, save_every=3, eval_path=path, eval_every=4)
    result = finetune(config, callbacks=[EndAtSave()], progress=False)
    assert (result.steps, result.interrupted, result.stopped) == (4, False, "saved")
    assert set(result.after) == {"loss"}
    again = finetune(config, resume=True, progress=False)
    assert (again.steps, again.stopped) == (4, "saved")


@pytest.mark.slow
def test_an_evaluation_left_to_the_resumed_run_is_that_of_its_checkpoint(make_config, workspace):
    """Also if that run is killed before its next checkpoint: it is measured and logged once."""

    class At(Callback):
        def __init__(self, step, act):
            self.step, self.act = step, act

        def on_step(self, run, metrics):
            if run.step == self.step:
                self.act()

    def kill():
        raise KeyboardInterrupt

    path = str(workspace / "test.jsonl")
    # At the end, the scores alone keep the checkpoints before the last.
    config = make_config(
        steps=5, save_every=9, keep_last=1, keep_best=3, eval_path=path, eval_every=2
    )
    terminate = At(2, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = finetune(config, callbacks=[terminate], progress=False)
    assert (stopped.interrupted, stopped.steps) == (True, 2)
    with pytest.raises(KeyboardInterrupt):
        finetune(config, callbacks=[At(3, kill)], resume=True, progress=False)
    result = finetune(config, resume=True, progress=False)
    measured = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    assert [row["step"] for row in result.history if "eval_loss" in row] == [0, 2, 4, 5]
    folder = result.folder / "checkpoints"
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        scores = {step: checkpoints.run_of(step)["score"] for step in checkpoints.steps()}
    assert scores == {step: measured[step] for step in (5, 4, 2)}


def test_a_state_that_json_cannot_hold_is_refused_before_training(make_config):
    class Kept(Callback):
        def get_state(self):
            return {"loss": np.float32(1.0)}

        def on_step(self, run, metrics):
            pytest.fail("has trained")

    with pytest.raises(InputError, match="callback Kept: JSON cannot hold its state: TypeError"):
        finetune(make_config(steps=4), callbacks=[Kept()], progress=False)


def test_sample_prompts_that_are_too_long_are_refused_before_training(make_config, tmp_path):
    model = tmp_path / "model"
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": 400}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    config = make_config(model=str(model), target_modules=("c_attn",), sample_prompts=("a " * 99,))
    with pytest.raises(InputError, match=r"^evaluation\.sample_prompts: a prompt has \d+ tokens"):
        finetune(config, progress=False)


def test_patience_counts_across_a_resumed_run(make_config, workspace, tmp_path):
    """At a rate of which the loss rises: the run ends where an undisturbed one does, to the bit."""
    common = {
        "steps": 40,
        "learning_rate": 2.0,
        "schedule": "constant",
        "eval_path": str(workspace / "test.jsonl"),
        "eval_every": 2,
        "patience": 2,
        "save_every": 2,
        "keep_last": 99,
    }
    whole = make_config(**common, output=str(tmp_path / "whole"))
    result = finetune(whole, progress=False)
    evaluated = [row["eval_loss"] for row in result.history if "eval_loss" in row][1:]
    assert "no evaluation of the last 2 was better than that of step" in result.stopped
    assert result.steps == 2 * len(evaluated) < 40
    assert min(evaluated[-2:]) >= min(evaluated[:-2])
    folder = Path(whole.output)
    expected, weights = losses(folder), adapter(folder)
    shutil.rmtree(folder / "checkpoints" / str(result.steps))  # after the first of the two

    class Terminate(Callback):
        """As if a cluster did, at a step with an evaluation, which there is no time for."""

        def on_step(self, run, metrics):
            if run.step == result.steps:
                signal.raise_signal(signal.SIGTERM)

    stopped = finetune(whole, resume=True, callbacks=[Terminate()], progress=False)
    assert (stopped.interrupted, stopped.steps) == (True, result.steps)
    resumed = finetune(whole, resume=True, progress=False)
    assert (resumed.steps, resumed.stopped) == (result.steps, result.stopped)
    assert [row["eval_loss"] for row in resumed.history if "eval_loss" in row][1:] == evaluated
    assert losses(folder) == expected
    assert all((adapter(folder)[name] == tensor).all() for name, tensor in weights.items())
    other = dataclasses.replace(whole.evaluation, patience=3)
    with pytest.raises(InputError, match=r"another evaluation\.patience"):
        finetune(dataclasses.replace(whole, evaluation=other), resume=True, progress=False)


def test_evaluations_without_anything_to_evaluate_are_refused(make_config):
    with pytest.raises(InputError, match=r"evaluation\.every is 2, but there are no held-out exam"):
        finetune(make_config(eval_every=2), progress=False)


def test_one_callback_is_no_list(make_config):
    with pytest.raises(InputError, match="callbacks is a Recorder, expected a list"):
        finetune(make_config(), callbacks=Recorder(), progress=False)


def test_patience_without_held_out_examples_is_refused(make_config):
    with pytest.raises(InputError, match="patience is 2, but there are no held-out examples"):
        finetune(make_config(patience=2, eval_every=2), progress=False)


EVERY_STEP = SimpleNamespace(evaluation=SimpleNamespace(every=1))


def test_an_evaluation_after_the_last_step_alone_does_not_count():
    """A run that is extended has none there, had it had its steps from the beginning."""
    stopping = EarlyStopping(1)
    run = SimpleNamespace(config=SimpleNamespace(evaluation=SimpleNamespace(every=2)), steps=3)
    for run.step, score in ((2, 2.0), (3, 1.0)):
        stopping.on_evaluate(run, {}, score)
    assert stopping.get_state() == {"best": 2.0, "best_step": 2, "count": 0}


def test_patience_goes_by_the_score_and_not_by_the_start():
    class Run:
        steps, stopped = 99, ""

        def stop(self, reason):
            self.stopped = reason

    run, stopping = Run(), EarlyStopping(2)
    run.config = EVERY_STEP
    for step, score in enumerate([1.0, 3.0, 2.0, 2.0, 2.5]):
        assert not run.stopped
        run.step = step
        stopping.on_evaluate(run, {}, score)
    assert run.stopped == "no evaluation of the last 2 was better than that of step 2"


def test_what_is_not_a_number_is_no_better_and_never_the_best():
    class Run:
        steps, step, stopped = 99, 0, ""

        def stop(self, reason):
            self.stopped = reason

    def ended(scores):
        run, stopping = Run(), EarlyStopping(2)
        run.config = EVERY_STEP
        for run.step, score in enumerate(scores, start=1):
            assert not run.stopped
            stopping.on_evaluate(run, {}, score)
        return run.stopped

    nan = float("nan")
    assert not ended([nan, 3.0, nan, 2.0, 1.0])
    assert ended([3.0, nan, nan]) == "no evaluation of the last 2 was better than that of step 1"
    assert ended([nan, nan]) == "none of the last 2 evaluations was a number"


def test_a_state_that_is_empty_at_the_start_is_restored():
    class Late(Callback):
        def __init__(self, **state):
            self.state = state

        def get_state(self):
            return self.state

        def set_state(self, state):
            self.state = state

    for state in ({"seen": 3}, {}):
        saved = Callbacks([Callback(), Late(**state)]).get_state()
        late = Late()
        Callbacks([late, Callback()]).set_state(json.loads(json.dumps(saved)))
        assert late.state == state


def test_only_line_feeds_end_a_sample(tmp_path):
    file = tmp_path / sample_generations.FILE
    file.touch()
    odd = {"step": 0, "prompt": "a\u2028b", "text": "c\x85d\n\x0ce"}
    sample_generations._write(file, [odd], 0)
    sample_generations._write(file, [{**odd, "step": 2}], 2)
    sample_generations._write(file, [{**odd, "step": 2}], 2)
    lines = file.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [odd, {**odd, "step": 2}]


@pytest.mark.parametrize(
    ("plain", "stopped"),
    [
        ({}, ""),
        ({"steps": 4, "stopped": ""}, ""),
        ({"steps": 4, "stopped": "enough"}, "enough"),
        ({"steps": 2, "stopped": "enough"}, ""),
    ],
)
def test_a_run_that_had_ended_goes_on_with_other_steps(plain, stopped):
    assert loop._still_stopped(SimpleNamespace(steps=4), plain) == stopped


def test_samples_are_written_at_every_evaluation(make_config, workspace):
    """The last are what the trained model generates; a resumed run writes none twice."""
    prompts = ("Review: a joy\nSentiment:", "Review: dull\nSentiment:")
    config = make_config(steps=4, eval_every=2, save_every=2, keep_last=9, sample_prompts=prompts)
    result = finetune(config, progress=False)
    file = result.folder / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in (0, 2, 4) for prompt in prompts
    ]
    tokenizer = load_tokenizer(config.model.path)
    texts = generate_text(result.model, tokenizer, prompts, max_new_tokens=64)
    assert [row["text"] for row in rows[-2:]] == texts
    shutil.rmtree(result.folder / "checkpoints" / "4")
    finetune(config, resume=True, progress=False)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_several_processes_end_together(monkeypatch):
    """After a step that all of them log."""
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    asked, other = SimpleNamespace(stopped="the loss is low"), SimpleNamespace(stopped="")
    monkeypatch.setattr(loop, "all_agree", lambda goes_on: False)  # one has asked
    assert not loop._asked_to_stop(asked, logs=False)
    assert loop._asked_to_stop(asked, logs=True)
    assert loop._asked_to_stop(other, logs=True)
    assert asked.stopped == "the loss is low"
    assert other.stopped == "a callback of another process ended the run"
    monkeypatch.setattr(loop, "all_agree", lambda goes_on: goes_on)
    assert not loop._asked_to_stop(SimpleNamespace(stopped=""), logs=True)
