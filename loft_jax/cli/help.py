"""The help of a command: its options by what they are for, the most used ones first."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence

_FIRST = (
    "--model", "--adapter", "--data.path", "--output", "--config", "--resume", "--task", "--method",
    "--rank", "--target-modules", "--learning-rate", "--epochs", "--steps", "--batch-size",
    "--accumulation-steps", "--data.max-length", "--eval-path", "--eval-every", "--save-every",
    "--quantization", "--topology", "--batch", "--prompt",
)  # fmt: skip
"""Flags that are shown first, in commands with many of them."""

_MANY = 25  # flags of a command that are more than these are grouped

_TITLES = {
    "model": "Model",
    "data": "Data",
    "task": "Task",
    "method": "Method, and settings that only some methods have",
    "lora": "Adapters",
    "optimizer": "Optimizer",
    "schedule": "Steps and learning rates",
    "evaluation": "Evaluation",
    "checkpoint": "Checkpoints",
    "mesh": "Devices",
    "logging": "Logging",
    "distributed": "Several processes",
}

_LEFT = 28  # columns of the names of flags
_LONG = 60  # columns of a flag with its values that are too many to be shown beside it


def help_of(parser: argparse.ArgumentParser, text: str) -> str:
    """Formats the help of a command.

    Args:
        parser: Of the command.
        text: Its docstring, whose section on arguments is left out.

    Returns:
        Lines for the terminal.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    described = re.split(r"\n\s*Args:", text)[0]
    paragraphs = [" ".join(part.split()) for part in described.split("\n\n")]
    groups = _groups([a for a in parser._actions if a.dest != "help"])
    places = [
        f" {_signature(action)[0]}" for title, actions in groups if not title for action in actions
    ]
    lines = [f"usage: {parser.prog}{''.join(places)} [options]"]
    for paragraph in paragraphs:
        lines += ["", *_wrapped(paragraph, width)]
    for title, actions in groups:
        lines += ["", f"{title or 'Arguments'}:"]
        for action in actions:
            lines += _described(action, width)
    if any(action.nargs == 0 for _, actions in groups for action in actions):
        lines += ["", "An option without a value, such as --name, is turned off by --no-name."]
    return "\n".join(lines)


def _groups(actions: Sequence[argparse.Action]) -> list[tuple[str, list[argparse.Action]]]:
    """Groups the options of a command; arguments without a flag have no title."""
    flags = {flag: action for action in actions for flag in action.option_strings}
    first = [flags[flag] for flag in _FIRST if flag in flags] if len(flags) > _MANY else []
    groups: dict[str, list[argparse.Action]] = {}
    for action in actions:
        if not action.option_strings:
            groups.setdefault("", []).append(action)
    if first:
        groups["Used most"] = first
    rest: dict[str, list[argparse.Action]] = {}
    for action in actions:
        if action.option_strings and action not in first:
            section = action.dest.removeprefix("run.").rpartition(".")[0]
            title = _TITLES.get(section, "Other options") if first else "Options"
            rest.setdefault(title, []).append(action)
    other = rest.pop("Other options", [])
    order = [title for title in _TITLES.values() if title in rest]
    groups |= {title: rest.pop(title) for title in order} | rest
    return [*groups.items(), *([("Other options", other)] if other else [])]


def _described(action: argparse.Action, width: int) -> Iterator[str]:
    name, values = _signature(action)
    said = _said(action.help or "")
    if len(name) + len(values) > _LONG:
        choices = values.strip("{}").split(",")
        if not all(choice in said for choice in choices):
            said = f"{said} One of {', '.join(choices)}."
        values = "NAME"
    left = f"  {name} {values}".rstrip()
    body = [line for part in said.split("\n\n") for line in _wrapped(part, width - _LEFT) or [""]]
    if len(left) >= _LEFT:
        yield left
        left = ""
    yield f"{left:{_LEFT}}{body[0]}".rstrip()
    yield from (f"{'':{_LEFT}}{line}" for line in body[1:])


def _signature(action: argparse.Action) -> tuple[str, str]:
    """Gives the flag and its values: `--rank`, `INT`."""
    if action.nargs == 0:  # --resume, and --no-resume
        return action.option_strings[0], ""
    values = str(action.metavar or "").replace("{None}|", "").replace("{None,", "{")
    values = re.sub(r"\[(.+?) \[\1 \.\.\.\]\]", r"\1 ...", values)
    values = re.sub(r"\{(\w+ \.\.\.)\}", r"\1", values)
    if not action.option_strings:
        several = " ..." if values.endswith("...") else ""
        return f"{action.dest.upper()}{several}", ""
    return ", ".join(action.option_strings), values


def _said(text: str) -> str:
    """Gives a description in one line a paragraph, with its default where that says something."""
    text = text.replace("%%", "%")
    text = re.sub(r"\s*\(default: (''|None|False|)\)$", "", text)
    text = re.sub(r"\(default: True\)$", "(default)", text)
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
