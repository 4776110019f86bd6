"""Classification and regression of texts or pairs of texts."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from loft_jax.data import DataConfig, TokenizedData
from loft_jax.data.batches import Batch
from loft_jax.data.encode import Labelled, pad_id
from loft_jax.data.log_once import log_now, log_unused
from loft_jax.data.row_formats import column_names, only_field, require_fields, text_of
from loft_jax.data.text import check_tokens
from loft_jax.data.token_cache import cached
from loft_jax.errors import InputError, explained, shown
from loft_jax.models.family import SequenceClassifier
from loft_jax.tasks.row_task import RowTask, names_of_numbers, plain, same_names
from loft_jax.tasks.task import Arrays, Given, Measured, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_CHUNK = 1000  # rows handed to the tokenizer at once


class _OfTexts(RowTask):
    """The common part of classification and regression: a text or a pair of texts with a label."""

    head = "sequence-classification"
    fields = ("text_field", "label_field")
    peft_type = "SEQ_CLS"

    def tokenize(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        data: DataConfig,
        *,
        vocab_size: int | None = None,
    ) -> TokenizedData:
        """Encodes texts with the tokenizer's special tokens, truncated to `max_length`.

        If a pair is too long, its longer text is truncated.
        """
        named = data.text_pair_field != DataConfig.text_pair_field
        pair = [data.text_pair_field] if named or data.text_pair_field in column_names(rows) else []
        used = [data.text_field, *pair, data.label_field]
        columns = require_fields(rows, used, f"for {self.name}")
        log_unused(tokenizer, columns, used, data)
        filler = pad_id(tokenizer)
        check_tokens([filler], tokenizer, vocab_size, where="padding")
        label_of = self.reader(rows, data.label_field)
        # Not from the cache, which does not know the code of another task's labels.
        labels = [
            label_of(row, index) for index, row in enumerate(only_field(rows, data.label_field))
        ]

        def make() -> dict[str, np.ndarray]:
            return _tokenized(rows, tokenizer, data, used[:-1], vocab_size)

        settings = {"fields": used[:-1], "max_length": data.max_length, "vocab": vocab_size}
        arrays = cached(make, rows, tokenizer, settings)
        tokens = arrays["tokens"]
        labelled = Labelled(arrays["token_types"], np.asarray(labels, self.label_dtype))
        every = np.ones(len(tokens), bool)
        return TokenizedData(tokens, every, arrays["offsets"], filler, labelled)

    def inputs(self, batch: Batch) -> Batch:
        """Selects tokens, token types and labels, with a weight of 0 for rows of padding."""
        kept = {name: batch[name] for name in ("tokens", "segment_ids", "token_types", "labels")}
        real = np.any(batch["segment_ids"] > 0, axis=1)  # (b,)
        return {**kept, "weights": np.asarray(real, np.float32)}

    def shapes(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Gives the shapes of a batch."""
        names = ("tokens", "segment_ids", "token_types")
        return {
            **{name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names},
            "labels": jax.ShapeDtypeStruct((rows,), self.label_dtype),
            "weights": jax.ShapeDtypeStruct((rows,), jnp.float32),
        }

    def logits(self, model: SequenceClassifier, inputs: Arrays) -> jax.Array:
        """Computes the logits of a batch, (b, labels) float32."""
        tokens, *kinds = (jnp.asarray(inputs[n]) for n in ("tokens", "segment_ids", "token_types"))
        return model(tokens, segment_ids=kinds[0], token_types=kinds[1])


