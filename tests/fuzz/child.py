"""The process that reads what was spoilt: cases come in on stdin, what came of each goes out."""

import os
import pickle
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

MORE_BYTES = 2 * 2**30
"""Memory that a case may take over what the process has when it begins."""


def main() -> None:
    """Reads cases until there are no more."""
    cases, told = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print there
    from loft_jax.errors import InputError
    from tests.fuzz.kinds import KINDS

    folder = Path(tempfile.mkdtemp()) / "good"
    shutil.copytree(sys.argv[1], folder)
    for kind in KINDS.values():  # what is imported late is imported now
        kind.read(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        pickle.dump("ready", told)
        told.flush()
        while True:
            try:
                kind, name, content = pickle.load(cases)
            except EOFError:
                return
            good = (folder / name).read_bytes()
            (folder / name).write_bytes(content)
            try:
                KINDS[kind].read(folder)
                outcome = "read"
            except InputError as error:
                outcome = "refused" if len(str(error)) < 2000 else f"long message: {error!s:.300}"
            except BaseException:
                outcome = traceback.format_exc()
            (folder / name).write_bytes(good)
            pickle.dump(outcome, told)
            told.flush()
    finally:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
