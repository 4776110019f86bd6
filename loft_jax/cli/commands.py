"""Runs a command, and ends it with a message where the user made a mistake."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import tyro

import loft_jax
from loft_jax.cli.average import Average
from loft_jax.cli.compilation_cache import keep_compiled_programs
from loft_jax.cli.data import Data
from loft_jax.cli.evaluate import Evaluate
from loft_jax.cli.export import Export
from loft_jax.cli.finetune import INTERRUPTED, Finetune, finetune_default
from loft_jax.cli.generate import Generate
from loft_jax.cli.help import help_of
from loft_jax.cli.merge import Merge
from loft_jax.cli.method_flags import METHOD_FLAGS
from loft_jax.cli.plan import Plan
from loft_jax.cli.sweep import Sweep
from loft_jax.cli.unknown_flags import parser_of, refuse_unknown
from loft_jax.errors import InputError
from loft_jax.streams import readers_may_leave
from loft_jax.training.distributed import is_of_another_process, leave
from loft_jax.training.topology import silence_libtpu

# The hub, adapters and the training loop are imported by the commands that use them: help is fast.

_INPUT = 2
_FAILED = 1
_OTHERS = 3

_COMMANDS: dict[str, type[Callable[[], int]]] = {
    "data": Data,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "generate": Generate,
    "export": Export,
    "merge": Merge,
    "average": Average,
    "plan": Plan,
    "sweep": Sweep,
}


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; mistakes of the user end with a message and exit code 2.

    Args:
        arguments: As typed after `loft-jax`; by default those of the process.

    Returns:
        The exit code.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with readers_may_leave():
        try:
            with _messages_shown():
                silence_libtpu()
                code = _run(name, rest)
            sys.stdout.flush()
            return code
        except (InputError, OSError) as error:
            message, code = str(error), _INPUT
        except KeyboardInterrupt:
            message, code = "interrupted", INTERRUPTED
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            if is_of_another_process(error):
                message, code = f"stopped, since another process did: {error}", _OTHERS
            else:
                message, code = traceback.format_exc(), _FAILED
        print(f"loft-jax {name}: {message}", file=sys.stderr)
        if jax.distributed.is_initialized():
            leave(code)
        return code


def _run(name: str, arguments: Sequence[str]) -> int:
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"loft-jax {loft_jax.__version__}")
        return 0
    if name not in _COMMANDS:
        print(_usage(), file=sys.stderr)
        raise InputError(f"unknown command, expected one of {', '.join(_COMMANDS)}")
    command = _COMMANDS[name]
    options: dict[str, Any] = {"prog": f"loft-jax {name}", "registry": METHOD_FLAGS}
    asks_help = "-h" in arguments or "--help" in arguments
    if command is Sweep and not asks_help:
        return Sweep(tuple(arguments))()  # its options are those of finetune, with several values
    if command is Finetune:
        options["default"] = finetune_default([] if asks_help else arguments)
    parser = parser_of(command, **options)
    if asks_help:
        print(help_of(parser, command.__doc__ or ""))
        return 0
    refuse_unknown(parser, arguments)
    made = tyro.cli(command, args=arguments, **options)
    if command is not Finetune:  # which first joins the other processes of its run
        keep_compiled_programs()
    return made()


@contextlib.contextmanager
def _messages_shown() -> Iterator[None]:
    """Shows the library's log messages as they are; other libraries set the root's format.

    Orbax and TensorStore log every wait, and after a full disk also exceptions of their threads, in
    addition to those that they raise; these are silenced.
    """
    for noisy in ("absl", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    logger, handler = logging.getLogger("loft_jax"), logging.StreamHandler()
    before, hook = (logger.level, logger.propagate), sys.unraisablehook
    sys.unraisablehook = lambda _: None
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _usage() -> str:
    lines = [
        f"  {name:10}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in _COMMANDS.items()
    ]
    return "\n".join(["usage: loft-jax COMMAND [options]; loft-jax COMMAND --help", "", *lines])
