import json

import pytest

from benchmarks.against_torch import Options, main


@pytest.mark.slow
def test_both_sides_do_the_same(tmp_path, capsys):
    main(Options(quick=True, results=tmp_path))
    lines = (tmp_path / "against_torch.jsonl").read_text().splitlines()
    generated, trained = (json.loads(line)["measured"] for line in lines)
    assert generated["same_tokens"] == 1.0
    ours, theirs = trained["first_losses"]
    assert abs(ours - theirs) < 1e-4
    assert {"ratio", "cpu_ratio", "ours_seconds", "torch_seconds"} <= trained.keys()
    assert "| train | 2x16 |" in capsys.readouterr().out
