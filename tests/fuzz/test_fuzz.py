"""Spoilt files are read or refused: no other exception, no crash, no hang, no gigabytes."""

import os
import pickle
import select
import subprocess
import sys
from collections import Counter

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.fuzz.kinds import KINDS, files_of, make_good
from tests.fuzz.spoiling import spoilt

SECONDS = 10
"""That a case may take."""

CASES = 12
MANY_CASES = int(os.environ.get("FUZZ_CASES", "6000"))
AT_ONCE = 500  # cases of one seed


class Reader:
    """A child process that reads cases, and another one after each that it did not survive."""

    def __init__(self, folder):
        self._folder = folder
        self._child = None

    def read(self, case):
        """What came of a case: "read", "refused", or what is wrong."""
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.child", str(self._folder)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._answer(300) == "ready"
        pickle.dump(case, self._child.stdin)
        self._child.stdin.flush()
        return self._answer(SECONDS)

    def _answer(self, seconds):
        ready, _, _ = select.select([self._child.stdout], [], [], seconds)
        if not ready:
            self.close()
            return f"more than {seconds} seconds"
        try:
            return pickle.load(self._child.stdout)
        except EOFError:
            code = self._child.wait()
            self._child = None
            return f"ended with {code}"

    def close(self):
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "good"
    make_good(folder)
    return folder


@pytest.fixture(scope="module")
def reader(good):
    reader = Reader(good)
    yield reader
    reader.close()


def outcomes(kind, good, reader, *, seed, cases):
    """How often each thing came of some cases, and one case of each."""
    counts, examples = Counter(), {}
    originals = {str(name): (good / name).read_bytes() for name in files_of(kind, good)}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        name = data.draw(st.sampled_from(sorted(originals)))
        content = data.draw(spoilt(originals[name]))
        outcome = reader.read((kind, name, content))
        counts[outcome] += 1
        examples.setdefault(outcome, (name, content))

    run()
    return counts, {what: examples[what] for what in counts if what not in ("read", "refused")}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_spoilt_is_read_or_refused(kind, good, reader):
    counts, bad = outcomes(kind, good, reader, seed=0, cases=CASES)
    assert not bad, describe(bad)
    assert counts["refused"] or kind == "metrics"  # which are read up to the first damaged line


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_much_that_is_spoilt_is_read_or_refused(kind, good, reader):
    total, bad = Counter(), {}
    many = MANY_CASES // 12 if kind == "template" else MANY_CASES  # one that loops takes its time
    for seed in range(1, 1 + -(-many // AT_ONCE)):
        counts, found = outcomes(kind, good, reader, seed=seed, cases=AT_ONCE)
        total += counts
        bad |= found
    named = {what: count for what, count in total.items() if what in ("read", "refused")}
    print(f"\n{kind}: {total.total()} cases, {named}, {len(bad)} kinds of others")
    assert not bad, describe(bad)


def describe(bad):
    return "\n\n".join(
        f"{name}, {len(content)} bytes, {content[:300]!r}:\n{what[-1500:]}"
        for what, (name, content) in bad.items()
    )
