import json

import pytest

from benchmarks import plan_error
from benchmarks.plan_error import Case, Options

LINE = {
    **{"model": "0.1B", "dtype": "float32", "batch": "2x512", "remat": "dots"},
    **{"peak": 200 * 2**20, "arguments": 90 * 2**20, "device_temporaries": 99 * 2**20},
    **{"results": 2**20, "estimated": {"total": 220 * 2**20}},
}


def test_the_table_compares_the_estimate_with_the_peak_or_else_with_what_is_reserved():
    rows = plan_error.table([LINE, {**LINE, "peak": None}, {**LINE, "failed": 1}]).splitlines()[2:]
    case = "| 0.1B | float32 | 2x512 | dots |"
    assert rows == [
        f"{case} 200 | 190 | 220 | 1.100 |",
        f"{case} not known | 190 | 220 | 1.158 |",
        f"{case} failed with exit code 1 |  |  |  |",
    ]


def test_every_case_is_measured_in_a_process_of_its_own_that_takes_memory_as_it_needs_it(
    monkeypatch, capsys
):
    asked = []

    def process(command, env, **_):
        case = json.loads(command[-1])
        asked.append((Case(**case), env["XLA_PYTHON_CLIENT_PREALLOCATE"]))
        failed = case["model"] == "0.1B"
        line = json.dumps({**LINE, **case})
        return plan_error.subprocess.CompletedProcess(command, int(failed), stdout=f"...\n{line}\n")

    monkeypatch.setattr(plan_error.subprocess, "run", process)
    plan_error.main(Options(workers=1))
    assert asked == [(case, "false") for case in plan_error.CASES]
    printed = capsys.readouterr().out
    assert printed.count("failed with exit code 1") == 4
    assert printed.count("| 200 | 190 | 220 | 1.100 |") == len(plan_error.CASES) - 4


@pytest.mark.slow
def test_on_a_cpu_the_estimate_is_what_its_compiler_reserves():
    line = plan_error.measure(Case("tiny", "float32", "2x16"))
    reserved = line["arguments"] + line["device_temporaries"] + line["results"]
    assert line["peak"] is None
    assert line["estimated"]["total"] == pytest.approx(reserved, rel=0.1)
    assert line["loss"] == pytest.approx(5.99, abs=0.01)  # all 400 tokens alike
