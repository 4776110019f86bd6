import gc
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from loft_jax.data import DataConfig
from loft_jax.data.text import encode_continuations, encode_starts
from loft_jax.errors import InputError
from loft_jax.tasks import choice as module
from loft_jax.tasks.choice import score_choices
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = DataConfig("rows", max_length=64)
LABELS = [" negative", " positive"]
REVIEWS = [
    {"prompt": f"Review: {text}\nSentiment:", "completion": LABELS[i % 2]}
    for i, text in enumerate(["a joy", "dull, loud and far too long", "worse", "moving", "honest"])
]
# Answers of several tokens and of different numbers; one row of single tokens among them.
QUESTIONS = [
    {"prompt": "two plus two?", "choices": [" four", " five or more", " a"], "answer": 0},
    {"prompt": "the plot goes", "choices": [" nowhere", " on and on and on"], "answer": 1},
    {"prompt": "Sentiment:", "choices": [" positive", " negative"], "answer": 1},
    {"prompt": "a joy from start", "choices": [" to", " to finish", " é"], "answer": 1},
]


def torch_choices(folder, rows, max_length=10**6):
    """Log-likelihoods of each answer, one forward pass an answer, in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    scores = []
    for row in rows:
        (prompt,) = encode_starts(TOKENIZER, [row["prompt"]])
        scores.append([])
        answers = encode_continuations(TOKENIZER, row["choices"])
        room = max_length - 1 - max(map(len, answers))
        for answer in answers:
            ids = torch.tensor([prompt[:1] + prompt[max(1, len(prompt) - room) :] + answer])
            with torch.no_grad():
                logp = model(ids).logits[0, :-1].double().log_softmax(-1)
            logp = logp.gather(1, ids[0, 1:, None])[:, 0]
            scores[-1].append(logp[-len(answer) :].sum().item())
    return scores


def expected_of(rows, scores):
    sizes = [[len(choice.lstrip(" ")) for choice in row["choices"]] for row in rows]
    answers = [row["answer"] for row in rows]
    pairs = list(zip(scores, sizes, answers, strict=True))
    return {
        "accuracy": np.mean([np.argmax(s) == a for s, _, a in pairs]),
        "accuracy_norm": np.mean([np.argmax(np.divide(s, n)) == a for s, n, a in pairs]),
        "nll": np.mean([-s[a] for s, _, a in pairs]),
    }


def assert_scores(found, rows, scores):
    expected = expected_of(rows, scores)
    assert found.count == len(rows)
    assert found.accuracy == expected["accuracy"]
    assert found.accuracy_norm == expected["accuracy_norm"]
    np.testing.assert_allclose(found.nll, expected["nll"], rtol=1e-5)


def test_single_token_labels_are_scored_as_torch_does(tiny_llama):
    folder, model = tiny_llama
    found = score_choices(
        model, TOKENIZER, REVIEWS, CONFIG, choices=LABELS, batch_size=2, progress=False
    )
    rows = [
        {**row, "choices": LABELS, "answer": LABELS.index(row["completion"])} for row in REVIEWS
    ]
    assert_scores(found, rows, torch_choices(folder, rows))


def test_answers_of_several_tokens_are_scored_as_torch_does(tiny_llama):
    folder, model = tiny_llama
    scores = torch_choices(folder, QUESTIONS)
    for best in range(2):  # whichever answers are said to be right
        rows = [{**row, "answer": best} for row in QUESTIONS]
        found = score_choices(model, TOKENIZER, rows, CONFIG, batch_size=3, progress=False)
        assert_scores(found, rows, scores)


def test_long_prompt_loses_its_left(tiny_llama, caplog):
    folder, model = tiny_llama
    rows = [{**row, "prompt": "far too long, " * 9 + row["prompt"]} for row in QUESTIONS]
    config = DataConfig("rows", max_length=20)
    found = score_choices(model, TOKENIZER, rows, config, batch_size=3, progress=False)
    assert_scores(found, rows, torch_choices(folder, rows, max_length=20))
    assert "shortened the prompts of 4 of 4 questions to max_length 20" in caplog.text
    caplog.clear()
    score_choices(model, TOKENIZER, QUESTIONS, CONFIG, progress=False)
    assert not caplog.text


class Counting(nnx.Module):
    """Finds all tokens equally likely; counts the rows it is given that hold something."""

    rows = 0
    config = SimpleNamespace(vocab_size=len(TOKENIZER))

    def hidden_states(self, tokens, *, segment_ids, branch_ids):
        jax.debug.callback(Counting.count, segment_ids)
        return jax.nn.one_hot(tokens, len(TOKENIZER)) * 0.0, None

    def logits(self, hidden):
        return hidden

    @staticmethod
    def count(segment_ids):
        Counting.rows += int((np.asarray(segment_ids).max(axis=1) > 0).sum())


@pytest.mark.parametrize(("rows", "choices"), [(REVIEWS, LABELS), (QUESTIONS, [])])
def test_a_row_goes_through_the_model_once(rows, choices):
    Counting.rows = 0
    score_choices(Counting(), TOKENIZER, rows, CONFIG, choices=choices, progress=False)
    jax.effects_barrier()
    assert Counting.rows == len(rows)


def test_uniform_model_has_the_nll_of_the_whole_vocabulary_and_ties_go_to_the_first():
    found = score_choices(Counting(), TOKENIZER, REVIEWS, CONFIG, choices=LABELS, progress=False)
    np.testing.assert_allclose(found.nll, np.log(len(TOKENIZER)), rtol=1e-6)
    assert found.accuracy == 3 / 5


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_of_answers_that_are_the_same_the_first_is_taken(tiny_llama, batch_size):
    texts = [f"question {i}:" for i in range(12)]
    rows = [{"prompt": text, "choices": [" a joy"] * 3, "answer": 0} for text in texts]
    _, model = tiny_llama
    found = score_choices(model, TOKENIZER, rows, CONFIG, batch_size=batch_size, progress=False)
    assert (found.accuracy, found.accuracy_norm) == (1, 1)
    rows = [
        {**row, "choices": [" worse", *row["choices"]], "answer": answer}
        for row in QUESTIONS
        for answer in range(1 + len(row["choices"]))
    ]
    rows += [{**row, "choices": [*row["choices"], " worse"]} for row in QUESTIONS]
    found = score_choices(model, TOKENIZER, rows, CONFIG, batch_size=batch_size, progress=False)
    assert_scores(found, rows, torch_choices(tiny_llama[0], rows))


def test_answers_without_a_number_are_never_right(tiny_llama):
    model = nnx.clone(tiny_llama[1])
    model.norm.scale[...] = model.norm.scale[...].at[0].set(np.nan)
    found = score_choices(model, TOKENIZER, QUESTIONS, CONFIG, progress=False)
    assert (found.accuracy, found.accuracy_norm) == (0, 0)
    assert np.isnan(found.nll)


def test_normalisation_is_by_characters_without_the_space_before():
    # A uniform model: the sum prefers fewer tokens, the mean a character more of them a token.
    choices = [" a", "four", " é"]
    tokens = encode_continuations(TOKENIZER, choices)
    assert [len(ids) for ids in tokens] == [1, 3, 3]
    row = {"prompt": "a", "choices": choices, "answer": 1}
    found = score_choices(Counting(), TOKENIZER, [row], CONFIG, progress=False)
    # Tokens a character are 1, 3/4 and 3; with the space of " a" counted it would be 1/2.
    assert (found.accuracy, found.accuracy_norm) == (0, 1)


def test_compiled_once_a_shape_over_several_evaluations():
    gc.collect()  # models that die later would be counted off
    before = module._answer_scores._cache_size()
    for _ in range(2):
        score_choices(
            Counting(), TOKENIZER, REVIEWS, CONFIG, choices=LABELS, batch_size=7, progress=False
        )
    assert module._answer_scores._cache_size() - before == 1


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}], {"choices": LABELS}, r"field 'completion' is missing; found .*prompt"),
        ([{"prompt": "a"}], {}, "field 'choices' is missing"),
        (REVIEWS, {}, r"field 'choices' is missing; .*or choices given for all rows"),
        ([{"prompt": 3, "completion": LABELS[0]}], {"choices": LABELS}, "row 0: field 'prompt'"),
        ([{"prompt": "a", "completion": "neutral"}], {"choices": LABELS},
         r"row 0: the completion 'neutral' is none of the choices \[' negative'"),
        ([{**QUESTIONS[0], "choices": []}], {}, r"row 0: field 'choices' is \[\]"),
        ([{**QUESTIONS[0], "choices": "ab"}], {}, "expected a list of texts"),
        ([{**QUESTIONS[0], "answer": 3}], {}, "row 0: field 'answer' is 3; .*whole .*to 2"),
        ([{**QUESTIONS[0], "answer": "a"}], {}, "row 0: field 'answer' is 'a'"),
        ([{**QUESTIONS[0], "choices": [" a", ""]}], {}, "choice '' has no token"),
        ([], {}, "the dataset is empty"),
        (REVIEWS, {"choices": LABELS, "batch_size": 0}, "batch size is 0"),
    ],
)  # fmt: skip
def test_bad_input(rows, options, message):
    with pytest.raises(InputError, match=message):
        score_choices(Counting(), TOKENIZER, rows, CONFIG, progress=False, **options)


def test_answer_longer_than_a_row():
    config = DataConfig("rows", max_length=3)
    rows = [{"prompt": "a", "choices": [" a", " on and on"], "answer": 0}]
    with pytest.raises(InputError, match=r"row 0: max_length is 3; an answer of 5 tokens needs 6"):
        score_choices(Counting(), TOKENIZER, rows, config, progress=False)


@pytest.mark.parametrize("field", ["prompt", "choices", "pad"])
def test_token_that_the_model_has_no_weights_for(field):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    row = {"prompt": "a", "choices": [" a", " b"], "answer": 0}
    match field:
        case "prompt":
            row["prompt"] = "a <|tool|>"
        case "choices":
            row["choices"][1] = "<|tool|>"
        case "pad":
            tokenizer.pad_token = "<|tool|>"
    rows = [{"prompt": "a", "choices": [" a"], "answer": 0}, row]
    Counting.rows = 0
    where = "padding" if field == "pad" else "row 1"
    size = len(TOKENIZER)
    message = rf"{where}: .* token {size} \('<\|tool\|>'\), and the weights have {size} rows"
    with pytest.raises(InputError, match=message):
        score_choices(Counting(), tokenizer, rows, CONFIG, progress=False)
    jax.effects_barrier()
    assert Counting.rows == 0


def test_words_that_run_together_are_told_once(caplog):
    rows, tokenizer = [{"prompt": "Q?", "completion": "yes"}], tiny_tokenizer()
    for _ in range(2):
        score_choices(Counting(), tokenizer, rows, CONFIG, choices=["yes"], progress=False)
    assert len(caplog.records) == 1
    assert "'Q?yes'" in caplog.text


def test_prompt_without_any_token():
    rows = [{"prompt": "", "completion": LABELS[0]}]
    tokenizer = tiny_tokenizer(bos=False)
    with pytest.raises(InputError, match="row 0: the prompt has no token"):
        score_choices(Counting(), tokenizer, rows, CONFIG, choices=LABELS, progress=False)


def test_prompts_by_templates_and_by_the_chat_template(tiny_llama, caplog):
    caplog.set_level("INFO")
    _, model = tiny_llama
    options = {"batch_size": 4, "progress": False}
    expected = score_choices(model, TOKENIZER, QUESTIONS, CONFIG, **options)
    asked = [
        {"q": row["prompt"], "choices": row["choices"], "answer": row["answer"]}
        for row in QUESTIONS
    ]
    by_template = replace(CONFIG, prompt="{q}")
    assert score_choices(model, TOKENIZER, asked, by_template, **options) == expected
    rendered = [
        {**row, "prompt": TOKENIZER.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}],
            tokenize=False, add_generation_prompt=True,
        )}
        for row in QUESTIONS
    ]  # fmt: skip
    expected = score_choices(model, TOKENIZER, rendered, CONFIG, **options)
    fresh, told = tiny_tokenizer(), "prompts that are texts are given to the model as they stand"
    caplog.clear()
    assert score_choices(model, fresh, QUESTIONS, CONFIG, **options)
    assert told in caplog.text
    caplog.clear()
    by_chat = replace(CONFIG, chat=True)
    assert score_choices(model, TOKENIZER, QUESTIONS, by_chat, **options) == expected
    assert told not in caplog.text
    with pytest.raises(InputError, match="chat is true, but the tokenizer has no chat template"):
        score_choices(model, tiny_tokenizer(chat_template=None), QUESTIONS, by_chat, **options)
