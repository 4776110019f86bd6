"""Builds the tokenizer of a GGUF file, without PyTorch, and describes a tokenizer for one."""

import json
from typing import TYPE_CHECKING, Any

from loft_jax.errors import InputError, shown
from loft_jax.hub.gguf_io import GGUF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # GGUF's types of tokens
_NAMED = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_SUPPORTED = "'gpt2' with 'gpt-2', 'smollm', 'llama-bpe' or 'qwen2'"

# How Llama 3 and Qwen2 split a text before the merges.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
}


def gguf_tokenizer(file: GGUF) -> "PreTrainedTokenizerFast":
    """Builds the byte-level BPE tokenizer of a GGUF file, with its chat template.

    transformers can read it too, but needs PyTorch for it, and leaves out the first step of
    SmolLM2's tokenizer, which splits numbers into digits.

    Args:
        file: An opened file.

    Returns:
        A tokenizer of transformers.

    Raises:
        InputError: The tokenizer is of another kind, which the message names.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    metadata = file.metadata
    kind, splitting = file.field("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or splitting not in ("gpt-2", "smollm", *_PATTERNS):
        raise InputError(
            f"{file.path}: its tokenizer is of kind {shown(kind)} with splitting "
            f"{shown(splitting)}, only {_SUPPORTED} is supported; use a folder with tokenizer.json "
            "instead"
        )
    llama_3 = splitting == "llama-bpe"
    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in file.field("tokenizer.ggml.merges")]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=llama_3,  # a word that is a token is that token
        )
    )
    if splitting == "qwen2":
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting not in _PATTERNS)
    ]
    if splitting in _PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(_PATTERNS[splitting]), behavior="isolated"))
    elif splitting == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, file.field("tokenizer.ggml.token_type"), strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])

    named = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in _NAMED.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    if metadata.get("tokenizer.ggml.add_bos_token", llama_3):
        number = file.field("tokenizer.ggml.bos_token_id")
        bos = tokens[number]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, number)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=file.field(f"{file.field('general.architecture')}.context_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def tokenizer_metadata(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> dict[str, Any]:
    """Describes a byte-level BPE tokenizer for a GGUF file; the inverse of `gguf_tokenizer`.

    Args:
        tokenizer: A tokenizer of transformers.
        vocab_size: Number of tokens that the model has weights for. Those that the tokenizer lacks
            are written as unused.

    Returns:
        The fields `tokenizer.*` of the metadata.

    Raises:
        InputError: The tokenizer is of another kind, or has more tokens than the model.
    """
    splitting = _splitting_of(tokenizer)
    names = tokenizer.get_vocab()
    if (largest := max(names.values(), default=-1)) >= vocab_size:
        raise InputError(
            f"the tokenizer has a token {largest}, and the weights have {vocab_size} rows; "
            "expected a tokenizer and weights that belong together"
        )
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, number in names.items():
        tokens[number], types[number] = token, _NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        special = added.special or number in tokenizer.all_special_ids
        types[number] = _CONTROL if special else _USER_DEFINED
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": splitting,
        "tokens": tokens,
        "token_type": types,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "add_bos_token": first == [tokenizer.bos_token_id],
    }
    for name, key in _NAMED.items():
        if (number := getattr(tokenizer, f"{name}_id")) is not None:
            metadata[f"{key}_token_id"] = number
    fields = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return {**fields, "tokenizer.chat_template": template} if template else fields


def _splitting_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Gives GGUF's name of how a tokenizer splits a text before the merges."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"the tokenizer is a {type(tokenizer).__name__}, only {_SUPPORTED} is supported in GGUF"
        )
    parts = json.loads(backend.to_str())
    first = parts["pre_tokenizer"] or {"type": "none"}
    steps = first.get("pretokenizers", [first])
    normalizer = (parts["normalizer"] or {"type": "none"})["type"]
    *before, last = steps
    whole = last["type"] == "ByteLevel" and not last["add_prefix_space"]
    splitting = ""
    if parts["model"]["type"] == "BPE" and whole and last["use_regex"]:
        digits = [step["type"] == "Digits" and step["individual_digits"] for step in before]
        splitting = {(): "gpt-2", (True,): "smollm"}.get(tuple(digits), "")
    elif parts["model"]["type"] == "BPE" and whole and len(before) == 1:
        pattern = before[0].get("pattern", {}).get("Regex")
        splitting = next((name for name, known in _PATTERNS.items() if known == pattern), "")
    ignores = bool(parts["model"].get("ignore_merges"))
    normalized = ("NFC", "none") if splitting == "qwen2" else ("none",)
    if not splitting or ignores != (splitting == "llama-bpe") or normalizer not in normalized:
        raise InputError(
            f"the tokenizer is {parts['model']['type']} with the steps "
            f"{[step['type'] for step in steps]} after the normalizer {normalizer}, only "
            f"{_SUPPORTED} is supported in GGUF"
        )
    return splitting
