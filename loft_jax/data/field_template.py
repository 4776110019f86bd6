"""Writes a text from the fields of a row, by a template such as `{instruction}\\n\\n{input}`."""

import re
from collections.abc import Mapping
from typing import Any

from loft_jax.errors import InputError, shown

_MARK = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_ESCAPES = {"\\n": "\n", "\\t": "\t"}


class FieldTemplate:
    """A text with the names of fields in braces.

    `{{` and `}}` are braces, and `\\n` and `\\t` a line break and a tab, as they are typed in a
    shell. A field that is empty or missing takes the white space before it along, or what follows
    it at the start: no blank lines remain where it would be.

    Attributes:
        fields: The names in braces, each once.

    Example:
        >>> template = FieldTemplate("{instruction}\\\\n\\\\n{input}")
        >>> template.text_of({"instruction": "Add.", "input": "1, 2"}, "row 0")
        'Add.\\n\\n1, 2'
        >>> template.text_of({"instruction": "Smile.", "input": ""}, "row 1")
        'Smile.'
    """

    def __init__(self, template: str) -> None:
        """Reads a template.

        Args:
            template: The text.

        Raises:
            InputError: A brace is not closed or not opened, or there is no name in braces.
        """
        for typed, meant in _ESCAPES.items():
            template = template.replace(typed, meant)
        self._parts: list[tuple[str, bool]] = []  # a text as it is, or the name of a field
        done = 0
        for mark in _MARK.finditer(template):
            self._parts.append((template[done : mark.start()], False))
            done = mark.end()
            if mark[1]:
                self._parts.append((mark[1], True))
            elif len(mark[0]) == 2:
                self._parts.append((mark[0][0], False))
            else:
                raise InputError(
                    f"the template {shown(template)} has a single {mark[0]!r}; expected names of "
                    "fields in braces, and {{ or }} for a brace"
                )
        self._parts.append((template[done:], False))
        self.fields = tuple(dict.fromkeys(text for text, is_field in self._parts if is_field))
        if not self.fields:
            raise InputError(
                f"the template {shown(template)} names no field; expected one in braces, such as "
                "{question}"
            )

    def text_of(self, row: Mapping[str, Any], where: str) -> str:
        """Writes the text of a row.

        Args:
            row: An example.
            where: Its place, for the message.

        Returns:
            The text.

        Raises:
            InputError: A field holds neither a text nor a number nor a date.
        """
        text, emptied = "", False
        for part, is_field in self._parts:
            if is_field:
                value = _value(row.get(part), f"{where}: field {part!r}")
                emptied = not value
                text = text + value if value else text.rstrip()
            else:
                text += part.lstrip() if emptied and not text else part
        return text


def _value(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple, Mapping, bytes)):
        kind = type(value).__name__
        raise InputError(f"{where} is {kind} ({shown(value)}); expected a text or a number")
    return str(value)
