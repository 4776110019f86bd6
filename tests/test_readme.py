"""The README and the tour of the command line: their code runs, and their tables are true."""

import importlib.util
import re
import tomllib

import pytest
import yaml

import loft_jax
from loft_jax.cli import main
from loft_jax.cli.commands import _COMMANDS
from loft_jax.cli.sweep import Sweep
from loft_jax.models.registry import FAMILIES
from loft_jax.tasks.registry import TASKS
from tests.pages import ROOT, blocks, commands

TOUR = "docs/start/command-line.md"
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readme_is_one_and_a_half_screens():
    assert len(README.splitlines()) <= 125
    assert sum(line.startswith("![") for line in README.splitlines()) == 2


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(targets) > 20
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_comparisons_with_lora_are_those_of_the_results():
    results = (ROOT / "docs/evidence/results.md").read_text("utf-8")
    row = re.search(r"^\| LoFT is better than LoRA at equal rank .*$", results, re.MULTILINE)[0]
    counts = {}
    for verdict, places in re.findall(r"\*\*(.+?)\*\*: ([^*]*)", row):
        places = re.sub(r"\bstories(-long)? \(.*?\)", "", places)
        counts[verdict] = sum(ranks.count(",") + 1 for ranks in re.findall(r"\(r (.*?)\)", places))
    assert f"in {counts['within the noise']} of {sum(counts.values())} comparisons" in README


def test_the_optax_block_learns():
    [block] = [block for block in blocks("README.md", "python") if "optax" in block]
    names = {}
    exec(block, names)
    start = {**names["params"], "lora_b": 0 * names["params"]["lora_b"]}
    first, last = (float(names["loss"](params)) for params in (start, names["params"]))
    assert last < 0.8 * first


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the configuration of a run."""
    (tmp_path / "runs" / "first").mkdir(parents=True)
    config = {"model": {"path": "m"}, "data": {"path": "rows.jsonl"}, "output": "runs/first"}
    (tmp_path / "runs" / "first" / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)


LOFT_JAX = [words[1:] for page in ("README.md", TOUR) for words in commands(page)]
LOFT_JAX = [words for words in LOFT_JAX if words[0] in _COMMANDS]


@pytest.mark.parametrize("words", LOFT_JAX, ids=" ".join)
def test_a_command_is_one_that_can_be_typed(words, folder, monkeypatch):
    made = []
    kind = _COMMANDS[words[0]]
    monkeypatch.setattr(kind, "__call__", lambda self: made.append(self) or 0)
    monkeypatch.setattr("loft_jax.cli.commands.keep_compiled_programs", lambda: None)
    assert main(words) == 0
    [command] = made
    if isinstance(command, Sweep):
        assert len(command.runs()[1]) == 6


@pytest.mark.parametrize("page", ["README.md", TOUR])
def test_what_else_can_be_typed_is_there(page):
    makefile = (ROOT / "Makefile").read_text()
    for program, *words in commands(page):
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE)
        elif program == "pip":
            assert words == ["install", "."]
        else:
            assert program == "loft-jax"
            assert words[0] in _COMMANDS
    for module in re.findall(r"`python -m (\S+)`", (ROOT / page).read_text()):
        assert importlib.util.find_spec(module)


def test_the_tour_names_the_extras_that_there_are():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [named] = re.findall(r"extras: (.*)$", (ROOT / TOUR).read_text(), flags=re.MULTILINE)
    assert set(named.split(", ")) <= set(project["optional-dependencies"])


def test_the_tour_runs_in_python(monkeypatch):
    given = {}
    [block] = blocks(TOUR, "python")
    monkeypatch.setattr(loft_jax, "finetune", lambda config, **kw: given.update(kw))
    exec(block, {})
    assert given == {"data": [{"prompt": "2 + 2 =", "completion": " 4"}]}


def table():
    """The rows of the table of families, each with what its cells hold in backticks."""
    lines = README.partition("| families")[2].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in lines[: lines.index("")]]
    return [
        (re.findall(r"`(.+?)`", row[0]), re.findall(r"`(.+?)`", row[1]), *row[2:]) for row in rows
    ]


def test_the_table_is_the_registries():
    named = [name for names, *_ in table() for name in names]
    assert sorted(named) == sorted(FAMILIES)
    assert f"{NUMBERS[len(FAMILIES)]} families" in README
    for names, tasks, source, target in table():
        for name in names:
            family = FAMILIES[name]
            assert tasks == [task for task, kind in TASKS.items() if kind.head in family.models]
            assert ("GGUF" in source) == ("llama.cpp" in target) == (family.gguf is not None)


NUMBERS = {13: "Thirteen", 14: "Fourteen", 15: "Fifteen", 16: "Sixteen"}
