"""The `train` group: the whole training step."""

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.history import Row
from benchmarks.optimizer.compiling import against_base, compile_cold
from benchmarks.optimizer.contestants import DENSE, Contestant, make_optimizer
from benchmarks.optimizer.settings import RANK, Bench
from benchmarks.optimizer.shapes import rank_of
from benchmarks.optimizer.turns import WARM_UP, Turn, take_turns, timing
from loft_jax import LoRAConfig, add_lora, load_pretrained, state_bytes
from loft_jax.errors import InputError
from loft_jax.models.family import LanguageModel
from loft_jax.models.llama import Llama, LlamaConfig
from loft_jax.tasks.causal_lm import CausalLM, predicted
from loft_jax.training.partition import split_model
from loft_jax.training.step import TrainState, initial_state, make_step


def train_rows(bench: Bench) -> Iterator[Row]:
    """Measures whole training steps with each optimizer.

    Args:
        bench: Its model, batches, train_rounds, optimizers and quick are used.

    Yields:
        A row for each batch and contestant.

    Raises:
        InputError: A batch that is not ROWSxTOKENS.
    """
    batches = ("2x16",) if bench.quick else bench.batches
    for text in batches:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
            raise InputError(f"batches holds {text!r}, expected ROWSxTOKENS: 8x128")
    model, weights = load_model(bench)
    add_lora(model, LoRAConfig(rank=4 if bench.quick else RANK), rngs=nnx.Rngs(0))
    model.train()
    parts = split_model(model, nnx.LoRAParam)
    for text in batches:
        rows, length = map(int, text.split("x"))
        yield from _train_case(bench, model, weights, parts, (rows, length))


def _train_case(
    bench: Bench, model: LanguageModel, weights: str, parts: Any, shape: tuple[int, int]
) -> Iterator[Row]:
    rows, length = shape
    batch = random_batch(rows, length, model.config.vocab_size)
    names = [name for name in bench.optimizers if name not in DENSE]
    case = {"name": f"{weights}, batch {rows}x{length}", "rank": rank_of(parts.params)}
    costs: dict[Contestant, Row] = {}
    turns: dict[Contestant, Turn] = {}
    total = len(names) * (bench.train_rounds + WARM_UP)
    with tqdm(total=total, desc="train", unit="step") as bar:

        def step(call: Callable[..., Any], state: TrainState) -> tuple[Any, TrainState]:
            state, metrics = call(state, parts.frozen, batch)
            bar.update()
            return metrics, state

        for name in names:
            bar.set_postfix_str(f"compiling {name}")
            tx = make_optimizer(name)
            state = initial_state(parts, tx)
            call, costs[name] = compile_cold(
                make_step(parts, CausalLM().loss, tx), state, parts.frozen, batch
            )
            costs[name] |= {"state_bytes": state_bytes(tx, parts.params)}
            turns[name] = Turn(functools.partial(step, call), state)
        bar.set_postfix_str("")
        times = take_turns(turns, bench.train_rounds, math.inf, repeat=False)
    for name in names:
        turns[name].check(name)
        about = case | {"optimizer": name}
        yield about | against_base(parts.params, costs[name]) | timing(times, name)


def load_model(bench: Bench) -> tuple[LanguageModel, str]:
    """The model of the train group, in the dtype that `loft-jax finetune` takes by default.

    Args:
        bench: Its model and quick are used.

    Returns:
        The model, and which it is, in words.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if bench.quick:
        return Llama(TINY, rngs=nnx.Rngs(0)), "a tiny Llama of random weights"
    if Path(bench.model).exists():
        model = load_pretrained(bench.model, dtype=dtype, param_dtype=dtype)
        return model, Path(bench.model).name
    tqdm.write(f"{bench.model} is missing: random weights of the same sizes", file=sys.stderr)
    model = Llama(SMOLLM2_135M, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    return model, "SmolLM2-135M of random weights"


SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)

TINY = dataclasses.replace(
    SMOLLM2_135M,
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def random_batch(rows: int, length: int, vocab_size: int) -> Any:
    """Random tokens, each to be predicted; speed does not depend on what they say."""
    tokens = np.random.default_rng(0).integers(1, vocab_size, (rows, length), dtype=np.int32)
    batch = {
        "tokens": tokens,
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones_like(tokens),
        "loss_mask": np.ones(tokens.shape, bool),
    }
    return jax.tree.map(jnp.asarray, predicted(batch))
