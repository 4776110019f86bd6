"""Runs notebooks and keeps what they print: `python -m scripts.notebooks docs/start/*.ipynb`.

Cells run one after the other in this process, in an empty folder. What they print becomes their
output, and so do the plots that they leave open.
"""

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("agg")


def outputs(notebook: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Runs the code of a notebook, in the current folder.

    Args:
        notebook: The contents of its file.

    Yields:
        The outputs of each cell of code, in the notebook's format.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    plt.close("all")
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
        of_cell: list[dict[str, Any]] = []
        if text := printed.getvalue():
            lines = text.splitlines(keepends=True)
            of_cell.append({"output_type": "stream", "name": "stdout", "text": lines})
        for number in plt.get_fignums():
            image = io.BytesIO()
            plt.figure(number).savefig(image, format="png", dpi=80, metadata={"Software": None})
            plt.close(number)
            data = {"image/png": base64.b64encode(image.getvalue()).decode()}
            of_cell.append({"output_type": "display_data", "metadata": {}, "data": data})
        yield of_cell


def main(paths: list[str]) -> None:
    """Writes the outputs into the files."""
    for path in map(Path, paths):
        notebook = json.loads(path.read_text("utf-8"))
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            made = list(outputs(notebook))
            os.chdir(here)
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, (cell, of_cell) in enumerate(zip(code, made, strict=True), 1):
            cell |= {"outputs": of_cell, "execution_count": number}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
