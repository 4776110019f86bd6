"""Builds the tokenizer of a GGUF file, without PyTorch."""

from typing import TYPE_CHECKING

from loft_jax.errors import InputError, shown
from loft_jax.hub.gguf_io import GGUF

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4  # GGUF's types of tokens that are never split

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
    if kind != "gpt2" or splitting not in ("smollm", *_PATTERNS):
        raise InputError(
            f"{file.path}: its tokenizer is of kind {shown(kind)} with splitting "
            f"{shown(splitting)}, only 'gpt2' with 'smollm', 'llama-bpe' or 'qwen2' is supported; "
            "use a folder with tokenizer.json instead"
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
    first = (
        pre_tokenizers.Split(Regex(_PATTERNS[splitting]), behavior="isolated")
        if splitting in _PATTERNS
        else pre_tokenizers.Digits(individual_digits=True)
    )
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting not in _PATTERNS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, words])
    backend.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, file.field("tokenizer.ggml.token_type"), strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            backend.add_tokens([AddedToken(token, special=special, normalized=False)])

    named = {
        name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {
            "bos_token": "bos",
            "eos_token": "eos",
            "unk_token": "unknown",
            "pad_token": "padding",
        }.items()
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