def _tokenized(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    data: DataConfig,
    fields: Sequence[str],
    vocab_size: int | None,
) -> dict[str, np.ndarray]:
    """Makes the arrays of `TokenizedData` and `Labelled`, but for the labels."""
    tokens: list[np.ndarray] = []
    types: list[np.ndarray] = []
    cut = 0
    with tqdm(total=len(rows), desc="tokenizing", unit="row", leave=False, delay=2) as bar:
        for start in range(0, len(rows), _CHUNK):
            some = [(i, rows[i]) for i in range(start, min(start + _CHUNK, len(rows)))]
            texts = [[text_of(row, field, i) for i, row in some] for field in fields]
            for (index, _), (ids, kinds, shorter) in zip(
                some, _encode(tokenizer, texts, data.max_length), strict=True
            ):
                check_tokens(ids, tokenizer, vocab_size, where=f"row {index}")
                cut += shorter
                tokens.append(np.asarray(ids, np.int32))
                types.append(np.asarray(kinds, np.int32))
            bar.update(len(some))
    if empty := [index for index, ids in enumerate(tokens) if not len(ids)]:
        raise InputError(f"row {empty[0]}: the text has no token; expected some text")
    if cut:
        log_now(f"shortened {cut} of {len(rows)} examples to max_length {data.max_length}")
    return {
        "tokens": np.concatenate(tokens),
        "token_types": np.concatenate(types),
        "offsets": np.cumsum([0, *map(len, tokens)], dtype=np.int64),
    }


