"""Classification and regression: labels, what goes into a model, metrics."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from sklearn.utils.class_weight import compute_class_weight

from loft_jax.data import DataConfig, eval_batches, train_stream
from loft_jax.errors import InputError
from loft_jax.models.registry import FAMILIES
from loft_jax.tasks import TASKS, CausalLM, Classification, Given, Regression, find_task
from loft_jax.tasks.classification import labels_of
from loft_jax.tasks.image_classification import ImageClassification
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DATA = DataConfig("rows", max_length=40)
SST2 = DataConfig("rows", preset="sst2")
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


@pytest.mark.parametrize("rounded", [False, True])
def test_metrics_of_numbers_are_those_of_scipy(rounded):
    true = RANDOM.integers(0, 4, 50).astype(np.float32)  # with ties
    given = true + RANDOM.normal(size=50)
    given = np.round(given) if rounded else given  # with ties on both sides
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
        (np.asarray([2, 0]), ("0", "1", "2")),
        (np.asarray([0.5, 1], np.float32), None),
        (np.asarray(["b", "a"]), ("a", "b")),
        ([np.int8(1), 0], ("0", "1")),
    ],
)
def test_labels_are_read_from_the_rows(values, labels):
    assert labels_of([{"label": value} for value in values], "label") == labels


def test_names_of_whole_numbers_are_those_of_the_dataset():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_list([{"text": "a", "label": 1}], features=features)
    assert labels_of(rows, "label") == ("no", "yes")
    data = Classification.make(Given(DATA, rows)).tokenize(rows, TOKENIZER, DATA)
    assert data.labelled.labels.tolist() == [1]


def test_labels_are_read_without_decoding_images():
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "label": Value("string")})
    columns = {"image": [{"bytes": b"none", "path": None}] * 2, "label": ["b", "a"]}
    rows = Dataset.from_dict(columns, features=features)
    with pytest.raises(Exception, match="cannot identify image"):
        rows[0]
    assert labels_of(rows, "label") == ("a", "b")
    balanced = Given(DATA, rows, class_weights="balanced")
    assert ImageClassification.make(balanced).class_weights == (1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: labels_of([{"label": -1}], "label"), r"row 0: field 'label' is -1"),
        (lambda: labels_of([{"label": "a"}, {"label": 1}], "label"), r"row 1: .* of row 0 is 'a'"),
        (lambda: labels_of([{"label": 1}, {"label": "a"}], "label"), r"row 1: .* of row 0 is 1"),
        (lambda: labels_of([{"label": "a"}, {"label": None}], "label"), r"row 1: .* is None, and"),
        (lambda: labels_of([{"label": None}], "label"), r"row 0: field 'label' is None"),
        (lambda: labels_of([{"label": "a"}, {"label": ""}], "label"), "row 1: .* is empty"),
        (lambda: labels_of([{"label": True}], "label"), "True; .*: write 0 and 1, or texts"),
        (lambda: labels_of([{"label": np.True_}], "label"), "True; .*: write 0 and 1, or texts"),
        (lambda: Regression().label(False, "here"), "here is False; .*: write 0 and 1"),
        (lambda: Regression().label(np.float32("nan"), "here"), "here is nan; expected a finite"),
        (lambda: Classification(["False", "True"]).label(np.True_, "here"), "here is True; "),
        (lambda: Classification(["a"]), "expected two at least"),
        (
            lambda: Classification.make(Given(DATA, known=["LABEL_0"])),
            "the model has one output, 'LABEL_0', as of a regression; expected numbers as labels",
        ),
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
        (
            lambda: Classification.make(Given(DATA, ROWS, class_weights=(1.0,))),
            r"class_weights are \[1.0\], expected one for each of the labels \['bad', 'good'\]",
        ),
        (
            lambda: Classification.make(
                Given(DATA, ROWS[1:], labels=["bad", "good"], class_weights="balanced")
            ),
            "'balanced', but no row has the label 'good'",
        ),
        (
            lambda: Classification.make(Given(DATA, known=["a", "b"], class_weights="balanced")),
            "'balanced', which is by rows, but there are none",
        ),
        (
            lambda: Regression.make(Given(DATA, NUMBERS, class_weights="balanced")),
            "class_weights are 'balanced', but task regression has none",
        ),
        (
            lambda: CausalLM.make(Given(DATA, TEXTS, class_weights=(1.0, 2.0))),
            r"class_weights are \[1.0, 2.0\], but task causal-lm has none",
        ),
        (
            lambda: find_task("regression", FAMILIES["bert"], Given(SST2, ROWS)),
            "task is 'regression', but preset sst2 is for classification",
        ),
        (lambda: CausalLM.make(Given(DATA, ROWS, labels=["a", "b"])), "labels are .*has none"),
        (lambda: Classification.make(Given(DATA, choices=["a"])), "choices are .*has none"),
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
        (("no", "yes"), "1", 1),
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


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.float16, np.float32, np.float64])
def test_numbers_of_numpy_are_numbers(kind):
    assert Regression().label(kind(2), "here") == 2.0
    assert type(Regression().label(kind(2), "here")) is float


def test_numbers_of_numpy_stand_for_the_names_of_the_data():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_list([{"text": "a", "label": 1}], features=features).with_format("numpy")
    label_of = Classification(["yes", "no"]).reader(rows, "label")
    assert label_of(rows[0], 0) == 0


def test_numbers_of_a_text_file_are_read():
    rows = [{"text": "a", "label": "3.25"}, {"text": "b", "label": "-1"}]
    data = Regression().tokenize(rows, TOKENIZER, DATA)
    assert data.labelled.labels.tolist() == [3.25, -1.0]


@pytest.mark.parametrize("class_weights", [(1.0, 3.0, 0.5), "balanced"])
def test_weighted_losses_are_those_of_torch_and_evaluation_has_no_weights(class_weights):
    labels, logits = RANDOM.integers(0, 3, 20), RANDOM.normal(size=(20, 3)).astype(np.float32)
    rows = [{"text": "a joy", "label": "abc"[label]} for label in labels]
    task = Classification.make(Given(DATA, rows, class_weights=class_weights))
    weights = class_weights
    if class_weights == "balanced":
        weights = compute_class_weight("balanced", classes=np.arange(3), y=labels)
        assert task.class_weights == pytest.approx(tuple(weights))
    inputs = {"labels": labels, "weights": np.arange(20) < 18}  # the last rows are padding
    inputs |= {name: np.zeros((20, 1), int) for name in ("tokens", "segment_ids", "token_types")}
    total, weight = task.loss(lambda *_, **__: logits, inputs)
    of_torch = torch.nn.CrossEntropyLoss(torch.tensor(weights, dtype=torch.float32))
    expected = of_torch(torch.tensor(logits[:18]), torch.tensor(labels[:18]))
    assert float(total / weight) == pytest.approx(float(expected), rel=1e-5)
    halves = [
        task.loss(lambda *_, half=half, **__: logits[half], {k: v[half] for k, v in inputs.items()})
        for half in (slice(10), slice(10, 20))
    ]
    sums = np.sum(halves, axis=0)  # parts of a batch add up to the whole
    assert sums[0] / sums[1] == pytest.approx(float(expected), rel=1e-5)
    assert task != Classification("abc")  # a compiled step of one is none of the other


def test_names_of_numbers_stand_for_the_labels_of_a_model_in_another_order():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features)
    task = Classification.make(Given(DATA, rows, known=("yes", "no"), class_weights="balanced"))
    assert task.labels == ("yes", "no")
    assert task.class_weights == pytest.approx((0.75, 1.5))
    assert task.tokenize(rows, TOKENIZER, DATA).labelled.labels.tolist() == [1, 0, 0]
    renamed = Classification.make(Given(DATA, rows, labels=("bad", "good")))
    assert renamed.tokenize(rows, TOKENIZER, DATA).labelled.labels.tolist() == [0, 1, 1]


def test_names_of_labels_may_differ_in_case():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features)
    task = Classification.make(Given(DATA, rows, known=("YES", "NO")))
    assert task.labels == ("YES", "NO")
    assert task.tokenize(rows, TOKENIZER, DATA).labelled.labels.tolist() == [1, 0]
    assert task.label("yes", "here") == 0
    with pytest.raises(InputError, match="here is 'A'"):
        Classification(("a", "b", "B")).label("A", "here")


def test_labels_that_are_taken_by_their_numbers_are_told(caplog):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a"], "label": [1]}, features)
    with caplog.at_level(logging.WARNING):
        Classification(("bad", "good")).tokenize(rows, TOKENIZER, DATA)
    assert "the data has the labels ['no', 'yes'] and the model ['bad', 'good']" in caplog.text


def test_the_best_evaluation_has_the_highest_metric_or_the_lowest_loss():
    values = {"loss": 0.5, "accuracy": 0.75, "f1": 0.25, "matthews": -0.5}
    task = Classification(["a", "b"])
    assert task.score(values) == 0.25
    assert task.score(values, ("matthews",)) == 1.5
    assert task.score(values, ("f1", "accuracy")) == 0.5
    assert CausalLM().score(values) == Regression().score(values) == 0.5
    task.check_metrics(("loss", "f1"))
    with pytest.raises(InputError, match="best_metric is 'mcc', expected some of loss, accuracy"):
        task.check_metrics(("mcc",))


@pytest.mark.parametrize(
    ("task", "logits"), [(Classification(["a", "b"]), np.eye(2)), (Regression(), np.ones((2, 1)))]
)
def test_an_evaluation_has_the_metrics_that_the_task_names(task, logits):
    found = task.metrics(logits, np.asarray([0, 1]))
    assert ("loss", *found.values) == task.measures


def test_packing_is_refused():
    data = DataConfig("rows", max_length=40, packing=True)
    tokens = Classification(["bad", "good"]).tokenize(ROWS, TOKENIZER, data)
    with pytest.raises(InputError, match="packing"):
        train_stream(tokens, data, batch_size=1, seed=0)


TEXTS, PROMPTS = [{"text": "a"}], [{"prompt": "a", "completion": "b"}]
ASKED = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}]
NUMBERS = [{"text": "a", "label": 2.5}]
WHOLE = [{"text": "a", "label": 2}]


@pytest.mark.parametrize(
    ("family", "given", "task"),
    [
        ("llama", Given(DATA, ROWS), "causal-lm"),
        ("llama", Given(DATA, PROMPTS), "causal-lm"),
        ("llama", Given(DATA, PROMPTS, ASKED), "choice"),
        ("llama", Given(DATA, PROMPTS, choices=["b", "c"]), "choice"),
        ("llama", Given(DATA), "causal-lm"),
        ("bert", Given(DATA, ROWS), "classification"),
        ("bert", Given(DATA, WHOLE), "classification"),
        ("bert", Given(DATA, NUMBERS), "regression"),
        ("bert", Given(DATA, WHOLE, known=["score"]), "regression"),
        ("bert", Given(DATA), "classification"),
        ("bert", Given(SST2), "classification"),
        ("bert", Given(DataConfig("rows", preset="stsb"), WHOLE), "regression"),
    ],
)
def test_the_task_is_that_which_family_and_rows_have_in_common(family, given, task):
    assert find_task("auto", FAMILIES[family], given) is TASKS[task]


def test_a_task_that_is_named_is_that_one():
    assert find_task("regression", FAMILIES["bert"], Given(DATA, ROWS)) is Regression


@pytest.mark.parametrize(
    ("family", "name", "data"),
    [
        ("bert", "image-classification", DATA),
        ("vit", "classification", DATA),
        ("vit", "auto", SST2),
        ("bert", "auto", DataConfig("rows", preset="commonsense")),
    ],
)
def test_a_task_that_the_family_has_no_model_for_is_refused(family, name, data):
    with pytest.raises(InputError, match=f"model_type '{family}' has no model for"):
        find_task(name, FAMILIES[family], Given(data, ROWS))


def test_rows_that_fit_no_task_of_a_family_are_refused():
    with pytest.raises(
        InputError,
        match=r"fit no task .* those of classification or regression: 'text' and 'label', or "
        "others that --data.text-field and --data.label-field name",
    ):
        find_task("auto", FAMILIES["bert"], Given(DATA, TEXTS))
    with pytest.raises(InputError, match=r"'image' and 'label', or others that --data.image-field"):
        find_task("auto", FAMILIES["vit"], Given(DATA, TEXTS))


def test_a_named_second_text_that_no_row_has_is_refused():
    rows = [{"text": "a joy", "other": "dull", "label": 0}]
    data = DataConfig("rows", text_pair_field="othr")
    with pytest.raises(InputError, match=r"field 'othr' is missing; found the fields .*'other'"):
        Classification(["no", "yes"]).tokenize(rows, TOKENIZER, data)


@pytest.mark.parametrize(
    ("values", "known", "labels"),
    [
        (["yes", "no"], ("yes", "no"), ("yes", "no")),  # in the order of the model
        ([0, 1], ("yes", "no"), ("yes", "no")),
        (["0", "1"], ("yes", "no"), ("yes", "no")),
        ([0, 2], ("yes", "no"), ("0", "1", "2")),
        (["a", "b"], ("yes", "no"), ("a", "b")),
    ],
)
def test_labels_of_the_model_are_used_where_rows_have_them_or_their_numbers(values, known, labels):
    rows = [{"text": "a", "label": value} for value in values]
    assert Classification.make(Given(DATA, rows, known=known)).labels == labels


@pytest.mark.parametrize("task", [CausalLM(), Classification(["b", "a"]), Regression()])
def test_a_task_is_made_again_from_its_settings(task):
    again = type(task).make(Given(DATA, **task.settings()))
    assert again.labels == task.labels
