import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("shown", "variables", "bar"),
    [(True, {}, True), (True, {"TQDM_DISABLE": "1"}, False), (False, {}, False)],
)
def test_bars_are_turned_off_by_the_program_and_by_tqdms_variable(shown, variables, bar):
    """In a process of its own: tqdm reads its variables when it is imported."""
    code = f"from loft_jax.progress import progress_bar; list(progress_bar('ab', shown={shown}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("2/2" in done.stderr) is bar