def _encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[str]], max_length: int
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Tokens and token types of texts, or of pairs of them, and whether each was shortened."""
    with explained("the tokenizer cannot encode a text"):
        encoded = tokenizer(*texts, verbose=False)
        for number, ids in enumerate(encoded["input_ids"]):
            one, place = encoded, number
            if shorter := len(ids) > max_length:
                alone = [[some[number]] for some in texts]
                how = {"truncation": "longest_first", "max_length": max_length, "verbose": False}
                one, place = tokenizer(*alone, **how), 0
            ids = one["input_ids"][place]
            kinds = one.get("token_type_ids")
            yield ids, kinds[place] if kinds else [0] * len(ids), shorter


class LabelTask(RowTask):
    """Predicts one of several labels; the loss is the cross entropy."""

    label_dtype = np.int32
    reported_loss = "nll"
    measures = ("loss", "accuracy", "f1", "matthews")
    best_metrics = ("accuracy",)
    labels: tuple[str, ...]

    def __init__(self, labels: Sequence[str], class_weights: Sequence[float] = ()) -> None:
        """Sets the labels.

        Args:
            labels: Names of the labels, in the order of the model's logits.
            class_weights: Weight of each label in the loss of training; empty for equal ones.

        Raises:
            InputError: There are fewer than two labels, two are the same, or there are not as many
                weights.
        """
        self.labels = tuple(labels)
        self.class_weights = tuple(class_weights)
        if len(self.labels) < 2:
            raise InputError(f"labels are {shown(list(labels))}, expected two at least")
        if len(set(self.labels)) < len(self.labels):
            raise InputError(f"labels are {shown(list(labels))}, expected each once")
        if self.class_weights and len(self.class_weights) != len(self.labels):
            raise InputError(
                f"class_weights are {shown(list(class_weights))}, expected one for each of the "
                f"labels {shown(list(labels))}"
            )
        self._places = {name: place for place, name in enumerate(self.labels)}
        folded = {name.casefold(): place for name, place in self._places.items()}
        # Empty if case tells names apart.
        self._folded = folded if len(folded) == len(self.labels) else {}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._made_of == self._made_of

    def __hash__(self) -> int:
        return hash(self._made_of)

    @property
    def _made_of(self) -> tuple[Any, ...]:
        return self.labels, self.class_weights

    @classmethod
    def make(cls, given: Given) -> Self:
        """Makes the task with the labels that are set, or else with those of rows or model.

        The labels of the model are used if rows have the same ones or their numbers, and if there
        are no rows.
        """
        cls.refuse(given, "choices")
        task = cls(cls._labels(given))
        if given.class_weights == "balanced":
            return cls(task.labels, task._balanced(given))
        return cls(task.labels, given.class_weights)

    @staticmethod
    def _labels(given: Given) -> Sequence[str]:
        if given.labels:
            return given.labels
        if given.rows is None:
            if len(given.known) == 1:
                raise InputError(
                    f"the model has one output, {given.known[0]!r}, as of a regression; expected "
                    "numbers as labels of rows, or a model with two labels at least"
                )
            return given.known
        field = given.data.label_field
        if (found := labels_of(given.rows, field)) is None:
            raise InputError(
                f"field {field!r} holds decimal numbers; expected labels, or task regression"
            )
        numbers = found == tuple(map(str, range(len(found))))
        if same_names(found, given.known):
            return given.known
        if not numbers or len(found) > len(given.known):
            return found
        if len(found) < len(given.known):
            _log.warning(
                "rows have labels up to %s and the model has %d labels, which are kept; for a head "
                "of the labels of the rows, name them by label_names",
                *(found[-1], len(given.known)),
            )
        return given.known

    def _balanced(self, given: Given) -> list[float]:
        """Computes weights for which all labels count as much as each other in the rows."""
        if given.rows is None:
            raise InputError("class_weights are 'balanced', which is by rows, but there are none")
        field = given.data.label_field
        label_of = self.reader(given.rows, field)
        rows = only_field(given.rows, field)
        places = [int(label_of(row, index)) for index, row in enumerate(rows)]
        counts = np.bincount(places, minlength=len(self.labels))
        if (counts == 0).any():
            name = self.labels[int(np.argmin(counts))]
            raise InputError(
                f"class_weights are 'balanced', but no row has the label {shown(name)}; expected "
                "some rows of each label"
            )
        return [float(weight) for weight in len(places) / (len(counts) * counts)]

    def settings(self) -> dict[str, list[str]]:
        """Gives the labels; class weights matter to training alone."""
        return {"labels": list(self.labels)}

    def label(self, value: object, where: str) -> int:
        """Gives the index of a label, from its name or, unless names are numbers, its number."""
        value = plain(value)
        if not isinstance(value, bool):
            place = self._places.get(str(value), self._folded.get(str(value).casefold()))
            if place is not None:
                return place
        number: Any = _number(value) if isinstance(value, str) else value
        named = not all(isinstance(_number(name), int) for name in self.labels)
        whole = isinstance(number, int) and not isinstance(number, bool)
        if named and whole and 0 <= number < len(self.labels):
            return int(number)
        raise InputError(
            f"{where} is {shown(value)}; expected one of {shown(list(self.labels))}, or its number"
        )

    def losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the cross entropy, in nats."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def weights(self, labels: jax.Array) -> jax.Array:
        """Gives the weights of the labels."""
        return jnp.asarray(self.class_weights or [1.0] * len(self.labels))[labels]

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Measured:
        """Computes GLUE's metrics: accuracy, F1 and Matthews' correlation.

        F1 is that of label 1 if there are two labels, and else the mean over all labels.
        """
        chosen = np.where(np.isnan(logits).any(axis=1), -1, logits.argmax(axis=1))
        count = len(self.labels)
        right = chosen == labels
        hits = np.bincount(labels[right], minlength=count).astype(float)
        said = np.bincount(chosen[chosen >= 0], minlength=count).astype(float)
        true = np.bincount(labels, minlength=count).astype(float)
        f1 = np.divide(2 * hits, said + true, out=np.zeros(count), where=said + true > 0)
        n = float(len(labels))
        spread = math.sqrt((n**2 - said @ said) * (n**2 - true @ true))
        values = {
            "accuracy": float(right.mean()),
            "f1": float(f1[1] if count == 2 else f1.mean()),
            "matthews": (hits.sum() * n - said @ true) / spread if spread else 0.0,
        }
        return Measured(values, {}, {"accuracy": tuple(map(bool, right))})


class Classification(_OfTexts, LabelTask):
    """Predicts one of several labels of a text or of a pair of texts."""

    name = "classification"

    @classmethod
    def fits(cls, given: Given) -> bool:
        """Whether texts have labels, or names of labels are set."""
        return bool(given.labels) or (_is_labelled(given) and not _is_numeric(given))


class Regression(_OfTexts):
    """Predicts a number; the loss is the squared error."""

    name = "regression"
    label_dtype = np.float32
    reported_loss = "mse"
    measures = ("loss", "pearson", "spearman")
    labels = ("LABEL_0",)  # as transformers calls a single output

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    @classmethod
    def fits(cls, given: Given) -> bool:
        """Whether texts have numbers: decimal ones, or whole ones for a model of one output."""
        return not given.labels and _is_labelled(given) and _is_numeric(given)

    def label(self, value: object, where: str) -> float:
        """Checks the number, or reads it from a text."""
        value = plain(value)
        if isinstance(value, bool):
            raise InputError(f"{where} is {value}; expected a finite number: write 0 and 1")
        number: Any = _number(value) if isinstance(value, str) else value
        is_number = isinstance(number, (int, float))
        if is_number and math.isfinite(number):
            return float(number)
        raise InputError(f"{where} is {shown(value)}; expected a finite number")

    def losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Computes the squared error of the number that the model predicts."""
        return jnp.square(logits[:, 0] - labels)

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Measured:
        """Computes Pearson's and Spearman's correlations, 0 if one side is constant."""
        given, true = logits[:, 0], labels.astype(np.float64)
        values = {
            "pearson": _correlation(given, true),
            "spearman": _correlation(_ranks(given), _ranks(true)),
        }
        return Measured(values, {})


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread else 0.0


