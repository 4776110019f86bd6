"""Docstrings in the words of the site: Markdown in place of what Optax and doctest have."""

import re
import textwrap
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_MATH = re.compile(r"^( *)\.\. math::\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


class Docstrings(Extension):
    """Names the section of examples as griffe does, and turns `.. math::` into `$$`."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value + "\n")
            obj.docstring.value = _MATH.sub(_display, text).rstrip("\n")


def _display(block: re.Match[str]) -> str:
    indent, formula = block[1], textwrap.dedent(block[2]).strip("\n")
    return textwrap.indent(f"$$\n{formula}\n$$\n", indent) + "\n"
