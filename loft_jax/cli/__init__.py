"""The command line: loft-jax COMMAND, one file for each command."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `loft-jax`, if its dependencies are installed.

    Args:
        arguments: As typed after `loft-jax`; by default those of the process.

    Returns:
        The exit code; 2 for mistakes of the user, which end with a message.
    """
    try:
        from loft_jax.cli.commands import run
    except ModuleNotFoundError as error:
        if str(error.name).startswith("loft_jax"):
            raise
        needed = f"loft-jax needs {error.name}, which is not installed: pip install loft-jax"
        print(needed, file=sys.stderr)
        return 2
    return run(arguments)
