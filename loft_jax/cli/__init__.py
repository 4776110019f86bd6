"""The command line: loft-jax finetune | evaluate | generate | export | merge | plan."""

import sys


def start() -> int:
    """Runs the command `loft-jax`, if its dependencies are installed.

    Returns:
        The exit code.
    """
    try:
        from loft_jax.cli.main import main
    except ModuleNotFoundError as error:
        if str(error.name).startswith("loft_jax"):
            raise
        needed = "pip install 'loft-jax[train]'"
        print(f"loft-jax needs {error.name}, which is not installed: {needed}", file=sys.stderr)
        return 2
    return main()
