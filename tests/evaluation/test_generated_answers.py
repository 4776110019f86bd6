import gc
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from loft_jax import generation
from loft_jax.cli import main
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.evaluation import AnswerScores, Prediction, generated_answers
from loft_jax.evaluation.generated_answers import answer_in
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = DataConfig("rows", max_length=40)
PROMPTS = ["two plus two?", "a", "the plot goes nowhere and the acting is", "Sentiment:", "a joy"]
GSM8K = "#### ([-0-9.,]+)"


def torch_texts(folder, prompts, count):
    """What transformers continues each prompt with, greedily, one at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in prompts:
        ids = prompt if isinstance(prompt, list) else TOKENIZER(prompt)["input_ids"]
        new = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        texts.append(TOKENIZER.decode(new[0, len(ids) :], skip_special_tokens=True))
    return texts


def measured(model, rows, **options):
    options = {"max_new_tokens": 6, "batch_size": 2, "progress": False, **options}
    return generated_answers(rows, TOKENIZER, options.pop("data", CONFIG), **options)(model)


def test_texts_are_those_of_transformers_in_the_order_of_the_rows(tiny_llama):
    folder, model = tiny_llama
    texts = torch_texts(folder, PROMPTS, 6)
    rows = [{"prompt": p, "completion": f" {t}\n"} for p, t in zip(PROMPTS, texts, strict=True)]
    rows[3]["completion"] = "something else"
    gc.collect()  # models that die later would be counted off
    generation._advance.clear_cache()
    scores = measured(model, rows)
    assert [one.text for one in scores.predictions] == texts
    assert [one.right for one in scores.predictions] == [True, True, True, False, True]
    assert (scores.accuracy, scores.unanswered, scores.count) == (0.8, 0.0, 5)
    assert scores.predictions[1].prompt == "<s>a"
    assert generation._advance._cache_size() == 1  # the last batch is filled up


def test_long_prompts_lose_their_left_but_not_bos(tiny_llama, caplog):
    folder, model = tiny_llama
    rows = [{"prompt": prompt, "completion": "x"} for prompt in PROMPTS[:3]]
    scores = measured(model, rows, data=DataConfig("rows", max_length=6 + 5))
    whole = TOKENIZER(PROMPTS[:3])["input_ids"]
    assert [len(ids) > 5 for ids in whole] == [True, False, True]
    cut = [[1, *ids[-4:]] if len(ids) > 5 else ids for ids in whole]
    assert [one.text for one in scores.predictions] == torch_texts(folder, cut, 6)
    said = "shortened the prompts of 2 of 3 rows to 5 tokens: max_length is 11, and max_new"
    assert said in caplog.text


def test_a_conversation_is_answered_as_in_training(tiny_llama):
    folder, model = tiny_llama
    asked = [{"role": "user", "content": "two plus two?"}]
    prompt = TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    (text,) = torch_texts(folder, [ids], 6)
    rows = [{"messages": [*asked, {"role": "assistant", "content": text}], "tools": None}]
    assert measured(model, rows).accuracy == 1
    assert measured(model, [{"instruction": "two plus two?", "output": text}]).accuracy == 1
    with pytest.raises(InputError, match=r"row 0, field 'messages': the last message is of 'user'"):
        measured(model, [{"messages": asked}])


def test_a_text_ends_with_the_token_that_closes_completions_in_training(tiny_llama):
    _, model = tiny_llama
    (whole,) = measured(model, [{"prompt": "a", "completion": "x"}]).predictions
    third = TOKENIZER(whole.text, add_special_tokens=False)["input_ids"][2]
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens([third])[0]
    assert model.config.eos_token_id != tokenizer.eos_token_id == third
    options = {"max_new_tokens": 6, "progress": False, "batch_size": 2}
    evaluate = generated_answers([{"prompt": "a", "completion": "x"}], tokenizer, CONFIG, **options)
    (short,) = evaluate(model).predictions
    assert short.text
    assert len(short.text) < len(whole.text)
    assert whole.text.startswith(short.text)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" Paris.\n", "", "Paris."),
        (" \n", "", None),
        ("1,000", "", "1,000"),
        # The last line of GSM8K's answers, and how OpenAI's checker and models write numbers.
        ("48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72.\n#### 72", GSM8K, "72"),
        ("#### 1,000", GSM8K, "1000"),
        ("#### 1,234,567.50", GSM8K, "1234567.5"),
        ("#### 18.", GSM8K, "18"),
        ("#### -0.0", GSM8K, "0"),
        ("#### -07", GSM8K, "-7"),
        ("#### 1,00", GSM8K, "1,00"),
        ("#### 123456789012345678901234567890.1", GSM8K, "123456789012345678901234567890.1"),
        ("so 72", GSM8K, None),
        ("#### 5\n#### 6", GSM8K, "5"),
        ("I say true, not false", "true|false", "true"),
        ("answer: b", r"\(([a-d])\)|answer: ([a-d])", "b"),
        ("####   ", "####(.*)", None),
    ],
)
def test_the_answer_in_a_text(text, pattern, answer):
    assert answer_in(text, re.compile(pattern)) == answer


def test_a_text_without_an_answer_is_wrong():
    scores = AnswerScores((Prediction("a", "b", None, "1"), Prediction("a", "1", "1", "1")))
    assert (scores.accuracy, scores.unanswered) == (0.5, 0.5)


def test_completions_that_are_answers_already(tiny_llama):
    rows = [{"prompt": "a", "completion": text} for text in ("1,000", " 7")]
    scores = measured(tiny_llama[1], rows, answer_pattern=GSM8K, max_new_tokens=1)
    assert [one.expected for one in scores.predictions] == ["1000", "7"]
    assert scores.unanswered == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}], {}, r"field 'completion' is missing; found .*\['prompt'\]; expected"),
        ([{"prompt": "a", "completion": 3}], {}, "row 0: field 'completion' is int"),
        ([{"prompt": "a", "completion": " "}], {}, "row 0: the completion ' ' has no answer"),
        (
            [{"prompt": "a", "completion": text} for text in ("#### 1", "2")],
            {"answer_pattern": GSM8K},
            r"row 1: the completion '2' has no answer; expected one in every row that '####",
        ),
        ([{"prompt": "a", "completion": "b"}], {"answer_pattern": "("},
         r"answer_pattern '\(' is no regular expression"),
        ([{"prompt": "a", "completion": "b"}], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([{"prompt": "a", "completion": "b"}], {"max_new_tokens": 40},
         "max_new_tokens is 40, expected less than max_length, 40"),
        ([{"prompt": "a", "completion": "b"}], {"batch_size": 0}, "batch size is 0"),
        ([{"prompt": "a", "completion": "b"}], {"vocab_size": 9}, "row 0: the tokenizer gives"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_before_there_is_a_model(rows, options, message):
    with pytest.raises(InputError, match=message):
        measured(None, rows, **options)


def test_prompt_without_any_token():
    rows = [{"prompt": "", "completion": "b"}]
    with pytest.raises(InputError, match="row 0: the prompt has no token"):
        generated_answers(rows, tiny_tokenizer(bos=False), CONFIG, max_new_tokens=6)


def test_the_command(workspace, tmp_path, capsys):
    file = tmp_path / "predictions.jsonl"
    evaluate = [
        *("evaluate", "--model", str(workspace / "model")),
        *("--data.path", str(workspace / "test.jsonl")),
    ]
    pattern = ["--answer-pattern", "positive|negative"]
    generate = ["--generate", *pattern, "--max-new-tokens", "4", "--predictions", str(file)]
    assert main([*evaluate, *generate]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert found["count"] == len(rows) == 12
    assert found["accuracy"] == sum(row["right"] for row in rows) / 12
    assert found["unanswered"] == sum(row["answer"] is None for row in rows) / 12
    assert {row["expected"] for row in rows} <= {"positive", "negative"}
    assert all(row["prompt"].startswith("<s>Review: ") for row in rows)
    assert err.count("expected: 'positive'") + err.count("expected: 'negative'") == 3
    for flags, message in (
        (pattern, "answer_pattern is 'positive|negative', and is used with --generate only"),
        (["--generate", "--choices", " a"], "choices is (' a',), and is not used with"),
        (["--generate", "--task", "choice"], "task is 'choice', and is not used with --generate"),
        (
            ["--generate", "--predictions", str(tmp_path / "no" / "file")],
            "no such folder to write",
        ),
    ):
        assert main([*evaluate, *flags]) == 2
        assert message in capsys.readouterr().err
