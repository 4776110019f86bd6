"""Generates text with a model, one token at a time, with a cache of keys and values."""

import functools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from loft_jax.data.encode import encode_prompts
from loft_jax.data.templates import Message
from loft_jax.data.text import check_tokens, decoded
from loft_jax.errors import InputError, shown
from loft_jax.models.attention import KVCache
from loft_jax.models.family import LanguageModel
from loft_jax.models.inference import inference_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_NEW = 2**20  # largest number of new tokens; the cache has room for them from the start
_BUCKET = 64  # lengths are rounded up to powers of two from here, so that few shapes are compiled
_NEAR = 16  # tokens before a text that decide how it begins; all of a prompt would take long
_LEAST_TEMPERATURE = 1e-6  # logits divided by it are finite in float32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest, or a random one of the likeliest.

    The logits are changed in this order, as in transformers: the penalty, the temperature, `top_k`,
    `top_p`, `min_p`.

    Args:
        temperature: Logits are divided by it; 0 takes the likeliest token, and higher values (1e-6
            at least) give more varied texts.
        top_k: Draw among this many likeliest tokens; by default among all.
        top_p: Draw among the likeliest tokens, as few as reach this total probability.
        min_p: Draw among tokens at least this many times as likely as the likeliest one.
        repetition_penalty: Logits of tokens that are in the text already, the prompt included, are
            divided by it if they are positive, and else multiplied; 1 changes nothing.
        seed: Seed of the random choices, 0 to 2^32 - 1.

    Raises:
        InputError: A value is out of its range, or would have no effect at temperature 0.

    Example:
        >>> Sampling(top_p=0.9)
        Traceback (most recent call last):
        loft_jax.errors.InputError: top_p is 0.9 at temperature 0, ...

    Source:
        Fan et al., https://arxiv.org/abs/1805.04833, section 5.4 (`top_k`); Holtzman et al.,
        https://arxiv.org/abs/1904.09751, section 3.1 (`top_p`); Nguyen et al.,
        https://arxiv.org/abs/2407.01082, section 3 (`min_p`); Keskar et al.,
        https://arxiv.org/abs/1909.05858, section 4.1 (the penalty).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"temperature is {self.temperature}, expected 0, or {_LEAST_TEMPERATURE} or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {shown(self.top_k)}, expected 1 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p is {self.min_p}, expected 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(
                f"repetition_penalty is {self.repetition_penalty}, expected a positive number"
            )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {shown(self.seed)}, expected 0 to 2^32 - 1")
        for name in ("top_k", "top_p", "min_p") if self.temperature == 0 else ():
            if (value := getattr(self, name)) != getattr(Sampling, name):
                raise InputError(
                    f"{name} is {shown(value)} at temperature 0, which takes the likeliest token; "
                    "expected a positive temperature beside it"
                )


GREEDY = Sampling()
"""Takes the likeliest token."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_token_ids: Collection[int] | None = None,
) -> list[list[int]]:
    """Continues each prompt until an ending token or the maximum length.

    Args:
        model: A language model, with or without LoRA layers.
        prompts: Tokens of each prompt, at least one.
        max_new_tokens: Largest number of new tokens for each prompt, at most 2^20.
        sampling: How tokens are chosen.
        eos_token_ids: Tokens that end a text; by default those of the model's configuration. Tokens
            that the model has no weights for are never generated, and are ignored.

    Returns:
        The new tokens of each prompt, including an ending token.

    Raises:
        InputError: A prompt is empty or has a token outside the vocabulary, the number of new
            tokens is out of its range, or the model's output is NaN.

    Example:
        >>> from loft_jax.models.llama import Llama, LlamaConfig
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48,
        ...                      num_hidden_layers=2, num_attention_heads=4,
        ...                      num_key_value_heads=2, head_dim=8)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> [len(new) for new in generate(model, [[1, 2, 3], [4]], max_new_tokens=5)]
        [5, 5]
    """
    if not prompts:
        return []
    ends = _ends_of(model) if eos_token_ids is None else eos_token_ids
    generation = _Generation(model, prompts, max_new_tokens, sampling, ends)
    generation.advance(max_new_tokens)
    return generation.tokens()


def generate_text(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Sequence[str | Sequence[Message]]",
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Continues texts, or answers in conversations; `generate` for strings.

    Texts end as `ending_tokens` says.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of messages for the chat template;
            `loft_jax.data.encode.encode_prompts` tokenizes them as in training.
        max_new_tokens: Largest number of new tokens for each prompt.
        sampling: How tokens are chosen.

    Returns:
        The new text of each prompt, without special tokens.

    Raises:
        InputError: As for `generate`, or a conversation cannot be rendered.
    """
    encoded = _encoded(model.config, tokenizer, prompts)
    continued = generate(
        model,
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=ending_tokens(model, tokenizer),
    )
    return [
        _continuation(tokenizer, prompt, ids, new)
        for prompt, ids, new in zip(prompts, encoded, continued, strict=True)
    ]


