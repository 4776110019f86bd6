"""`score_choices` and `loft-jax evaluate` against PyTorch on hundreds of rows.

PyTorch scores as EleutherAI's lm-evaluation-harness does: prompt and answer are tokenized as one
text, and the log-probabilities of the answer's tokens are summed, in float64 behind the model.
"""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loft_jax.cli import main
from loft_jax.data import DataConfig
from loft_jax.hub import load_pretrained, load_tokenizer
from loft_jax.tasks.choice import score_choices
from tests.tiny import save_tiny_llama, tiny_tokenizer

WORDS = ("the", "plot", "goes", "nowhere", "joy", "start", "dull", "naïve", "日本", "four", "two")


def some_text(rng, low, high):
    return " ".join(rng.choice(WORDS, rng.integers(low, high)))


def random_rows(count):
    """Prompts of 1 to 20 words, each with some different answers of 1 to 6 words."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt = f"Question: {some_text(rng, 1, 21)}\nAnswer:"
        choices = list({f" {some_text(rng, 1, 7)}": None for _ in range(rng.integers(3, 6))})
        answer = int(rng.integers(len(choices)))
        rows.append(
            {
                "prompt": prompt,
                "completion": choices[answer],
                "choices": choices,
                "answer": answer,
            }
        )
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def log_likelihoods(model, texts, starts):
    """Of the tokens of each text from its start on, given those before."""
    found = []
    for first in range(0, len(texts), 32):
        part = texts[first : first + 32]
        width = max(map(len, part))
        # Behind a text its padding changes nothing.
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in part])
        with torch.no_grad():
            logits = model(padded).logits
        for ids, start, one in zip(part, starts[first:], logits, strict=False):
            scores = one[start - 1 : len(ids) - 1].double().log_softmax(-1)
            found.append(scores[range(len(ids) - start), ids[start:]].sum().item())
    return found


def torch_scores(model, tokenizer, rows):
    """Log-likelihoods of every row's answers."""
    pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
    texts = [tokenizer(prompt + choice)["input_ids"] for prompt, choice in pairs]
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in pairs]
    found = iter(log_likelihoods(model, texts, starts))
    return [[next(found) for _ in row["choices"]] for row in rows]


def per_character(rows, scores):
    return [
        [score / len(choice[1:]) for score, choice in zip(found, row["choices"], strict=True)]
        for row, found in zip(rows, scores, strict=True)
    ]


def best(scores):
    return [int(np.argmax(found)) for found in scores]


def answered(rows, answers):
    return [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("torch") / "llama", seed=1)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    return random_rows(200)


@pytest.fixture(scope="module")
def scores(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch_scores(model, AutoTokenizer.from_pretrained(folder), rows)


def evaluate(capsys, model, path, *flags):
    assert main(["evaluate", "--model", str(model), "--data.path", path, *flags]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_accuracies_of_the_command_line_are_those_of_torch(folder, rows, scores, tmp_path, capsys):
    found = evaluate(capsys, folder, write(tmp_path / "rows.jsonl", rows))
    answers = np.asarray([row["answer"] for row in rows])
    assert found["count"] == 200
    assert found["accuracy"] == np.mean(best(scores) == answers)
    assert found["accuracy_norm"] == np.mean(best(per_character(rows, scores)) == answers)
    assert found["accuracy"] != found["accuracy_norm"]
    nll = -np.mean([score[answer] for score, answer in zip(scores, answers, strict=True)])
    assert found["nll"] == pytest.approx(nll, abs=1e-4)


def test_every_row_has_the_choice_of_torch(folder, rows, scores):
    # With torch's choices for the right answers, ours are all right if they are the same.
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    config = DataConfig("rows", max_length=256)
    for name, chosen in (
        ("accuracy", best(scores)),
        ("accuracy_norm", best(per_character(rows, scores))),
    ):
        found = score_choices(model, tokenizer, answered(rows, chosen), config, progress=False)
        assert getattr(found, name) == 1.0


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_log_likelihood_is_that_of_torch(folder, rows, scores, every):
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    config = DataConfig("rows", max_length=256)
    # Beside the row with the most to score, all have one shape and are compiled once.
    most = max(range(len(rows)), key=lambda i: len(json.dumps(rows[i])))
    for row, expected in zip(rows[::every], scores[::every], strict=True):
        answer = len(row["prompt"]) % len(row["choices"])
        both = answered([row, rows[most]], [answer, 0])
        found = score_choices(model, tokenizer, both, config, batch_size=2, progress=False)
        assert -2 * found.nll == pytest.approx(expected[answer] + scores[most][0], abs=2e-4)


def test_perplexity_of_the_command_line_is_that_of_torch(folder, tmp_path, capsys):
    rng = np.random.default_rng(1)
    texts = [some_text(rng, 1, 40) for _ in range(50)]
    found = evaluate(
        capsys, folder, write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    )
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    # BOS is given, and EOS is to be predicted, as in training.
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    total = sum(log_likelihoods(model, ids, [1] * len(ids)))
    assert found["tokens"] == sum(len(one) - 1 for one in ids)
    assert found["nll"] == pytest.approx(-total / found["tokens"], rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-total / found["tokens"]), rel=1e-4)


@pytest.mark.slow
def test_smollm2_chooses_as_torch_does(smollm2, tmp_path, capsys):
    with (smollm2.parent / "reviews" / "test.jsonl").open(encoding="utf-8") as lines:
        reviews = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    choices = [" clearly negative, a bad film", " positive", " quite positive: a joy"]
    rows = [
        {
            "prompt": review["prompt"],
            "completion": choices[right := int("positive" in review["completion"])],
            "choices": choices,
            "answer": right,
        }
        for review in reviews
    ]
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    scores = torch_scores(model.eval(), load_tokenizer(smollm2), rows)
    norm = per_character(rows, scores)
    path = write(tmp_path / "rows.jsonl", rows)
    found = evaluate(capsys, smollm2, path)
    answers = np.asarray([row["answer"] for row in rows])
    assert found["count"] == 200
    assert found["accuracy"] == np.mean(best(scores) == answers)
    assert found["accuracy_norm"] == np.mean(best(norm) == answers)
    nll = -np.mean([score[answer] for score, answer in zip(scores, answers, strict=True)])
    assert found["nll"] == pytest.approx(nll, abs=1e-4)
    for name, chosen in (("accuracy", best(scores)), ("accuracy_norm", best(norm))):
        path = write(tmp_path / f"{name}.jsonl", answered(rows, chosen))
        assert evaluate(capsys, smollm2, path)[name] == 1.0
