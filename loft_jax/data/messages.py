"""Reads conversations as people store them: OpenAI's messages, tool calls, ShareGPT's turns."""

import json
from collections.abc import Mapping
from typing import Any

from loft_jax.data.templates import Message
from loft_jax.errors import InputError, explained, shown

# ShareGPT's names of who speaks -> roles of chat templates
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def as_messages(found: Any, where: str) -> list[Message]:
    """Reads a conversation.

    Args:
        found: A list of messages, each of which `as_message` reads.
        where: Its place in the data, for the message.

    Returns:
        New messages, at least one.

    Raises:
        InputError: It is something else.

    Example:
        >>> as_messages([{"from": "human", "value": "hi"}], "row 0")
        [{'role': 'user', 'content': 'hi'}]
    """
    if not (isinstance(found, list) and found and all(isinstance(m, Mapping) for m in found)):
        raise InputError(f"{where}: found {shown(found)}; {_EXPECTED}")
    return [as_message(message, where) for message in found]


_EXPECTED = "expected a list of messages, each with the texts role and content"


def as_message(found: Mapping[str, Any], where: str) -> Message:
    """Reads a message.

    It has OpenAI's `role` and `content`, a text or a list of parts that are texts; an assistant
    that calls tools may have none. Arguments of tool calls, which OpenAI stores as JSON texts,
    become objects, as chat templates expect them; its older `function_call` becomes a tool call.
    Or it has ShareGPT's `from` and `value`; the value of `function_call` is the JSON of a call.

    Args:
        found: The message in the data.
        where: Its place in the data, for the message.

    Returns:
        A new message, whose `role` and `content` are texts.

    Raises:
        InputError: It is something else.
    """
    message = {name: value for name, value in found.items() if value is not None}
    if "role" not in message and "from" in message:
        message = _of_sharegpt(message, where)
    if call := message.pop("function_call", None):
        message["tool_calls"] = [{"type": "function", "function": call}]
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _calls(calls, where)
        message.setdefault("content", "")
    if message.get("role") == "function":
        message["role"] = "tool"
    if isinstance(parts := message.get("content"), list):
        message["content"] = "".join(_text(part, where) for part in parts)
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise InputError(f"{where}: found the message {shown(dict(found))}; {_EXPECTED}")
    return message


def _of_sharegpt(message: Message, where: str) -> Message:
    speaker, value = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise InputError(
            f"{where}: a message is from {shown(speaker)}; expected one of {', '.join(_SPEAKERS)}"
        )
    if speaker == "function_call":
        with explained(f"{where}: {shown(value)} cannot be read as the JSON of a call"):
            found = json.loads(value)
        calls = found if isinstance(found, list) else [found]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        value = ""
    return {"role": _SPEAKERS[speaker], "content": value, **message}


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Reads calls of tools, with their arguments as objects."""
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        called = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
            raise InputError(
                f"{where}: found the tool call {shown(call)}; expected a function with a name and "
                "arguments"
            )
        arguments = called.get("arguments")
        if isinstance(arguments, str):
            with explained(f"{where}: arguments of {called['name']!r:.100} are no JSON"):
                arguments = json.loads(arguments or "{}")
        function = {**called, "arguments": {} if arguments is None else arguments}
        read.append(
            {"type": "function", **(call if called is not call else {}), "function": function}
        )
    return read


def _text(part: Any, where: str) -> str:
    """Gets the text of a part of a message."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise InputError(f"{where}: a part of a message is {shown(kind)}; expected text")


def as_tools(found: Any, where: str) -> list[dict[str, Any]] | None:
    """Reads the tools that the assistant may call, a list of JSON schemas or its JSON text.

    Args:
        found: In the row; None or an empty text for none.
        where: Its place in the data, for the message.

    Returns:
        The list; None if there are none.

    Raises:
        InputError: It is something else.
    """
    tools = found
    if isinstance(found, str):
        with explained(f"{where}: cannot be read as JSON"):
            tools = json.loads(found) if found else None
    if tools is None or (isinstance(tools, list) and all(isinstance(t, Mapping) for t in tools)):
        return tools
    raise InputError(
        f"{where}: found {shown(found)}; expected a list of objects, or the JSON text of one"
    )