def _ranks(x: np.ndarray) -> np.ndarray:
    """Computes ranks; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _is_labelled(given: Given) -> bool:
    return {given.data.text_field, given.data.label_field} <= set(column_names(given.rows))


def _is_numeric(given: Given) -> bool:
    labels = labels_of(given.rows, given.data.label_field)
    if labels is None:
        return True
    return len(given.known) == 1 and all(isinstance(_number(name), int) for name in labels)


def labels_of(rows: Rows, field: str) -> tuple[str, ...] | None:
    """Finds the labels of rows.

    Files of CSV and TSV have texts only; there, numbers are texts that read as numbers.

    Args:
        rows: From `load_examples`, or plain dicts.
        field: Field with the label.

    Returns:
        Names of the labels: for integers, the names that the dataset gives them or the numbers from
        0 to the largest; for texts, the texts, in the order of their numbers if all of them are
        integers and else in alphabetical order. None for decimal numbers.

    Raises:
        InputError: Labels are of several kinds, of another kind, empty or too many.
    """
    if names := names_of_numbers(rows, field):
        return names
    values: list[Any] = [plain(row.get(field)) for row in only_field(rows, field)]
    texts = isinstance(values[0], str)
    for index, value in enumerate(values):
        where = f"row {index}: field {field!r}"
        if value == "":
            raise InputError(f"{where} is empty; expected a label")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (isinstance(value, str) if texts else is_number):
            others = f", and that of row 0 is {shown(values[0])}" if index else ""
            instead = ": write 0 and 1, or texts" if isinstance(value, bool) else ""
            raise InputError(
                f"{where} is {shown(value)}{others}; expected texts or numbers in all rows{instead}"
            )
    numbers: list[Any] = [_number(value) if texts else value for value in values]
    whole = all(isinstance(number, int) for number in numbers)
    if not whole and all(isinstance(number, (int, float)) for number in numbers):
        return None
    if not texts:
        return _numbered(numbers, field)
    distinct = sorted(set(values), key=int if whole else None)
    if len(distinct) > _MOST_LABELS:
        raise InputError(
            f"field {field!r} has {len(distinct)} labels, expected {_MOST_LABELS} at most"
        )
    return tuple(distinct)


def _number(text: str) -> int | float | None:
    """The number that a text reads as; None for other texts."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return None


def _numbered(values: Sequence[int], field: str) -> tuple[str, ...]:
    """The numbers from 0 to the largest."""
    if (least := min(values)) < 0:
        raise InputError(
            f"row {values.index(least)}: field {field!r} is {least}; expected 0 or more"
        )
    if (most := max(values)) >= _MOST_LABELS:
        raise InputError(
            f"field {field!r} goes up to {most}; expected labels below {_MOST_LABELS}, or decimal "
            "numbers for regression"
        )
    return tuple(str(number) for number in range(most + 1))


_MOST_LABELS = 10_000
