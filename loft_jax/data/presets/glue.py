"""GLUE: nine tasks of understanding sentences and pairs of them (Wang et al., arXiv 1804.07461).

Each is read as published, in TSV files without quoting, and as the hub has it, in files with the
columns of `nyu-mll/glue`. Labels may be names or numbers in both.
"""

import math
from collections.abc import Sequence
from typing import Any

from loft_jax.data.presets.preset import Preset, Row
from loft_jax.errors import InputError, shown

_SENTENCE = (("sentence",),)
_PAIR = (("sentence1", "sentence2"),)


class _Example:
    """Makes an example from a row: one or two texts, and a label or a number."""

    def __init__(
        self, texts: Sequence[tuple[str, ...]], label: Sequence[str], labels: Sequence[str] = ()
    ) -> None:
        """Sets the columns.

        Args:
            texts: Columns of the texts, by each of the published forms.
            label: Column of the label, by each of the forms.
            labels: Names of the labels; empty for numbers.
        """
        self._texts, self._label, self._labels = texts, label, labels

    def __call__(self, row: Row, where: str) -> dict[str, Any]:
        """Makes the example.

        Args:
            row: Of a file.
            where: Its place, for messages.

        Returns:
            `text`, `text_pair` for pairs, and `label`: its name, or a number.

        Raises:
            InputError: The row has other columns, no label, or another label.
        """
        texts = next((form for form in self._texts if set(form) <= set(row)), None)
        if texts is None:
            forms = " or ".join(" and ".join(form) for form in self._texts)
            raise InputError(
                f"{where} has the columns {shown(sorted(map(str, row)))}; expected {forms}"
            )
        label = next((row[name] for name in self._label if name in row), None)
        if label is None or str(label) in ("", "-1", "-1.0"):
            raise InputError(
                f"{where} has no label, as in GLUE's test sets; expected a split with labels"
            )
        of_texts = dict(zip(("text", "text_pair"), (row[name] for name in texts), strict=False))
        return {**of_texts, "label": self._value(label, where)}

    def _value(self, label: Any, where: str) -> str | float:
        if not self._labels:
            try:
                number = float(label)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise InputError(f"{where} has the label {shown(label)}; expected a number")
            return number
        if label in self._labels:
            return str(label)
        if str(label).isdecimal() and int(label) < len(self._labels):
            return self._labels[int(label)]
        raise InputError(
            f"{where} has the label {shown(label)}; expected one of {shown(list(self._labels))}, "
            "or its number"
        )


def _classification(
    name: str,
    texts: Sequence[tuple[str, ...]],
    labels: tuple[str, ...],
    *,
    label: tuple[str, ...] = ("label",),
    best_metrics: tuple[str, ...] = ("accuracy",),
    **settings: Any,
) -> Preset:
    example = _Example(texts, label, labels)
    return Preset(
        name, "classification", example, labels=labels, best_metrics=best_metrics, **settings
    )


GLUE = (
    _classification(
        "cola",
        _SENTENCE,
        ("unacceptable", "acceptable"),
        best_metrics=("matthews",),
        columns=("source", "label", "mark", "sentence"),
    ),
    _classification("sst2", _SENTENCE, ("negative", "positive")),
    _classification(
        "mrpc",
        (*_PAIR, ("#1 String", "#2 String")),
        ("not_equivalent", "equivalent"),
        label=("label", "Quality"),
        best_metrics=("f1", "accuracy"),
    ),
    Preset(
        "stsb",
        "regression",
        _Example(_PAIR, ("label", "score")),
        best_metrics=("pearson", "spearman"),
    ),
    _classification(
        "qqp",
        (("question1", "question2"),),
        ("not_duplicate", "duplicate"),
        label=("label", "is_duplicate"),
        best_metrics=("f1", "accuracy"),
    ),
    _classification(
        "mnli",
        (("premise", "hypothesis"), *_PAIR),
        ("entailment", "neutral", "contradiction"),
        label=("label", "gold_label"),
        files={
            "train": ("train",),
            "validation_matched": ("dev_matched", "validation_matched"),
            "validation_mismatched": ("dev_mismatched", "validation_mismatched"),
            "test_matched": ("test_matched",),
            "test_mismatched": ("test_mismatched",),
        },
        held_out="validation_matched",
    ),
    _classification("qnli", (("question", "sentence"),), ("entailment", "not_entailment")),
    _classification("rte", _PAIR, ("entailment", "not_entailment")),
    _classification("wnli", _PAIR, ("not_entailment", "entailment")),
)
"""The presets of GLUE; of `mnli` both splits for validation can be evaluated on."""
