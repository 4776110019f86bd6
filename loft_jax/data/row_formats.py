"""Recognizes how rows hold examples, and reads them: as conversations, pairs or texts."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from loft_jax.data.alpaca import alpaca_prompt
from loft_jax.data.config import DataConfig
from loft_jax.data.field_template import FieldTemplate
from loft_jax.data.log_once import log_once, log_unused
from loft_jax.data.messages import as_message, as_messages, as_tools
from loft_jax.data.templates import Chat, Message
from loft_jax.errors import InputError, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOOLS = "tools"
"""Field with the tools that the assistant may call."""

_CONVERSATIONS = ("conversations", "conversation")
_CHOSEN, _REJECTED = "chosen", "rejected"
_INSTRUCTION, _INPUT, _OUTPUT, _SYSTEM = "instruction", "input", "output", "system"

_MOST_TO_FIND_CHATS = 100

_SIDES: tuple[Literal["prompt", "completion"], ...] = ("prompt", "completion")

_Row = Mapping[str, Any]


class Pair(NamedTuple):
    """A prompt, and the completion that is learned."""

    prompt: str
    completion: str


Read = str | Pair | Chat
"""What is read from a row: a text, a pair or a conversation."""


@dataclass(frozen=True)
class _Format:
    """One way to hold an example.

    Args:
        name: For the log.
        needed: Fields that rows of this format have.
        optional: Fields that are used if rows have them.
        read: Reads a row by its index.
        told: What the user is told of it; empty for formats that are read as they stand.
        level: Of the log record.
        label: Field that is false in rows which are not to be learned.
    """

    name: str
    needed: tuple[str, ...]
    read: Callable[[int, _Row], Read]
    optional: tuple[str, ...] = ()
    told: str = ""
    level: int = logging.INFO
    label: str = ""


class RowReader:
    """Reads the rows of a dataset, which may be of several formats.

    A row is read in the first format whose fields it has: `prompt` and `completion` by templates if
    these are set, then `messages`, `prompt` and `completion`, ShareGPT's `conversations`, `chosen`
    and `rejected`, Alpaca's `instruction` and `output`, and `text`. Those of `messages`, `prompt`
    and `completion`, and `text` that have another name go first.

    Attributes:
        columns: The fields that are used.
    """

    def __init__(
        self, columns: Sequence[str], tokenizer: "PreTrainedTokenizerBase", config: DataConfig
    ) -> None:
        """Finds the formats that rows may have.

        Args:
            columns: The fields of the rows.
            tokenizer: Whether it has a chat template decides how instructions are written.
            config: Its names of fields, `prompt`, `completion` and `chat` are used.

        Raises:
            InputError: No format has its fields among these.
        """
        check_chat(tokenizer, config)
        self._all = list(columns)
        self._tokenizer = tokenizer
        self._config = config
        reads = _Reads(columns, config, chats=bool(tokenizer.chat_template))
        self._formats = [one for one in reads.formats() if set(one.needed) <= set(self._all)]
        if not self._formats:
            raise InputError(_no_format(columns, config))
        self._count: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()  # of the rows of each format, those left out
        fields = [
            field for one in self._formats for field in (*one.needed, *one.optional, one.label)
        ]
        self.columns = [field for field in dict.fromkeys(fields) if field in self._all]

    def read(self, index: int, row: _Row) -> Read | None:
        """Reads a row.

        Args:
            index: Of the row, for messages.
            row: With the fields `columns`.

        Returns:
            The example in it; None if it is one to avoid, and not to learn.

        Raises:
            InputError: A field does not hold what it should.
        """
        fitting = (
            one for one in self._formats if all(row.get(name) is not None for name in one.needed)
        )
        found = next(fitting, self._formats[0])
        self._count[found.name] += 1
        label = row.get(found.label)
        if isinstance(label, (bool, np.bool_)) and not label:  # a text may be the answer again
            self._rejected[found.name] += 1
            return None
        return found.read(index, row)

    def log(self) -> None:
        """Logs, after all rows are read, what formats they have and which fields are not used."""
        used = [one for one in self._formats if self._count[one.name]]
        fields = [field for one in used for field in (*one.needed, *one.optional)]
        fields += [one.label for one in used if self._rejected[one.name]]
        kept = [field for field in dict.fromkeys(fields) if field in self._all]
        log_unused(self._tokenizer, self._all, kept, self._config)
        for one in used:
            if one.told:
                log_once(self._tokenizer, one.told, one.level)
            if rejected := self._rejected[one.name]:
                log_once(
                    self._tokenizer,
                    f"left out {rejected} of {self._count[one.name]} {one.name}, whose field "
                    f"{one.label!r} is false, as of a completion to avoid; templates, --data."
                    "prompt and --data.completion, learn them too",
                )
        if len(used) > 1:
            numbers = ", ".join(f"{self._count[one.name]} are {one.name}" for one in used)
            log_once(self._tokenizer, f"rows have several formats: {numbers}", logging.INFO)


def are_chats(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
) -> bool:
    """Whether the first row with something to learn is a conversation.

    Args:
        rows: Examples, of which the first 100 are read.
        tokenizer: As for `RowReader`.
        config: As for `RowReader`.

    Returns:
        False if none of them has something to learn.

    Raises:
        InputError: As from `RowReader`.
    """
    reader = RowReader(column_names(rows), tokenizer, config)
    for index in range(min(len(rows), _MOST_TO_FIND_CHATS)):
        read = reader.read(index, rows[index])
        if read.completion if isinstance(read, Pair) else read:
            return isinstance(read, Chat)
    return False


def column_names(rows: "Dataset | Sequence[Mapping[str, Any]]") -> list[str]:
    """Gives the names of the fields of examples.

    Args:
        rows: From `load_examples`, or plain dicts, which may differ in their fields.

    Returns:
        Their names.

    Raises:
        InputError: There is no example.
    """
    if len(rows) == 0:
        raise InputError("the dataset is empty; expected examples")
    if isinstance(rows, Sequence):
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(rows.column_names)


def require_fields(
    rows: "Dataset | Sequence[Mapping[str, Any]]", needed: Sequence[str], purpose: str
) -> list[str]:
    """Refuses examples without a field.

    Args:
        rows: From `load_examples`, or plain dicts.
        needed: Names of the fields that they must have.
        purpose: What for, for the message.

    Returns:
        The names of all their fields.

    Raises:
        InputError: A field is missing, or there is no example.
    """
    columns = column_names(rows)
    if missing := [field for field in needed if field not in columns]:
        raise InputError(
            f"field {missing[0]!r} is missing; found the fields {shown(sorted(columns))}; expected "
            f"{list(needed)} {purpose}"
        )
    return columns


def check_named(columns: Collection[str], config: DataConfig) -> None:
    """Refuses a field that the user named, and that no row has.

    Args:
        columns: The fields of the rows.
        config: Its names of fields that are not the default are the user's.

    Raises:
        InputError: There is no such field.
    """
    for setting in config.renamed_fields:
        if (field := getattr(config, setting)) not in columns:
            raise InputError(
                f"field {field!r} of data.{setting} is missing; found the fields "
                f"{shown(sorted(columns))}"
            )


def only_field(
    rows: "Dataset | Sequence[Mapping[str, Any]]", field: str
) -> "Dataset | Sequence[Mapping[str, Any]]":
    """Examples of which one field is read, without decoding the images in others.

    Args:
        rows: From `load_examples`, or plain dicts, which may lack the field.
        field: Its name.

    Returns:
        Rows with at least that field.
    """
    if isinstance(rows, Sequence) or field not in rows.column_names:
        return rows
    return rows.select_columns(field)


def text_of(row: _Row, field: str, index: int) -> str:
    """Gets the text in a field of a row.

    Args:
        row: An example.
        field: The name of the field.
        index: Index of the row, for the message.

    Returns:
        The text.

    Raises:
        InputError: The field is missing or is not a text.
    """
    value = row.get(field)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"row {index}: field {field!r} is {kind} ({shown(value)}); expected text")
    return value


def fields_of(name: Literal["prompt", "completion"], config: DataConfig) -> tuple[str, ...]:
    """Gives the fields that prompts or completions are read from: by the template, or the one."""
    template = getattr(config, name)
    return _template(template).fields if template else (getattr(config, f"{name}_field"),)


def example_fields(config: DataConfig) -> frozenset[str]:
    """Gives the fields of which an example has some, whatever its task and its format."""
    others = (*_CONVERSATIONS, _CHOSEN, _INSTRUCTION, _OUTPUT, "choices")
    own = (config.text_pair_field, config.label_field, config.image_field)
    written = (*fields_of("prompt", config), *fields_of("completion", config))
    return config.fields.union(others, own, written)


def part_of(
    name: Literal["prompt", "completion"], index: int, row: _Row, config: DataConfig
) -> str:
    """Gets the prompt or the completion of a row: by the template, or from its field.

    Args:
        name: Which of them.
        index: Index of the row, for the message.
        row: An example.
        config: Its templates and names of fields are used.

    Returns:
        The text.

    Raises:
        InputError: A field is missing or is not a text.
    """
    if template := getattr(config, name):
        return _template(template).text_of(row, f"row {index}")
    return text_of(row, getattr(config, f"{name}_field"), index)


_template = functools.cache(FieldTemplate)  # rows have the same one


def check_chat(tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> None:
    """Refuses `config.chat` with a tokenizer that has no chat template.

    Raises:
        InputError: There is none.
    """
    if config.chat and not tokenizer.chat_template:
        raise InputError(
            "chat is true, but the tokenizer has no chat template; expected chat false, or the "
            "tokenizer of a model that is made for chat"
        )


def told_of_texts(config: DataConfig, *, chats: bool) -> str:
    """What to tell of prompts that are texts, where there is a chat template (`chats`)."""
    if config.chat or not chats:
        return ""
    return (
        "prompts that are texts are given to the model as they stand, and not to the tokenizer's "
        "chat template, which --data.chat does"
    )


def chat_with(prompt: str, where: str) -> Chat:
    """Makes a conversation of a prompt, as the user says it."""
    return Chat(where, [{"role": "user", "content": prompt}])


def _no_format(columns: Sequence[str], config: DataConfig) -> str:
    pair = {config.prompt_field, config.completion_field}
    missing = sorted(pair.difference(columns)) if pair.intersection(columns) else []
    named = f"field {missing[0]!r} is missing" if missing else "no known field"
    return (
        f"{named}; found the fields {shown(sorted(columns))}; expected {config.messages_field!r}, "
        f"or {config.prompt_field!r} and {config.completion_field!r}, or {config.text_field!r}, or "
        "the fields of Alpaca, ShareGPT or preferences; or templates that name the fields, such as "
        "--data.prompt '{question}' --data.completion '{answer}'; CSV without a header needs the "
        "names of its columns, --data.columns"
    )


class _Reads:
    """The formats, as a configuration names their fields."""

    def __init__(self, columns: Sequence[str], config: DataConfig, *, chats: bool) -> None:
        self._columns = columns
        self._config = config
        self._chats = chats

    def formats(self) -> Iterator[_Format]:
        """Yields the formats, those that go first before the others."""
        config = self._config
        if config.prompt or config.completion:
            yield self._by_templates()
            return
        messages = _Format("messages", (config.messages_field,), self._messages, (TOOLS,))
        pairs = _Format(
            "prompts and completions",
            (config.prompt_field, config.completion_field),
            self._pair,
            (TOOLS,),
            told=told_of_texts(config, chats=self._chats),
            label=config.label_field,
        )
        text = _Format("texts", (config.text_field,), self._text)
        by_setting = {
            "messages_field": messages,
            "prompt_field": pairs,
            "completion_field": pairs,
            "text_field": text,
        }
        named = [by_setting[setting] for setting in config.renamed_fields]
        yield from dict.fromkeys([*named, messages, pairs])
        for field in _CONVERSATIONS:
            read = functools.partial(_sharegpt, field)
            told = f"rows are conversations of ShareGPT's form, in the field {field!r}"
            yield _Format(f"ShareGPT's {field}", (field,), read, (_SYSTEM, TOOLS), told=told)
        yield _Format(
            "preferences",
            (_CHOSEN, _REJECTED),
            self._chosen,
            (config.prompt_field, _SYSTEM, TOOLS),
            told=(
                "rows are preferences: the chosen side is learned as a completion, and of the "
                "rejected side only where it begins to differ is used"
            ),
            level=logging.WARNING,
        )
        yield _Format(
            "Alpaca's",
            (_INSTRUCTION, _OUTPUT),
            self._alpaca,
            (_INPUT, _SYSTEM),
            told="rows are Alpaca's instructions, "
            + (
                "and are given to the chat template"
                if self._chats
                else "written with Alpaca's prompt, since the tokenizer has no chat template"
            ),
        )
        if text not in named:
            yield text

    def _by_templates(self) -> _Format:
        fields: list[str] = []
        for name in _SIDES:
            own = fields_of(name, self._config)
            if missing := [field for field in own if field not in self._columns]:
                raise InputError(
                    f"field {missing[0]!r} of data.{name} is missing; found the fields "
                    f"{shown(sorted(self._columns))}"
                )
            fields += own

        def read(index: int, row: _Row) -> Read:
            sides = (part_of(name, index, row, self._config) for name in _SIDES)
            return self._read_pair(f"row {index}", *sides)

        told = told_of_texts(self._config, chats=self._chats)
        # Rows may lack some of the fields, so none of them decides whether a row has this format.
        return _Format("written by templates", (), read, tuple(dict.fromkeys(fields)), told=told)

    def _text(self, index: int, row: _Row) -> str:
        return text_of(row, self._config.text_field, index)

    def _messages(self, index: int, row: _Row) -> Chat:
        field = self._config.messages_field
        where = f"row {index}, field {field!r}"
        return _chat(where, as_messages(row.get(field), where), index, row)

    def _pair(self, index: int, row: _Row) -> Read:
        names = (self._config.prompt_field, self._config.completion_field)
        if not any(isinstance(row.get(name), list) for name in names):
            return self._read_pair(f"row {index}", *(text_of(row, name, index) for name in names))
        prompt, completion = (
            _said(row, name, index, role)
            for name, role in zip(names, ("user", "assistant"), strict=True)
        )
        return _answered(f"row {index}", prompt, completion, index, row)

    def _chosen(self, index: int, row: _Row) -> Read:
        chosen, rejected = row.get(_CHOSEN), row.get(_REJECTED)
        prompt = row.get(self._config.prompt_field)
        where = f"row {index}"
        if isinstance(chosen, str) and isinstance(rejected, str):
            if prompt is None:
                prompt, chosen = _apart(chosen, rejected)
                if chosen and not prompt:
                    raise self._no_prompt(where)
            if isinstance(prompt, str):
                return self._read_pair(where, prompt, chosen, _optional(row, _SYSTEM, index))
        answer = _said(row, _CHOSEN, index, "assistant")
        other = _said(row, _REJECTED, index, "assistant")
        shared = 0
        while shared < min(len(answer), len(other)) and answer[shared] == other[shared]:
            shared += 1
        # The messages are the whole conversation, or else follow the prompt.
        follow = answer[0]["role"] == "assistant"
        if prompt is None and follow and not shared:
            raise self._no_prompt(where)
        if prompt is None or not follow:
            asked, answer = answer[:shared], answer[shared:]
        else:
            asked = _said(row, self._config.prompt_field, index, "user")
        return _answered(where, _led(asked, index, row), answer, index, row)

    def _no_prompt(self, where: str) -> InputError:
        field = self._config.prompt_field
        return InputError(
            f"{where}: has no {field!r}, and 'chosen' and 'rejected' share no beginning that could "
            f"be the prompt; found the fields {shown(sorted(self._columns))}; "
            f"expected the prompt in {field!r}, or in the field that --data.prompt-field names"
        )

    def _alpaca(self, index: int, row: _Row) -> Read:
        instruction, output = (text_of(row, name, index) for name in (_INSTRUCTION, _OUTPUT))
        further, system = (_optional(row, name, index) for name in (_INPUT, _SYSTEM))
        if self._chats and output:  # no template tells an empty answer from none
            asked = f"{instruction}\n\n{further}" if further else instruction
            messages = [*_system(system), *chat_with(asked, "").messages]
            return _answered(f"row {index}", messages, [_spoken(output)], index, {})
        return Pair(alpaca_prompt(instruction, further, begin=system), output)

    def _read_pair(self, where: str, prompt: str, completion: str, system: str = "") -> Read:
        if not (self._config.chat and completion):  # no template tells an empty answer from none
            return Pair(f"{system}\n\n{prompt}" if system else prompt, completion)
        asked = chat_with(prompt, where)
        return asked._replace(messages=[*_system(system), *asked.messages, _spoken(completion)])


def _sharegpt(field: str, index: int, row: _Row) -> Chat:
    """Reads `conversations`, with the fields `system` and `tools` beside it."""
    where = f"row {index}, field {field!r}"
    return _chat(where, _led(as_messages(row.get(field), where), index, row), index, row)


def _chat(where: str, messages: list[Message], index: int, row: _Row) -> Chat:
    weights = [message.pop("weight", 1) for message in messages]
    if odd := [weight for weight in weights if weight not in (0, 1, None)]:
        raise InputError(f"{where}: the weight of a message is {shown(odd[0])}; expected 0 or 1")
    learned = None if all(weight != 0 for weight in weights) else tuple(w != 0 for w in weights)
    return Chat(where, messages, as_tools(row.get(TOOLS), f"row {index}, field {TOOLS!r}"), learned)


def _answered(
    where: str, prompt: list[Message], answer: list[Message], index: int, row: _Row
) -> Chat:
    """Makes a conversation of which only the answer is learned."""
    chat = _chat(where, [*prompt, *answer], index, row)
    learned = (*[False] * len(prompt), *[True] * len(answer))
    return chat._replace(learned=learned)


def _said(row: _Row, field: str, index: int, role: str) -> list[Message]:
    """Gives the messages in a field; a text is one of `role`."""
    value = row.get(field)
    where = f"row {index}, field {field!r}"
    if isinstance(value, str):
        return [as_message({"role": role, "content": value}, where)]
    return as_messages(value, where)


def _spoken(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _led(messages: list[Message], index: int, row: _Row) -> list[Message]:
    """Puts the field `system` before messages that do not begin with such a message."""
    if messages and messages[0]["role"] == "system":
        return messages
    return [*_system(_optional(row, _SYSTEM, index)), *messages]


def _optional(row: _Row, field: str, index: int) -> str:
    """Gets the text in a field that rows need not have."""
    return text_of(row, field, index) if row.get(field) else ""


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def _apart(chosen: str, rejected: str) -> tuple[str, str]:
    """Cuts a chosen text where the rejected one begins to differ, before the word there."""
    both = zip(chosen, rejected, strict=False)
    shortest = min(len(chosen), len(rejected))
    at = next((place for place, (one, other) in enumerate(both) if one != other), shortest)
    while at and not chosen[at - 1].isspace():
        at -= 1
    prompt = chosen[:at].rstrip()
    return prompt, chosen[len(prompt) :]
