"""Generates text with a model, one token at a time, with a cache of keys and values."""

import functools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from loft_jax.data.encode import encode_prompts
from loft_jax.data.templates import Message
from loft_jax.data.text import check_tokens, decoded
from loft_jax.errors import InputError, shown
from loft_jax.models.family import LanguageModel
from loft_jax.models.inference import inference_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_NEW = 2**20  # largest number of new tokens; the cache has room for them from the start
_BUCKET = 64  # lengths are rounded up to powers of two from here, so that few shapes are compiled


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_token_ids: Collection[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt until an ending token or the maximum length.

    Args:
        model: A language model, with or without LoRA layers.
        prompts: Tokens of each prompt, at least one.
        max_new_tokens: Largest number of new tokens for each prompt, at most 2^20.
        temperature: Logits are divided by it before sampling; 0 takes the most likely token.
        top_k: Sample only among this many most likely tokens.
        top_p: Sample among the smallest set of most likely tokens whose probabilities sum to this.
        eos_token_ids: Tokens that end a text; by default those of the model's configuration. Tokens
            that the model has no weights for are never generated, and are ignored.
        seed: Seed of the sampling, 0 to 2^32 - 1.

    Returns:
        The new tokens of each prompt, including an ending token.

    Raises:
        InputError: A prompt is empty or has a token outside the vocabulary, a number is out of its
            range, or the model's output is NaN.

    Example:
        >>> from loft_jax.models.llama import Llama, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=8)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> [len(new) for new in generate(model, [[1, 2, 3], [4]], max_new_tokens=5)]
        [5, 5]
    """
    vocab = model.config.vocab_size
    _check(prompts, vocab, max_new_tokens, temperature, top_k, top_p, seed)
    if not prompts:
        return []
    longest, most = max(map(len, prompts)), model.config.max_length
    if most is not None and longest + max_new_tokens > most:
        raise InputError(
            f"a prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, expected "
            f"{most} together at most, the positions of the model"
        )
    if eos_token_ids is None:
        eos_token_ids = _ends_of(model)

    width = _bucket(max(map(len, prompts)))
    tokens = np.zeros((len(prompts), width), np.int32)
    real = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(
        prompts
    ):  # padded on the left, so that all rows continue at the same slot
        tokens[row, width - len(prompt) :] = prompt
        real[row, width - len(prompt) :] = 1
    ends = np.zeros(vocab, bool)
    ends[[token for token in eos_token_ids if 0 <= token < vocab]] = True

    graphdef, state = inference_state(model)
    new, counts, finite = _generate(
        graphdef,
        _bucket(max_new_tokens),
        temperature > 0,
        state,
        jnp.asarray(tokens),
        jnp.asarray(real),
        jnp.asarray(ends),
        max_new_tokens,
        jnp.float32(temperature),
        vocab if top_k is None else min(top_k, vocab),
        jnp.float32(top_p),
        jax.random.key(seed),
    )
    if not finite:
        raise InputError(
            "the model's output is no number; expected finite weights, in the model and in the "
            "adapter"
        )
    return [
        row[:count].tolist() for row, count in zip(np.asarray(new), np.asarray(counts), strict=True)
    ]


def generate_text(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Sequence[str | Sequence[Message]]",
    *,
    max_new_tokens: int,
    **sampling: Any,
) -> list[str]:
    """Continues texts, or answers in conversations; `generate` for strings.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of messages for the chat template;
            `loft_jax.data.encode.encode_prompts` tokenizes them as in training.
        max_new_tokens: Largest number of new tokens for each prompt.
        **sampling: As for `generate`; by default texts end as `ending_tokens` says.

    Returns:
        The new text of each prompt, without special tokens.

    Raises:
        InputError: As for `generate`, or a conversation cannot be rendered.
    """
    tokens = encode_prompts(tokenizer, prompts)
    for number, ids in enumerate(tokens):
        check_tokens(ids, tokenizer, model.config.vocab_size, where=f"prompt {number}")
    sampling = {"eos_token_ids": ending_tokens(model, tokenizer), **sampling}
    continued = generate(model, tokens, max_new_tokens=max_new_tokens, **sampling)
    return [decoded(tokenizer, new, special=False) for new in continued]


def ending_tokens(model: LanguageModel, tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Gives the tokens that end a text.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.

    Returns:
        Those of the model's configuration, and EOS of the tokenizer, with which training closes
        completions.
    """
    eos = tokenizer.eos_token_id
    return {*_ends_of(model), *(() if eos is None else (eos,))}


def _ends_of(model: LanguageModel) -> Collection[int]:
    eos = model.config.eos_token_id
    return () if eos is None else (eos,) if isinstance(eos, int) else eos


def _check(
    prompts: Sequence[Sequence[int]],
    vocab: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} has no tokens, expected at least one")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError(f"prompt {number} has tokens outside the vocabulary, 0 to {vocab - 1}")
    if not 1 <= max_new_tokens <= _MOST_NEW:
        raise InputError(
            f"max_new_tokens is {shown(max_new_tokens)}, expected 1 to {_MOST_NEW} (2^20)"
        )
    if not temperature >= 0:
        raise InputError(f"temperature is {temperature}, expected 0 or more")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {shown(top_k)}, expected 1 or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, expected more than 0 and at most 1")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {shown(seed)}, expected 0 to 2^32 - 1")


def _bucket(length: int) -> int:
    return max(_BUCKET, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    graphdef: nnx.GraphDef[LanguageModel],
    room: int,
    sampled: bool,
    state: nnx.State,
    tokens: jax.Array,
    real: jax.Array,
    ends: jax.Array,
    max_new_tokens: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens `(b, room)` of which the first `(b,)` count, and whether all logits are finite.

    The prompts `(b, t)` are padded left.
    """
    model = nnx.merge(graphdef, state)
    batch, width = tokens.shape

    def pick(step: jax.Array, logits: jax.Array) -> jax.Array:
        if not sampled:
            return logits.argmax(-1).astype(jnp.int32)
        logits = _truncate(logits / temperature, top_k, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)

    def going(carry: Any) -> jax.Array:
        step, _, _, done, finite, _, _ = carry
        return (step < max_new_tokens) & ~done.all() & finite

    def add(carry: Any) -> Any:
        step, new, counts, done, finite, hidden, cache = carry
        logits = model.logits(hidden[:, -1])  # (b, vocab)
        finite = (jnp.isfinite(logits).all(-1) | done).all()
        token = jnp.where(done, 0, pick(step, logits))
        new = new.at[:, step].set(token)
        counts = counts + ~done
        done = done | ends[token]
        hidden, cache = model.hidden_states(token[:, None], cache=cache)
        return step + 1, new, counts, done, finite, hidden, cache

    hidden, cache = model.hidden_states(
        tokens, segment_ids=real, cache=model.init_cache(batch, width + room)
    )
    new = jnp.zeros((batch, room), jnp.int32)
    counts = jnp.zeros(batch, jnp.int32)
    done = jnp.zeros(batch, bool)
    start = (jnp.int32(0), new, counts, done, jnp.bool_(True), hidden[:, -1:], cache)
    _, new, counts, _, finite, *_ = lax.while_loop(going, add, start)
    return new, counts, finite


def _truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Puts -inf on every token that is not among the most likely ones; at least one stays."""
    ordered = jnp.sort(logits, axis=-1, descending=True)  # (b, vocab)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the more likely ones
    kept = (jnp.arange(logits.shape[-1]) < top_k) & (before < top_p)
    least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