def stream_text(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "str | Sequence[Message]",
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """Continues one text, or answers in one conversation, a token at a time.

    Runs the same compiled programs as `generate_text` for one prompt, and gives the same text.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        prompt: A text, or a list of messages for the chat template.
        max_new_tokens: Largest number of new tokens.
        sampling: How tokens are chosen.

    Yields:
        Pieces of the new text as soon as they are known; a character of several tokens waits for
        the last of them.

    Raises:
        InputError: As for `generate_text`.
    """
    prompts = _encoded(model.config, tokenizer, [prompt])
    ends = ending_tokens(model, tokenizer)
    generation = _Generation(model, prompts, max_new_tokens, sampling, ends)
    given = ""
    for count in range(1, max_new_tokens + 1):
        going = generation.advance(count) and count < max_new_tokens
        text = _continuation(tokenizer, prompt, prompts[0], generation.tokens()[0])
        # An incomplete character is decoded as U+FFFD.
        if len(text) > len(given) and not (going and text.endswith("\ufffd")):
            yield text[len(given) :]
            given = text
        if not going:
            return


def _continuation(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "str | Sequence[Message]",
    ids: Sequence[int],
    new: Sequence[int],
) -> str:
    """Decodes what follows a prompt; alone, some tokenizers drop the space before its first word.

    An answer in a conversation begins a text of its own, without that space.
    """
    if isinstance(prompt, str):
        near = ids[-_NEAR:]
        before = decoded(tokenizer, near, special=False)
        if "\ufffd" in before:  # begins within a character, perhaps
            near, before = ids, decoded(tokenizer, ids, special=False)
        whole = decoded(tokenizer, [*near, *new], special=False)
        if whole.startswith(before):  # else a character has tokens of both
            return whole.removeprefix(before)
    return decoded(tokenizer, new, special=False)


def check_prompts(
    config: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Sequence[str | Sequence[Message]]",
    *,
    max_new_tokens: int,
) -> None:
    """Checks that a model can continue some prompts, before there is one.

    Args:
        config: Configuration of the model.
        tokenizer: As for `generate_text`, like the other arguments.
        prompts: Texts or conversations.
        max_new_tokens: Largest number of new tokens.

    Raises:
        InputError: As for `generate_text`.
    """
    _check(_encoded(config, tokenizer, prompts), config, max_new_tokens)


def _encoded(
    config: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "Sequence[str | Sequence[Message]]",
) -> list[list[int]]:
    tokens = encode_prompts(tokenizer, prompts)
    for number, ids in enumerate(tokens):
        check_tokens(ids, tokenizer, config.vocab_size, where=f"prompt {number}")
    return tokens


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


def _check(prompts: Sequence[Sequence[int]], config: Any, max_new_tokens: int) -> None:
    vocab, most = config.vocab_size, config.max_length
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} has no tokens, expected at least one")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise InputError(f"prompt {number} has tokens outside the vocabulary, 0 to {vocab - 1}")
    if not 1 <= max_new_tokens <= _MOST_NEW:
        raise InputError(
            f"max_new_tokens is {shown(max_new_tokens)}, expected 1 to {_MOST_NEW} (2^20)"
        )
    longest = max(map(len, prompts))
    if most is not None and longest + max_new_tokens > most:
        raise InputError(
            f"a prompt has {longest} tokens and max_new_tokens is {max_new_tokens}, expected "
            f"{most} together at most, the positions of the model"
        )


def _bucket(length: int) -> int:
    return max(_BUCKET, 1 << (length - 1).bit_length())


