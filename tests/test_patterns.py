"""Regular expressions of strangers: those of Python's `re`, within bounds."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loft_jax.errors import InputError
from loft_jax.patterns import Patterns

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "lm_head",
    "model.embed_tokens",
]


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            ["model", r"\.", "layers", r"\d+", "[0-9]", "(q|k|v)_proj", ".*", "(?:up)?", "_proj",
             "^", "$", r"\w{1,3}", "(.*\\.)?", "lm_head", "|", "[^.]+", "(?!lm)", "self_attn"]
        ),
        max_size=8,
    )
)  # fmt: skip
def test_matches_are_those_of_re(parts):
    pattern = "".join(parts)
    ours = Patterns("p")
    for name in NAMES:
        assert bool(ours.fullmatch(pattern, name)) == bool(re.fullmatch(pattern, name))
        assert bool(ours.match(pattern, name)) == bool(re.match(pattern, name))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            ["q_proj", "proj", "a.q_proj", "^a.q_proj", r"^a\.q_proj", r"a\.q", "b.a.q-proj",
             ".q_proj", "a.", "^", "", "[ab].q.proj", ".*", "q.proj", r"^b\.a\.q\-proj", "a|b"]
        ),
        unique=True,
    )
)  # fmt: skip
def test_the_first_pattern_of_an_end_is_that_of_peft(keys):
    from peft.utils.other import get_pattern_key

    ours = Patterns("rank_pattern")
    for name in ("a.q_proj", "b.a.q_proj", "b.a.q-proj", "xa.q_proj", "q_proj", "a..q_proj", "b"):
        assert (ours.first_end(keys, name) or name) == get_pattern_key(keys, name)


def test_patterns_that_are_names_are_not_matched_one_by_one(monkeypatch):
    """An adapter may have one for each module, and each pair of them would take time."""
    monkeypatch.setattr(Patterns, "match", None)
    names = [f"layers.{number}.up_proj" for number in range(3)]
    for keys in (names, [f"^{re.escape(name)}" for name in names]):
        assert [Patterns("p").first_end(keys, name) for name in names] == keys


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "is no regular expression"),
        ("(?R)?a", "is no regular expression"),
        ("(" * 5000 + ")" * 5000, "is no regular expression"),
        ("((((a{1000}){1000}){1000}){1000})", "repeats more than"),
        ("(a{1,99999}){1,99999}", "repeats more than"),
        ("a" * 300_000, "more than 200000 characters"),
    ],
)
def test_what_cannot_be_compiled_within_bounds_is_refused(pattern, said):
    with pytest.raises(InputError, match="target_modules: .*" + said) as raised:
        Patterns("target_modules").check(pattern)
    assert len(str(raised.value)) < 600


def test_patterns_that_take_forever_are_given_up(monkeypatch):
    monkeypatch.setattr("loft_jax.patterns._SECONDS", 0.5)
    with pytest.raises(InputError, match=r"target_modules: matching .* takes too long"):
        Patterns("target_modules").fullmatch(r"(?:a|aa)+[^a]", "a" * 60)  # 2^40 ways


def test_patterns_that_take_long_are_given_up_together(monkeypatch):
    monkeypatch.setattr("loft_jax.patterns._SECONDS", 0.5)
    patterns = Patterns("target_modules")
    before = time.monotonic()
    with pytest.raises(InputError, match="takes too long"):  # noqa: PT012
        while time.monotonic() - before < 60:
            patterns.fullmatch(r"(?:a|aa)+[^a]", "a" * 25)


def test_the_time_of_compiling_counts(monkeypatch):
    monkeypatch.setattr("loft_jax.patterns._SECONDS", 0.2)
    patterns = Patterns("rank_pattern")
    with pytest.raises(InputError, match="takes too long"):  # noqa: PT012
        for number in range(100_000):
            patterns.check(rf"(?:.*\.)?layers\.{number}\.(up|down)_proj")


@pytest.mark.parametrize("pattern", ["(?:proj){e<=1}", "[[:alpha:]]+"])
def test_forms_that_re_reads_otherwise_are_refused(pattern):
    with pytest.raises(InputError, match="which is read in two ways"):
        Patterns("p").check(pattern)
