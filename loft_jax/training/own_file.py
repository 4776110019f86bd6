"""Files of a run that are written in place, in a folder that a stranger may have filled."""

import errno
import os
from pathlib import Path

from loft_jax.errors import InputError
from loft_jax.files import regular_file


def own_file(path: Path) -> Path:
    """A file that a run reads and writes, made if missing.

    Args:
        path: In a folder that exists.

    Returns:
        The path.

    Raises:
        InputError: It is a link, which may lead to any file of the user, or no file.
        OSError: It cannot be opened.

    Example:
        >>> import tempfile
        >>> own_file(Path(tempfile.mkdtemp()) / ".lock").read_text()
        ''
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # the last for a pipe
        os.close(os.open(path, flags, 0o666))
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(f"{path}: is a link, expected a file of the run itself") from error
    return regular_file(path, "a file of the run itself")
