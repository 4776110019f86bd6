"""What `--help` prints, for every command."""

import re

import pytest

from loft_jax.cli import main
from loft_jax.cli.commands import _COMMANDS

TITLES = [
    *("Used most", "Model", "Data", "Task", "Method, and settings that only some methods have"),
    *("Adapters", "Optimizer", "Steps and learning rates", "Evaluation", "Checkpoints", "Devices"),
    *("Logging", "Several processes", "Other options"),
]


@pytest.fixture(scope="module")
def shown():
    """The help of a command, in a terminal of 100 columns."""

    def help_of(command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        assert main([command, "--help"]) == 0
        return capsys.readouterr().out

    return help_of


def test_options_of_finetune_are_grouped_and_twenty_come_first(shown, capsys, monkeypatch):
    text = shown("finetune", capsys, monkeypatch)
    assert re.findall(r"^(\S.*):$", text, flags=re.MULTILINE) == TITLES
    first = text.split("Used most:")[1].split("\nModel:")[0]
    flags = re.findall(r"^  (--\S+)", first, flags=re.MULTILINE)
    assert 19 <= len(flags) <= 20
    assert {"--model", "--data.path", "--output", "--rank", "--learning-rate"} <= set(flags)
    every = re.findall(r"^  (--\S+)", text, flags=re.MULTILINE)
    assert len(every) == len(set(every))  # each once
    assert "  --rank INT                Rank of the adapters, by default 16.\n" in text
    assert "  --batch-size INT          Number of rows in a step. (default: 16)\n" in text
    assert '"lora": AdamW on the factors.\n' in text  # a line for each method


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_fits_the_terminal_and_shows_no_internals(command, shown, capsys, monkeypatch):
    text = shown(command, capsys, monkeypatch)
    assert text.startswith(f"usage: loft-jax {command}")
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"\{None|MISSING|default: (''|None|False|\))|%%|\[STR \[", text)
    assert "Args:" not in text


def test_arguments_without_a_flag_are_named(shown, capsys, monkeypatch):
    text = shown("export", capsys, monkeypatch)
    assert text.startswith("usage: loft-jax export RUN [options]\n")
