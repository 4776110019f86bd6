"""loft-jax sweep."""

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from loft_jax.cli.compilation_cache import keep_compiled_programs
from loft_jax.cli.finetune import INTERRUPTED, Finetune, finetune_default
from loft_jax.cli.method_flags import METHOD_FLAGS
from loft_jax.cli.unknown_flags import parser_of, refuse_unknown
from loft_jax.errors import InputError, cut, shown
from loft_jax.training.distributed import DistributedConfig

if TYPE_CHECKING:
    from loft_jax.training.sweep import GridRun


# Messages name finetune, whose --help lists the options.
_OPTIONS: dict[str, Any] = {"prog": "loft-jax finetune", "registry": METHOD_FLAGS}


@dataclass(frozen=True)
class Sweep:
    """Fine-tune once for each combination of values, and compare the runs.

    Options are those of finetune. An option that takes one value there takes several here, such as
    --learning-rate 1e-4 3e-4 --rank 4 16. Options that take several there, or none, are given
    several times: --target-modules q_proj v_proj --target-modules all-linear.

    Below --output each run has a folder, named by its values. sweep.md there is the table of all
    runs, best first, and sweep.png the plot; the best has the best evaluation on the held-out
    examples (--eval-path, --best-metric). The same command goes on where it was stopped or killed.

    Args:
        arguments: As typed after `loft-jax sweep`.
    """

    arguments: tyro.conf.Positional[tuple[str, ...]]

    def __call__(self) -> int:
        """Runs the command."""
        from loft_jax.training.sweep import run_sweep, sweep_table

        folder, runs = self.runs()
        keep_compiled_programs()
        results = run_sweep(runs, folder)
        if results is None:
            print("stopped; the same command goes on")
            return INTERRUPTED
        print(sweep_table(results))
        best = results[0]
        if best.step is None:
            raise InputError(f"{folder}: no run has trained; expected smaller learning rates")
        output = best.run.config.output
        if (plot := folder / "sweep.png").exists():  # with matplotlib
            print(f"plot: {plot}")
        print(f"best: {output}, at step {best.step}")
        export = f"loft-jax export {output} --checkpoint {best.step} --output {folder / 'best'}"
        print(f"to export it: {export}")
        if failed := [result for result in results if result.error]:
            name = Path(failed[0].run.config.output).name
            raise InputError(f"{len(failed)} of {len(runs)} runs failed: {name}: {failed[0].error}")
        return 0

    def runs(self) -> tuple[Path, list["GridRun"]]:
        """Makes the folder and the runs of the grid.

        Raises:
            InputError: No option has several values, two runs would be the same, or an option
                cannot be swept over.
        """
        from loft_jax.training.sweep import GridRun

        parser = parser_of(Finetune, default=finetune_default([]), **_OPTIONS)
        refuse_unknown(parser, self.arguments)
        fixed, axes = _grid(self.arguments, parser)
        if "output" in axes:
            raise InputError("--output has several values, expected one folder for all runs")
        if "--resume" in fixed:
            raise InputError("--resume is given, but the same command goes on without it")
        if not axes:
            raise InputError(
                "no option has several values to compare; expected some, such as "
                "--learning-rate 1e-4 3e-4"
            )
        made: dict[str, GridRun] = {}
        folder = Path(
            _parsed(fixed + [w for some in axes.values() for w in some[0].words]).run.output
        )
        for chosen in itertools.product(*axes.values()):
            settings = {axis: choice.text for axis, choice in zip(axes, chosen, strict=True)}
            name = re.sub(r"[^\w.,=+-]", "_", ",".join(map("=".join, settings.items())))
            if name in made:
                raise InputError(f"two runs would be {cut(name)}, expected different values")
            words = [*fixed, *(word for choice in chosen for word in choice.words)]
            command = _parsed([*words, f"--output={folder / name}"])
            if command.distributed != DistributedConfig():
                raise InputError("a sweep runs in one process; expected no --coordinator-address")
            if repository := command.run.export.push_to_hub:
                raise InputError(
                    f"push_to_hub is {shown(repository)}, to which each run of the sweep would be "
                    "uploaded over the one before; expected `loft-jax export ... --push-to-hub "
                    f"{repository}` of the best run afterwards"
                )
            made[name] = GridRun(settings, command.run)
        return folder, list(made.values())


@dataclass(frozen=True)
class _Choice:
    """One of the values of an option: its text, and the words that set it."""

    text: str
    words: tuple[str, ...]


def _grid(
    arguments: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[list[str], dict[str, list[_Choice]]]:
    """Splits arguments into those of all runs, and the options with several values."""
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    fixed: list[str] = []
    options: dict[str, list[_Choice]] = {}
    for words in _options(arguments):
        flag, _, text = words[0].partition("=")
        action = actions.get(flag.replace("_", "-"))
        if action is None:
            raise InputError(f"{cut(words[0])} is given without an option, expected options alone")
        values = [text] if "=" in words[0] else words[1:]
        choices = options.setdefault(action.option_strings[0].removeprefix("--"), [])
        if action.nargs in (None, 1) and values:
            choices += [_Choice(value, (f"{flag}={value}",)) for value in values]
        else:
            choices.append(_Choice("+".join(values) or flag.removeprefix("--"), tuple(words)))
    axes = {name: choices for name, choices in options.items() if len(choices) > 1}
    fixed += [w for name, (one, *_) in options.items() if name not in axes for w in one.words]
    return fixed, axes


def _options(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Yields each option with the words after it."""
    words: list[str] = []
    for word in arguments:
        if word.startswith("--") and words:
            yield words
            words = []
        words.append(word)
    if words:
        yield words


def _parsed(arguments: list[str]) -> Finetune:
    return tyro.cli(Finetune, args=arguments, default=finetune_default(arguments), **_OPTIONS)
