import json

import pytest

from loft_jax.cli import main
from loft_jax.data import DataConfig, load_examples
from loft_jax.errors import InputError
from loft_jax.evaluation import mean_of, question_sets, sampled
from loft_jax.hub import load_pretrained, load_tokenizer
from loft_jax.tasks import score_choices
from tests.data.presets.test_commonsense import row_of

COUNTS = {"boolq": 5, "piqa": 3}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    for folder, count in COUNTS.items():
        (root / folder).mkdir()
        other = "false" if folder == "boolq" else "solution2"
        rows = [row_of(folder), *[row_of(folder, answer=other)] * (count - 1)]
        rows = [{**row, "output": f"the correct answer is {row['answer']}"} for row in rows]
        for split in ("train", "test"):
            (root / folder / f"{split}.json").write_text(json.dumps(rows))
    return root


def test_both_ways_a_set_and_the_mean(workspace, questions):
    model, tokenizer = load_pretrained(workspace / "model"), load_tokenizer(workspace / "model")
    data = DataConfig(str(questions), preset="commonsense")
    options = {"max_new_tokens": 3, "progress": False}
    found = question_sets(data, tokenizer, **options)(model)
    assert {name: one.report["count"] for name, one in found.items()} == COUNTS
    assert {name: one.report["majority"] for name, one in found.items()} == {
        "boolq": 4 / 5,
        "piqa": 2 / 3,
    }
    for name, scores in found.items():
        one = DataConfig(str(questions / name), preset=name, split="test")
        rows = load_examples(one)
        expected = score_choices(model, tokenizer, rows, one, progress=False)
        assert scores.report["likelihood"] == expected.accuracy
        answers = [prediction.expected for prediction in scores.generated.predictions]
        assert answers == [text.split()[-1] for text in rows["completion"]]
    mean = mean_of(found)
    assert mean["count"] == 8
    for key in ("majority", "generated", "unanswered", "likelihood"):
        assert mean[key] == sum(one.report[key] for one in found.values()) / 2
    few = question_sets(data, tokenizer, sample=2, **options)(model)
    assert {name: one.report["count"] for name, one in few.items()} == {"boolq": 2, "piqa": 2}


def test_a_sample_is_the_same_every_time(questions):
    rows = load_examples(DataConfig(str(questions / "boolq" / "test.json")))
    rows = rows.add_column("number", range(5))
    assert sampled(rows, 3)["number"][:] == sampled(rows, 3)["number"][:]
    assert sorted(sampled(rows, 3)["number"][:]) == sampled(rows, 3)["number"][:]
    assert len(sampled(rows, 9)) == len(sampled(rows, None)) == 5
    with pytest.raises(InputError, match="sample is 0"):
        sampled(rows, 0)


def test_one_command_trains_and_one_evaluates(workspace, questions, tmp_path, capsys):
    data = ["--data.preset", "commonsense", "--data.path", str(questions)]
    train = [
        *("finetune", "--model", str(workspace / "model"), *data, "--output", str(tmp_path / "r")),
        *("--steps", "1", "--batch-size", "2", "--rank", "2", "--target-modules", "q_proj"),
        *("--method", "lora"),
        *("--data.max-length", "160", "--data.buckets", "160"),
    ]
    assert main(train) == 0
    capsys.readouterr()
    evaluate = ["evaluate", "--adapter", str(tmp_path / "r" / "adapter"), *data]
    file = tmp_path / "predictions.jsonl"
    some = ["--sample", "2", "--max-new-tokens", "3", "--predictions", str(file)]
    assert main([*evaluate, *some]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert list(found) == ["boolq", "piqa", "mean"]
    assert found["mean"]["count"] == 4
    assert [json.loads(line)["preset"] for line in file.read_text().splitlines()] == [
        *["boolq"] * 2,
        *["piqa"] * 2,
    ]
    table = [line.split() for line in err.splitlines()[-4:]]
    assert table[0] == list(found["mean"])
    assert [line[0] for line in table[1:]] == list(found)
    assert float(table[3][4]) == pytest.approx(found["mean"]["unanswered"], abs=1e-4)
    for flags, message in (
        (["--generate"], "generate is True, and is not used with preset commonsense"),
        (["--choices", " a"], "choices is (' a',), and is not used with preset commonsense"),
    ):
        assert main([*evaluate, *flags]) == 2
        assert message in capsys.readouterr().err
