"""Refuses flags that a command does not have, and names those that were probably meant."""

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import tyro

from loft_jax.errors import InputError, cut
from loft_jax.training.field_names import meant_field


def parser_of(command: Any, **options: Any) -> argparse.ArgumentParser:
    """Makes the parser of a command, of which flags and their descriptions are read.

    Args:
        command: As for `tyro.cli`.
        options: As for `tyro.cli`.

    Returns:
        A parser; the destination of a flag is the dotted path of its field in the command.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parser: Any = tyro.extras.get_parser(command, **options)  # tyro's own copy of the class
    return parser


def refuse_unknown(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Refuses arguments that look like flags and are none.

    Args:
        parser: Of the command.
        arguments: As typed after the name of the command.

    Raises:
        InputError: There are such arguments; the message names similar flags, also those that have
            another name in transformers, TRL, PEFT or axolotl.

    Example:
        >>> parser = argparse.ArgumentParser("loft-jax finetune")
        >>> _ = parser.add_argument("--learning-rate", dest="run.schedule.learning-rate")
        >>> refuse_unknown(parser, ["--lr", "1e-3"])
        Traceback (most recent call last):
        loft_jax.errors.InputError: unknown option --lr, did you mean --learning-rate? ...
    """
    flags = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    given = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    unknown = [word for word in given if word.replace("_", "-") not in flags]
    if not unknown:
        return
    names = {flag.lstrip("-").replace("-", "_"): flag for flag in flags}
    for flag, field in flags.items():
        names.setdefault(field.removeprefix("run.").replace("-", "_"), flag)
        names.setdefault(field.replace("run.method.method", "method.name"), flag)
    told = []
    for word in unknown:
        meant = meant_field(word.lstrip("-"), names)
        told.append(f"unknown option {cut(word)}" + (f", did you mean {meant}?" if meant else "."))
    raise InputError(f"{' '.join(told)} {parser.prog} --help lists all options")
