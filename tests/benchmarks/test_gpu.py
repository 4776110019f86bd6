"""The benchmark of one GPU, at sizes that a CPU does too."""

import json

import pytest

from benchmarks.gpu import STEPS, UPDATES, Options, main


@pytest.mark.slow
def test_every_contestant_of_every_case_is_measured(tmp_path, capsys):
    main(Options(quick=True, results=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    found = [(line["case"]["name"].split(",")[0], line["case"]["optimizer"]) for line in lines]
    assert found == [
        *(("2 pairs 48x32", name) for name in (*UPDATES, "dense")),
        *(("tiny Llama", name) for name in (*STEPS, "full")),
    ]
    assert all(line["measured"]["to_adamw"] > 0 for line in lines)
    assert "of the copy rate" in capsys.readouterr().out
