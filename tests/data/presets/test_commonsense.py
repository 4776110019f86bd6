"""Rows as LLM-Adapters has them, and what its `commonsense_evaluate.py` finds in texts."""

import json
import re

import pytest

from loft_jax.data import DataConfig, load_examples
from loft_jax.data.presets import PRESETS
from loft_jax.errors import InputError

# One question of each data set; boolq's and those of ARC and OpenBookQA are as published.
QUESTIONS = {
    "boolq": (
        "Please answer the following question with true or false, question: do iran and "
        "afghanistan speak the same language?\n\nAnswer format: true/false",
        "true",
        ["true", "false"],
    ),
    "piqa": (
        "Please choose the correct solution to the question: how to open a jar?\n\n"
        "Solution1: twist the lid\n\nSolution2: eat the lid\n\n"
        "Answer format: solution1/solution2",
        "solution1",
        ["solution1", "solution2"],
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Kai left. Why?\n\n"
        "Answer1: to rest Answer2: to stay Answer3: to sing\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
        ["answer1", "answer2", "answer3"],
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Ice: The man\n\n"
        "Ending1: a Ending2: b Ending3: c Ending4: d\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending4",
        ["ending1", "ending2", "ending3", "ending4"],
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Sam was faster than Ann, so _ won.\n\nOption1: Sam Option2: Ann "
        "Answer format: option1/option2",
        "option1",
        ["option1", "option2"],
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: Which?\n\n"
        "Answer1: a Answer2: b Answer3: c Answer4: d Answer5: e\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
        ["answer1", "answer2", "answer3", "answer4", "answer5"],
    ),
    "ARC-Challenge": (
        "Please choose the correct answer to the question: Who?\n\n"
        "Answer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
        ["answer1", "answer2", "answer3"],
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: The sun is responsible for\n\n"
        "Answer1: puppies Answer2: children Answer3: flowers Answer4: plants\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
        ["answer1", "answer2", "answer3", "answer4"],
    ),
}
FOLDERS = {
    "boolq": "boolq", "piqa": "piqa", "siqa": "social_i_qa", "hellaswag": "hellaswag",
    "winogrande": "winogrande", "arc-easy": "ARC-Easy", "arc-challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}  # fmt: skip


def row_of(folder, **changes):
    instruction, answer, _ = QUESTIONS[folder]
    row = {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}"}
    return {**row, "answer": answer, **changes}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of the eight, each with one question to train on and two to test on."""
    root = tmp_path_factory.mktemp("dataset")
    for folder in QUESTIONS:
        (root / folder).mkdir()
        (root / folder / "train.json").write_text(json.dumps([row_of(folder)], indent=4))
        (root / folder / "test.json").write_text(json.dumps([row_of(folder)] * 2, indent=4))
    return root


@pytest.mark.parametrize(("preset", "folder"), FOLDERS.items())
def test_each_data_set_by_its_folder_alone(published, preset, folder):
    data = DataConfig(str(published / folder), preset=preset)
    (row,) = load_examples(data)
    instruction, answer, answers = QUESTIONS[folder]
    assert row == {
        "prompt": "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n### Response:\n",
        "completion": f"the correct answer is {answer}",
        "choices": [f"the correct answer is {one}" for one in answers],
        "answer": answers.index(answer),
    }
    assert len(load_examples(data.held_out())) == 2
    found = re.search(PRESETS[preset].answer_pattern, f"... {answer}, not {answers[0]}")
    assert found[0] == answer


def test_the_union_of_what_is_in_a_folder(published, tmp_path):
    whole = load_examples(DataConfig(str(published), preset="commonsense"))
    assert whole["completion"][:] == [row_of(folder)["output"] for folder in QUESTIONS]
    one_file = tmp_path / "commonsense_170k.json"
    one_file.write_text(json.dumps([row_of(folder) for folder in QUESTIONS]))
    assert load_examples(DataConfig(str(one_file), preset="commonsense"))[:] == whole[:]
    for folder in ("boolq", "ARC-Easy"):
        (tmp_path / folder).symlink_to(published / folder)
    rows = load_examples(DataConfig(str(tmp_path), preset="commonsense", split="test"))
    expected = [row_of(folder)["output"] for folder in ("boolq", "ARC-Easy")]
    assert rows["completion"][:] == [expected[0]] * 2 + [expected[1]] * 2


def test_an_input_goes_below_the_instruction(tmp_path):
    file = tmp_path / "test.json"
    file.write_text(json.dumps([row_of("boolq", input="A passage.")]))
    (row,) = load_examples(DataConfig(str(file), preset="boolq"))
    assert row["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{QUESTIONS['boolq'][0]}\n\n### Input:\nA passage.\n\n### Response:\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answer": "answer5"},
            r"row 0 of train has the answer 'answer5', .*'answer4'\]; expected",
        ),
        ({"answer": "maybe"}, r"has the answer 'maybe', and its instruction names \[\]"),
        ({"answer": None}, "row 0 of train has 'answer' None; expected texts in the columns instr"),
        ({"instruction": 3}, "has 'instruction' 3; expected texts"),
    ],
)
def test_other_rows_are_refused(tmp_path, changes, message):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row_of("openbookqa", **changes)]))
    with pytest.raises(InputError, match=message):
        load_examples(DataConfig(str(file), preset="openbookqa"))


def test_a_folder_without_any_of_them(tmp_path):
    message = "has no data set of preset commonsense; expected at least one of the folders boolq, p"
    with pytest.raises(InputError, match=message):
        load_examples(DataConfig(str(tmp_path), preset="commonsense"))
