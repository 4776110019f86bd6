"""The benchmark of one GPU, at sizes that a CPU does too."""

import json
import re

import pytest

from benchmarks.gpu import STEPS, UPDATES, Options, main


@pytest.mark.slow
def test_every_contestant_of_every_case_is_measured(tmp_path, capsys):
    main(Options(quick=True, results=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    found = [(line["case"]["name"].split(",")[0], line["case"]["optimizer"]) for line in lines]
    directions = [(f"direction of {x}", name) for x in "AB" for name in ("loft", "loft-fused")]
    assert found == [
        *directions,
        *(("tiny Llama", name) for name in (*STEPS, "full")),
        *(("2 pairs 48x32", name) for name in (*UPDATES, "dense")),
    ]
    assert all(line["measured"]["to_first"][1] > 0 for line in lines)
    out = capsys.readouterr().out
    assert "of the roofline" in out
    assert float(re.search(r"kernel, \(2, 48, 32, 4\): (\S+) from plain JAX", out)[1]) < 1e-6
    main(Options(quick=True, results=tmp_path))
    assert capsys.readouterr().out.count("measured before") == 4  # all cases, and nothing added
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == len(lines)
