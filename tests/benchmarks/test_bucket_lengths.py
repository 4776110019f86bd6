import pytest

from benchmarks.bucket_lengths import Options, main


@pytest.mark.slow
def test_a_row_for_each_optimizer(capsys):
    main(Options(lengths=(8, 16), rows=2, optimizers=("adamw",), quick=True))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "adamw" in line]
    gradients, update, whole = map(float, row.split("|")[2:5])
    assert gradients > update > 0
    assert whole > 0