class _Choice(NamedTuple):
    """What chooses a token: numbers of `Sampling`, and the tokens `(vocab,)` that end a text."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    key: jax.Array
    ends: jax.Array


class _Progress(NamedTuple):
    """What is generated so far.

    Attributes:
        step: Number of steps done.
        new: Tokens `(b, room)`, of which the first `counts` of a row are generated.
        counts: `(b,)` int32.
        done: `(b,)`: whether the text has ended.
        seen: `(b, vocab)`: whether a token is in the text, the prompt included.
        finite: Whether all logits are finite.
        hidden: Input of the head for the next token, `(b, 1, hidden)`.
        cache: Keys and values of the text.
    """

    step: jax.Array
    new: jax.Array
    counts: jax.Array
    done: jax.Array
    seen: jax.Array
    finite: jax.Array
    hidden: jax.Array
    cache: KVCache | None


class _Generation:
    """Prompts that are being continued."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_ids: Collection[int],
    ) -> None:
        _check(prompts, model.config, max_new_tokens)
        vocab = model.config.vocab_size
        width = _bucket(max(map(len, prompts)))
        tokens = np.zeros((len(prompts), width), np.int32)
        real = np.zeros((len(prompts), width), np.int32)
        # Padded on the left, so that all rows continue at the same slot.
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = prompt
            real[row, width - len(prompt) :] = 1
        ends = np.zeros(vocab, bool)
        ends[[token for token in eos_token_ids if 0 <= token < vocab]] = True
        self._choice = _Choice(
            jnp.float32(sampling.temperature),
            jnp.int32(vocab if sampling.top_k is None else min(sampling.top_k, vocab)),
            jnp.float32(sampling.top_p),
            jnp.float32(sampling.min_p),
            jnp.float32(sampling.repetition_penalty),
            jax.random.key(sampling.seed),
            jnp.asarray(ends),
        )
        self._sampled = sampling.temperature > 0
        self._graphdef, self._state = inference_state(model)
        self._progress = _begin(
            self._graphdef,
            _bucket(max_new_tokens),
            self._state,
            jnp.asarray(tokens),
            jnp.asarray(real),
        )

    def advance(self, step: int) -> bool:
        """Generates until this number of steps are done, and says whether a text goes on."""
        self._progress = _advance(
            self._graphdef, self._sampled, self._state, self._choice, step, self._progress
        )
        if not self._progress.finite:
            raise InputError(
                "the model's output is no number; expected finite weights, in the model and in the "
                "adapter"
            )
        return not np.all(self._progress.done)

    def tokens(self) -> list[list[int]]:
        """Gives the new tokens of each prompt."""
        new, counts = map(np.asarray, (self._progress.new, self._progress.counts))
        return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    graphdef: nnx.GraphDef[LanguageModel],
    room: int,
    state: nnx.State[Any, Any],
    tokens: jax.Array,
    real: jax.Array,
) -> _Progress:
    """Reads the prompts `(b, t)`, padded left; there is room for this many new tokens."""
    model = nnx.merge(graphdef, state)
    batch, width = tokens.shape
    hidden, cache = model.hidden_states(
        tokens, segment_ids=real, cache=model.init_cache(batch, width + room)
    )
    rows = jnp.arange(batch)[:, None]
    return _Progress(
        step=jnp.int32(0),
        new=jnp.zeros((batch, room), jnp.int32),
        counts=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        seen=jnp.zeros((batch, model.config.vocab_size), bool).at[rows, tokens].max(real > 0),
        finite=jnp.bool_(True),
        hidden=hidden[:, -1:],
        cache=cache,
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=5)
def _advance(
    graphdef: nnx.GraphDef[LanguageModel],
    sampled: bool,
    state: nnx.State[Any, Any],
    choice: _Choice,
    until: jax.Array,
    progress: _Progress,
) -> _Progress:
    """Adds tokens until this number of steps are done, or all texts have ended."""
    model = nnx.merge(graphdef, state)

    def going(now: _Progress) -> jax.Array:
        return (now.step < until) & ~now.done.all() & now.finite

    def add(now: _Progress) -> _Progress:
        logits = model.logits(now.hidden[:, -1])  # (b, vocab)
        finite = (jnp.isfinite(logits).all(-1) | now.done).all()
        logits = _penalized(logits, now.seen, choice.repetition_penalty)
        if sampled:
            logits = _truncated(logits / choice.temperature, choice)
            key = jax.random.fold_in(choice.key, now.step)
            token = jax.random.categorical(key, logits).astype(jnp.int32)
        else:
            token = logits.argmax(-1).astype(jnp.int32)
        token = jnp.where(now.done, 0, token)
        hidden, cache = model.hidden_states(token[:, None], cache=now.cache)
        return _Progress(
            step=now.step + 1,
            new=now.new.at[:, now.step].set(token),
            counts=now.counts + ~now.done,
            done=now.done | choice.ends[token],
            seen=now.seen.at[jnp.arange(len(token)), token].set(True),
            finite=finite,
            hidden=hidden,
            cache=cache,
        )

    return lax.while_loop(going, add, progress)


def _penalized(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes tokens `(b, vocab)` that are in the text less likely."""
    less = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(seen, less, logits)


def _truncated(logits: jax.Array, choice: _Choice) -> jax.Array:
    """Puts -inf on every token that is not among the likeliest ones; at least one stays."""
    ordered = jnp.sort(logits, axis=-1, descending=True)  # (b, vocab)
    first = jnp.arange(logits.shape[-1]) < choice.top_k
    probabilities = jax.nn.softmax(jnp.where(first, ordered, -jnp.inf), axis=-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the likelier ones
    likely = probabilities >= choice.min_p * probabilities[:, :1]
    kept = first & (before < choice.top_p) & likely
    least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
