import importlib.util
import json

import pytest

from benchmarks import compile_matrix, history
from benchmarks.compile_matrix import Options
from loft_jax.errors import InputError
from loft_jax.methods import LoFT, LoRA
from loft_jax.training.plan import StepPlan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, whose version is written, is missing",
)


@pytest.fixture
def compiled(monkeypatch):
    """Steps that were compiled, by a compiler that takes no time; LoFT takes half more."""
    calls = []

    def plan_step(config, topology):
        calls.append(config)
        method = config.method.name
        temporaries = 60 if method == "lora" else 120
        sizes = (40 * 2**20, 10 * 2**20, 8 * 2**20, 2 * 2**20, temporaries * 2**20, 0)
        if config.lora.rank == 32 and method == "loft":
            sizes = (*sizes[:4], None, None)
        return StepPlan(config, topology, (1, 8, 1), 2**30, *sizes, (), 1.0)

    monkeypatch.setattr(compile_matrix, "plan_step", plan_step)
    versions = {"date": "2026-01-01", "revision": "abc", "jax": "1", "libtpu": "2"}
    monkeypatch.setattr(history, "made_with", lambda: dict(versions))
    return calls


def test_finished_steps_are_not_compiled_again(compiled, tmp_path, capsys):
    few = {"models": ("llama-2-7b",), "ranks": (16,), "results": tmp_path}
    compile_matrix.main(Options(**few, methods=("lora",)))
    compile_matrix.main(Options(**few, methods=("lora", "loft full")))
    assert [c.method for c in compiled] == [LoRA(), LoFT("full")]
    file = tmp_path / "compile_matrix.jsonl"
    whole = file.read_text()
    totals = [json.loads(line)["measured"]["total"] for line in whole.splitlines()]
    assert totals == [120 << 20, 180 << 20]
    table = (tmp_path / "compile_matrix.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 16 | loft full | 40.0 | 10.0 | 8.0 | 2.0 | 120.0 | 0.0 | 180.0 |" in table
    assert table.count("| +50.0% |\n") == 1
    assert "| loft full, r 16, over LoRA | +50.00% | +5.5% | **no** |" in table
    assert "| loft full, r 16, program | +0.0 MiB | +20.0 MiB | yes |" in table

    file.write_text(whole[:-10])  # killed while it wrote the last line
    compile_matrix.main(Options(**few, methods=("lora", "loft full")))
    assert len(compiled) == 3
    assert file.read_text() == whole


def test_another_revision_is_measured_anew_and_shown(compiled, tmp_path, monkeypatch, capsys):
    few = Options(models=("llama-2-7b",), ranks=(16,), methods=("lora",), results=tmp_path)
    compile_matrix.main(few)
    later = {**history.made_with(), "revision": "def", "jax": "3"}
    monkeypatch.setattr(history, "made_with", lambda: later)
    compile_matrix.main(few)
    assert len(compiled) == len((tmp_path / "compile_matrix.jsonl").read_text().splitlines()) == 2
    table = (tmp_path / "compile_matrix.md").read_text()
    assert table.count("| lora |") == 1
    assert "jax 3" in table
    assert "jax 1" not in table


def test_a_step_that_does_not_fit_has_a_row(compiled, tmp_path):
    compile_matrix.main(Options(models=("llama-3-8b",), ranks=(32,), results=tmp_path))
    assert len(compiled) == len(compile_matrix.METHODS)
    table = (tmp_path / "compile_matrix.md").read_text()
    assert table.count("does not fit") == len(compile_matrix.METHODS) - 1


def test_unknown_models_are_refused():
    with pytest.raises(InputError, match=r"unknown 'gpt-2', expected some of .'llama-2-7b'"):
        Options(models=("gpt-2",))
