"""Loads the tokenizer of a folder with transformers, after checks of its files."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loft_jax.errors import InputError, explained, shown
from loft_jax.files import MOST_CONFIG, inside, read_json, regular_file
from loft_jax.hub.peft_names import CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
"""A folder with this file holds a tokenizer."""

_MOST_BYTES = 2**27  # largest size of a file; the largest vocabularies have a quarter
_MOST_GROWTH = 1000  # largest factor by which normalizers and special tokens may lengthen a text

_IS_TOKENIZER = re.compile(r"Tokenizer|Backend$")

# Files that transformers may open to read a tokenizer.
_READ = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "additional_chat_templates/*.jinja")
# What a tokenizer there says of itself.
_SETTINGS = (
    TOKENIZER_CONFIG,
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
_JSON = {
    "config.json": MOST_CONFIG,
    TOKENIZER_CONFIG: MOST_CONFIG,
    "tokenizer.json": _MOST_BYTES,
    "special_tokens_map.json": MOST_CONFIG,
    "added_tokens.json": MOST_CONFIG,
    "vocab.json": _MOST_BYTES,
}


def folder_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a folder, without running its code or using the network.

    Args:
        folder: Folder with the files that transformers writes.

    Returns:
        A tokenizer of transformers.

    Raises:
        InputError: There is no tokenizer; or a file is damaged, leads out of the folder, could
            lengthen texts without bound, or requires code of its own.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    for pattern in _READ:
        for file in sorted(folder.glob(pattern)):
            name = file.relative_to(folder)
            regular_file(inside(folder, name), f"a file as {name}", most_bytes=_MOST_BYTES)
    contents = {
        name: read_json(folder / name, most_bytes=most)
        for name, most in _JSON.items()
        if (folder / name).exists()
    }
    _check_names(folder, contents.get(TOKENIZER_CONFIG, {}))
    file = folder / "tokenizer.json"
    with explained(f"{file}: cannot be read as a tokenizer"):
        _check_growth(file, contents.get(file.name, {}))
    _check_class(folder, contents)
    if not file.exists() and not any(map(any, map(folder.glob, ("tokenizer*", "vocab*")))):
        raise InputError(f"{folder}: has no tokenizer, expected tokenizer.json")
    try:
        with explained(f"{folder}: no tokenizer can be loaded"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except InputError:
        if file.exists():  # names the file that most errors are in
            with explained(f"{file}: cannot be read as a tokenizer"):
                Tokenizer.from_file(str(file))
        raise
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"{folder}: its tokenizer_class is no tokenizer's")
    if not isinstance(length := tokenizer.model_max_length, (int, float)):
        raise InputError(f"{folder}: model_max_length is {shown(length)}, expected a number")
    return tokenizer


def adapter_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Loads the tokenizer that an adapter's folder holds.

    Args:
        folder: The folder.

    Returns:
        As `folder_tokenizer`, or None if there is none, so that the base's is the adapter's.

    Raises:
        InputError: As for `folder_tokenizer`.
    """
    return folder_tokenizer(folder) if (folder / TOKENIZER_CONFIG).exists() else None


def save_processor(folder: Path, processor: Any) -> None:
    """Writes the tokenizer or image processor of an adapter that is to be written next.

    Args:
        folder: The adapter's, made if needed. An adapter there is no longer complete, and what a
            tokenizer there says of itself goes.
        processor: It; None for none.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for name in _SETTINGS:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    if processor is not None:
        processor.save_pretrained(str(folder))


def with_template_of(processor: Any, adapter: str, *, training: bool = False) -> Any:
    """Gives a base's tokenizer the chat template of an adapter, by which that was trained.

    Args:
        processor: Tokenizer of the base, which is changed, or an image processor.
        adapter: Folder of the adapter; empty for none.
        training: Whether the adapter is to be trained on: without a template of its own it then
            has the base's, since the examples decide how it will be asked.

    Returns:
        The same; as it was if the adapter's folder holds no tokenizer.

    Raises:
        InputError: The adapter's tokenizer cannot be read.
    """
    if not adapter or not hasattr(processor, "chat_template"):
        return processor
    if (own := adapter_tokenizer(Path(adapter))) is not None:
        template = own.chat_template
        if processor.chat_template and not template:
            if training:
                return processor
            _log.info(
                "%s: its tokenizer has no chat template, so that of the base is not used; it would "
                "be if the folder held no tokenizer",
                adapter,
            )
        processor.chat_template = template
    return processor


def _check_class(folder: Path, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a class that is not a tokenizer's, since transformers would instantiate it."""
    for name in (TOKENIZER_CONFIG, "config.json"):
        found = contents.get(name, {}).get("tokenizer_class")
        if found is None or (isinstance(found, str) and _IS_TOKENIZER.search(found)):
            continue
        raise InputError(
            f"{folder / name}: tokenizer_class is {shown(found)}, expected the name of a tokenizer"
        )


def _check_names(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses files outside the folder that a configuration names.

    A configuration often names files of its author's machine, which do not exist here and which
    transformers ignores; these are allowed.
    """
    for key, value in config.items():
        if key == "fast_tokenizer_files" and isinstance(value, list):
            for name in value:
                inside(folder, str(name))
        elif key.endswith("_file") and isinstance(value, str):
            with explained(f"{folder}: tokenizer_config.json sets {key} to {shown(value)}"):
                if os.path.exists(value) or (folder / value).exists():
                    inside(folder, value)


def _check_growth(file: Path, content: Mapping[str, Any]) -> None:
    """Refuses replacements that feed each other, so that a short text becomes a very long one."""
    framed = 1
    for part in _parts(content.get("post_processor")):
        added = (part.get("special_tokens") or {}).values()
        framed *= max(1, len(part.get("single") or ()), len(part.get("pair") or ()))
        framed *= max(1, *(len(token.get("ids") or ()) for token in added), 1)
    for name, growth in (
        ("normalizer", _replaced(content.get("normalizer"))),
        ("post_processor", framed),
        ("decoder", _replaced(content.get("decoder"))),
    ):
        if growth > _MOST_GROWTH:
            raise InputError(
                f"{file}: its {name} can make a text {growth:.0g} times as long, expected at most "
                f"{_MOST_GROWTH}"
            )


def _replaced(steps: Any) -> float:
    """Computes by which factor successive replacements can lengthen a text."""
    growth = 1.0
    for part in _parts(steps):
        added = len(part.get("content") or part.get("prepend") or "")
        replaced = (part.get("pattern") or {}).get("String") or "x"
        growth *= max(1.0, (added + 1) / len(replaced))
    return growth


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a sequence of normalizers, processors or decoders, also nested ones."""
    if not isinstance(part, Mapping):
        return
    yield part
    for key in ("normalizers", "processors", "decoders"):
        for inner in part.get(key) or ():
            yield from _parts(inner)
