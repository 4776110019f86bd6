"""Keeps tokenized examples in a folder of the user's cache, by the content they are made from."""

import contextlib
import hashlib
import inspect
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loft_jax.data.log_once import Logged, log_again, recorded
from loft_jax.errors import reason
from loft_jax.files import cache_folder, replacing

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_WORTHWHILE = 2.0  # seconds; what is tokenized faster is not kept
_DAYS = 30  # that a file is kept without being read
_RECORD = "logged"  # key of what was logged while tokenizing

Arrays = dict[str, np.ndarray]


def cached(
    make: Callable[[], Arrays],
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    settings: Mapping[str, Any],
) -> Arrays:
    """Gives the arrays that were made from the same content before, or makes them.

    What was logged while they were made is logged again. Several processes may do this at once: a
    file is there whole or not at all, and the same content has the same name.

    Args:
        make: A function that tokenizes the rows; the file it is written in is part of the key.
        rows: Their content is part of the key, in order.
        tokenizer: Its vocabulary, templates and settings are part of the key.
        settings: All else that the arrays depend on, as values that JSON can hold.

    Returns:
        The arrays, by name.
    """
    folder = cache_folder("tokens")
    key = _key(rows, tokenizer, settings, Path(inspect.getfile(make))) if folder else None
    file = folder / f"{key}.safetensors" if folder and key else None
    if file is not None and (found := _read(file)) is not None:
        arrays, record = found
        log_again(tokenizer, record)
        _log.info("tokens of %d rows are read from %s", len(rows), file)
        return arrays
    begun = time.monotonic()
    with recorded() as record:
        arrays = make()
    if file is not None and time.monotonic() - begun >= _WORTHWHILE:
        _write(file, arrays, record)
    return arrays


def _read(file: Path) -> tuple[Arrays, list[Logged]] | None:
    """Reads a file of the cache; None if it is missing or damaged."""
    from safetensors import safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as opened:
            record = [Logged(*one) for one in json.loads(opened.metadata()[_RECORD])]
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        os.utime(file)  # so that it is not removed as unused
    except Exception as error:
        _log.warning("%s: cannot be read (%s), and is made again", file, reason(error))
        return None
    return arrays, record


def _write(file: Path, arrays: Arrays, record: Sequence[Logged]) -> None:
    from safetensors.numpy import save_file

    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        oldest = time.time() - _DAYS * 24 * 3600
        for entry in file.parent.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another process may remove it
                if entry.stat().st_mtime < oldest:
                    entry.unlink()
        with replacing(file) as partial:
            save_file(arrays, partial, metadata={_RECORD: json.dumps(record)})
    except OSError as error:
        _log.warning("%s: tokens are not kept there (%s)", file.parent, reason(error))
    else:
        _log.info("tokens of the rows are kept in %s", file)


def _key(
    rows: "Dataset | Sequence[Mapping[str, Any]]",
    tokenizer: "PreTrainedTokenizerBase",
    settings: Mapping[str, Any],
    maker: Path,
) -> str | None:
    """Computes a checksum of all that tokens depend on; None if something cannot be read whole."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python; its files are not known here
        return None
    about = {
        "settings": settings,
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "split": getattr(tokenizer, "split_special_tokens", None),
        "init": {k: v for k, v in tokenizer.init_kwargs.items() if "file" not in k},
        "versions": _versions(),
    }
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode())
    digest.update(backend.to_str().encode())
    # Tokens may differ with this code.
    for source in sorted({*Path(__file__).parent.glob("*.py"), maker}):
        digest.update(source.read_bytes())
    if isinstance(rows, Sequence):
        for row in rows:
            try:
                digest.update(json.dumps(row, default=_refused).encode() + b"\n")
            except (TypeError, ValueError):
                return None
    else:
        digest.update(repr(rows.features).encode())
        for part in rows.with_format("arrow").iter(batch_size=1000):
            for batch in part.to_batches():
                digest.update(batch.serialize())
    return digest.hexdigest()[:32]


def _refused(value: Any) -> Any:
    raise TypeError(f"a {type(value).__name__} has no content that JSON holds")


def _versions() -> list[str]:
    from importlib.metadata import version

    return [version(name) for name in ("tokenizers", "transformers", "jinja2")]
