"""Classification and regression: labels, what goes into a model, metrics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from loft_jax.data import DataConfig, eval_batches, train_stream
from loft_jax.errors import InputError
from loft_jax.models.registry import FAMILIES
from loft_jax.tasks import Classification, Regression, infer_task, make_task
from loft_jax.tasks.classification import labels_of
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DATA = DataConfig("rows", max_length=40)
ROWS = [
    {"text": "a joy from start to finish", "label": "good"},
    {"text": "dull, loud and far too long", "label": "bad"},
    {"text": "the plot", "label": "bad"},
]
RANDOM = np.random.default_rng(0)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_metrics_of_labels_are_those_of_scikit_learn(count, rows, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, count, rows).astype(np.int32)
    logits = rng.normal(size=(rows, count))
    task = Classification([f"label {i}" for i in range(count)])
    found = task.metrics(logits, labels)
    chosen = logits.argmax(axis=1)
    average = {"average": "binary"} if count == 2 else {"average": "macro"}
    f1 = (
        f1_score(labels, chosen, labels=range(count), zero_division=0, **average)
        if (count > 2)
        else f1_score(labels, chosen, zero_division=0)
    )
    assert found.values == {
        "accuracy": pytest.approx(accuracy_score(labels, chosen)),
        "f1": pytest.approx(f1),
        "matthews": pytest.approx(matthews_corrcoef(labels, chosen), abs=1e-12),
    }
    assert found.right["accuracy"] == tuple(labels == chosen)


def test_metrics_of_numbers_are_those_of_scipy():
    true = RANDOM.integers(0, 4, 50).astype(np.float32)  # with ties
    given = true + RANDOM.normal(size=50)
    found = Regression().metrics(given[:, None], true).values
    assert found["pearson"] == pytest.approx(pearsonr(given, true).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(given, true).statistic)


def test_a_model_that_says_no_number_is_right_nowhere():
    logits = np.full((3, 2), np.nan)
    found = Classification(["a", "b"]).metrics(logits, np.asarray([0, 1, 0]))
    assert found.values["accuracy"] == 0.0


def test_a_constant_has_no_correlation():
    assert Regression().metrics(np.zeros((3, 1)), np.arange(3.0)).values["pearson"] == 0.0


def test_texts_are_encoded_as_the_tokenizer_does():
    task = Classification(["bad", "good"])
    data = task.tokenize(ROWS, TOKENIZER, DATA)
    assert [list(data[i].tokens) for i in range(3)] == TOKENIZER([row["text"] for row in ROWS])[
        "input_ids"
    ]
    assert data.labelled.labels.tolist() == [1, 0, 0]


def test_pairs_have_token_types_and_the_longer_text_is_cut():
    rows = [{"text": "the plot " * 30, "text_pair": "a joy", "label": 0}]
    data = DataConfig("rows", max_length=16)
    tokens = Classification(["no", "yes"]).tokenize(rows, TOKENIZER, data)
    expected = TOKENIZER(
        rows[0]["text"], rows[0]["text_pair"], truncation="longest_first", max_length=16
    )
    assert list(tokens[0].tokens) == expected["input_ids"]
    assert len(tokens[0].tokens) == 16
    types = expected.get("token_type_ids", [0] * 16)
    assert tokens.labelled.token_types.tolist() == types


def test_batches_carry_labels_and_padding_weighs_nothing():
    task = Classification(["bad", "good"])
    (batch,) = eval_batches(task.tokenize(ROWS, TOKENIZER, DATA), DATA, batch_size=4)
    inputs = task.inputs(batch)
    assert inputs["weights"].tolist() == [1, 1, 1, 0]
    assert inputs["labels"].tolist() == [0, 1, 0, 0]  # shortest first
    shapes = task.shapes(4, inputs["tokens"].shape[1])
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in inputs.items()
    }


def test_a_stream_carries_labels_and_knows_them_again():
    task = Classification(["bad", "good"])
    stream = train_stream(task.tokenize(ROWS, TOKENIZER, DATA), DATA, batch_size=3, seed=0)
    other = [{**row, "label": "good"} for row in ROWS]
    changed = train_stream(task.tokenize(other, TOKENIZER, DATA), DATA, batch_size=3, seed=0)
    assert sorted(next(stream)["labels"].tolist()) == [0, 0, 1]
    with pytest.raises(InputError, match="another data stream"):
        changed.set_state(stream.get_state())


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "2", "0"], ("0", "2", "10")),  # texts, as a file of CSV has them
        (["1", "b"], ("1", "b")),
        (["0.5", "3"], None),
        ([-1, 0.5], None),
        ([2, 0], ("0", "1", "2")),
        ([0.5, 1], None),
    ],
)
def test_labels_are_read_from_the_rows(values, labels):
    assert labels_of([{"label": value} for value in values], "label") == labels


def test_names_of_whole_numbers_are_those_of_the_dataset():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_list([{"text": "a", "label": 1}], features=features)
    assert labels_of(rows, "label") == ("no", "yes")
    data = make_task("classification", rows, DATA).tokenize(rows, TOKENIZER, DATA)
    assert data.labelled.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: labels_of([{"label": -1}], "label"), r"row 0: field 'label' is -1"),
        (lambda: labels_of([{"label": "a"}, {"label": 1}], "label"), r"row 0: .* all rows"),
        (lambda: labels_of([{"label": None}], "label"), r"row 0: field 'label' is None"),
        (lambda: labels_of([{"label": "a"}, {"label": ""}], "label"), "row 1: .* is empty"),
        (lambda: Classification(["a"]), "expected two at least"),
        (lambda: Classification(["a", "a"]), "expected each once"),
        (
            lambda: Classification(["a", "b"]).tokenize(ROWS, TOKENIZER, DATA),
            r"row 0: field 'label' is 'good'; expected one of \['a', 'b'\]",
        ),
        (
            lambda: Regression().tokenize(ROWS, TOKENIZER, DATA),
            r"row 0: field 'label' is 'good'; expected a finite number",
        ),
        (
            lambda: Classification(["a", "b"]).tokenize([{"text": "a"}], TOKENIZER, DATA),
            "field 'label' is missing",
        ),
        (lambda: make_task("causal-lm", ROWS, DATA, labels=["a", "b"]), "labels are given"),
        (lambda: make_task("classification", None, DATA, choices=["a"]), "choices are given"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("labels", "value", "place"),
    [
        (("no", "yes"), 1, 1),
        (("no", "yes"), "no", 0),
        (("1", "0"), 1, 0),  # names that are numbers are names
        (("1", "0"), "0", 1),
        (("1", "2"), 2, 1),
    ],
)
def test_a_label_is_found_by_its_name_or_its_number(labels, value, place):
    assert Classification(labels).label(value, "here") == place


def test_a_number_that_is_no_name_is_refused():
    with pytest.raises(InputError, match=r"here is 0; expected one of \['1', '2'\]"):
        Classification(("1", "2")).label(0, "here")


def test_numbers_of_a_text_file_are_read():
    rows = [{"text": "a", "label": "3.25"}, {"text": "b", "label": "-1"}]
    data = Regression().tokenize(rows, TOKENIZER, DATA)
    assert data.labelled.labels.tolist() == [3.25, -1.0]


def test_packing_is_refused():
    data = DataConfig("rows", max_length=40, packing=True)
    tokens = Classification(["bad", "good"]).tokenize(ROWS, TOKENIZER, data)
    with pytest.raises(InputError, match="packing"):
        train_stream(tokens, data, batch_size=1, seed=0)


def test_the_task_is_that_which_family_and_rows_have_in_common():
    llama = FAMILIES["llama"]
    assert infer_task(llama, ROWS, None, DATA) == "causal-lm"
    assert infer_task(llama, [{"prompt": "a", "completion": "b"}], None, DATA) == "causal-lm"
    asked = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}]
    assert infer_task(llama, [{"prompt": "a", "completion": "b"}], asked, DATA) == "choice"
    assert infer_task(llama, ROWS, None, DATA, choices=["b", "c"]) == "choice"
