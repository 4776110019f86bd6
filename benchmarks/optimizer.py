"""What LoFT costs: update time, memory and compile time beside AdamW and beside dense LoFT.

Three groups of cases:

- `update`: the jitted optimizer update (state donated) on factors of one shape, for `optax.adamw`
  (what LoRA pays), each `loft`, and the paper's formulas as written (`dense_loft.py`).
- `compile`: the same update for all adapters of Llama-2-7B at rank 16, as 224 separate pairs and
  as 7 stacks of 32, and for one 4096x11008 pair: traced and compiled from shapes alone, nothing
  allocated. Dense LoFT, which is written for separate pairs, is left out of the stacked one.
- `train`: the whole training step of SmolLM2-135M (rank 16 on all linear layers), by batch.
  Dense LoFT is left out here too, since the layers are stacked.

All optimizers clip by the global norm as `loft-jax finetune` does. Times are compared within one
process: the contestants take turns, many short ones, in an order that rotates, and a ratio is the
median over rounds of the ratio within a round, so that what a shared machine does to all of them
cancels. One process for all cases, because taking turns needs it and an accelerator belongs to one
process; memory is therefore not what the process holds but what the compiler planned
(`memory_analysis`), and every compilation starts from cleared caches.

Writes into the output folder: one JSON line a measured row for each group (`update.jsonl`,
`compile.jsonl`, `train.jsonl`, made anew when the group runs), and from all that are there
`results.md` and `results.png` (which takes matplotlib, the extra `plot`).

    python -m benchmarks.optimizer  # everything
    python -m benchmarks.optimizer --cases update --shapes 1024x1024x8 --ranks 16
    python -m benchmarks.optimizer --quick --output runs/quick
"""

import dataclasses
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

import loft_jax
from benchmarks.dense_loft import dense_loft
from benchmarks.report import DENSE, REFERENCES, Contestant, Group, Row, markdown, plot, read_rows
from loft_jax import LoRAConfig, add_lora, load_pretrained, loft, state_bytes
from loft_jax.errors import InputError
from loft_jax.models import Llama, LlamaConfig
from loft_jax.training.parts import split_model
from loft_jax.training.step import TrainState, initial_state, make_step, predicted

_TURN_SECONDS = 0.03  # a turn is at least this long: many dispatches, and still short
_LEAST_ROUNDS = 3
_WARM_UP = 2  # the first is slow for reasons of its own; two, so that both factors have moved
_RATE, _CLIP = 1e-3, 1.0
_RANK = 16  # of the compile and train groups


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure optimizer updates, their compilation, and the whole training step."""

    cases: tuple[Group, ...] = get_args(Group)
    """What to measure."""
    optimizers: tuple[Contestant, ...] = get_args(Contestant)
    """Contestants; ratios are to adamw and dense, where they take part."""
    shapes: tuple[str, ...] = ("256x256", "1024x1024x8", "4096x4096", "4096x11008", "8192x8192")
    """Weights of the update group: INxOUT, or INxOUTxPAIRS for several pairs."""
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    """Ranks of the update group."""
    rounds: int = 40
    """Turns of each contestant at most."""
    seconds: float = 30.0
    """Time for the turns of an update case; they end early, but not before three rounds."""
    batches: tuple[str, ...] = ("8x128", "16x128")
    """Batches of the train group: ROWSxTOKENS."""
    train_rounds: int = 12
    """Steps of each contestant in the train group, after two to warm up."""
    memory_gib: float = 8.0
    """What one contestant of an update case may take; above it is skipped, as the table says."""
    model: str = "assets/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Model of the train group; where the file is missing, the same sizes with random weights."""
    output: Path = Path("runs/optimizer")
    """Folder of the results."""
    quick: bool = False
    """Tiny sizes and two rounds, to see that it runs: its numbers mean nothing."""


class Compiled(NamedTuple):
    """A jitted function compiled ahead of time, with what that took.

    Attributes:
        call: The compiled function.
        costs: `trace_seconds`, `compile_seconds`, `temp_bytes` and `peak_bytes` (arguments,
            results and temporaries together, donated ones once).
    """

    call: jax.stages.Compiled
    costs: Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: runs the groups that are asked for and writes the results.

    Args:
        arguments: As typed; by default those of the process.

    Returns:
        The exit code.
    """
    bench = tyro.cli(Bench, args=arguments, description=(__doc__ or "").partition("\n")[0])
    if bench.quick:
        bench = dataclasses.replace(
            bench, shapes=("48x32x2",), ranks=(2,), rounds=2, seconds=1.0, train_rounds=2
        )
    # What one case leaves behind must not make the next one compile faster.
    jax.config.update("jax_enable_compilation_cache", False)
    # On a CPU two updates in flight would compete for the same cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    measure: dict[Group, Callable[[Bench], Iterator[Row]]] = {
        "update": update_rows,
        "compile": compile_rows,
        "train": train_rows,
    }
    try:
        shapes_of(bench)
        jax.jit(jnp.linalg.cholesky)(jnp.eye(4))  # starts the compiler: no case pays for that
        bench.output.mkdir(parents=True, exist_ok=True)
        about = versions() | {"quick": bench.quick}
        for group in get_args(Group):
            if group in bench.cases:
                with (bench.output / f"{group}.jsonl").open("w", encoding="utf-8") as file:
                    for row in measure[group](bench):
                        file.write(json.dumps({"group": group} | row | about) + "\n")
                        file.flush()
        rows = read_rows(bench.output)
        table = markdown(rows)
        (bench.output / "results.md").write_text(table, encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"optimizer: {error}", file=sys.stderr)
        return 2
    print(table)
    if not plot(rows, bench.output / "results.png"):
        print("no plot: matplotlib is not installed (extra `plot`)", file=sys.stderr)
    print(f"results: {bench.output}")
    return 0


def make_optimizer(name: Contestant) -> optax.GradientTransformation:
    """A contestant by its name, clipping by the global norm of its gradients.

    Args:
        name: "adamw" is Optax's on the factors, "dense" the paper's formulas as written,
            "dense-einsum" these with the second moment's product in the order of least work, the
            others are `loft_jax.loft` by its second moment and its move ("loft" is the exact
            moment in float32, along the tangent space), the exact one with balanced factors, and
            `loft_jax.loft_muon`.

    Returns:
        The transformation.
    """
    if name == "adamw":
        return optax.chain(optax.clip_by_global_norm(_CLIP), optax.adamw(_RATE, weight_decay=0.0))
    if name in DENSE:
        return dense_loft(_RATE, max_grad_norm=_CLIP, from_the_left=name == "dense")
    if name == "loft-muon":
        return loft_jax.loft_muon(_RATE, max_grad_norm=_CLIP)
    settings: dict[str, dict[str, Any]] = {
        "loft": {},
        "loft-factored": {"second_moment": "factored"},
        "loft-alternate": {"move": "alternate"},
        "loft-alternate-factored": {"second_moment": "factored", "move": "alternate"},
        "loft-balanced": {"balance": True},
        "loft-bf16": {"state_dtype": jnp.bfloat16},
        "loft-diagonal": {"second_moment": "diagonal"},
    }
    return loft(_RATE, max_grad_norm=_CLIP, **{"second_moment": "full", **settings[name]})


# --- update: one shape, many contestants ---


def update_rows(bench: Bench) -> Iterator[Row]:
    """Measures updates over shapes and ranks.

    Args:
        bench: Its shapes, ranks, rounds, seconds, memory_gib and optimizers are used.

    Yields:
        A row for each case and contestant.
    """
    cases = [
        (shape, rank)
        for shape, rank in itertools.product(shapes_of(bench), bench.ranks)
        if rank <= min(shape[:2])
    ]
    with tqdm(total=len(cases) * len(bench.optimizers), desc="update", unit="row") as bar:
        for (m, n, pairs), rank in cases:
            bar.set_postfix_str(f"{m}x{n} x {pairs}, r {rank}")
            case = {"in": m, "out": n, "pairs": pairs, "rank": rank}
            shapes = pair_shapes(m, n, rank, pairs)
            for row in _update_case(bench, shapes, bar):
                yield case | _against(shapes, row)
            gc.collect()  # the arrays of a case go before the next one comes


def shapes_of(bench: Bench) -> list[tuple[int, int, int]]:
    """The shapes of the update group as (in, out, pairs).

    Raises:
        InputError: One that is not INxOUT or INxOUTxPAIRS.
    """
    found = []
    for text in bench.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
            raise InputError(f"shapes holds {text!r}, expected INxOUT or INxOUTxPAIRS: 1024x1024x8")
        m, n, pairs = (*map(int, text.split("x")), 1)[:3]
        found.append((m, n, pairs))
    return found


def pair_shapes(m: int, n: int, rank: int, pairs: int) -> Any:
    """The factors of equal layers as separate leaves, shapes only."""
    return {"layers": {str(i): {"q_proj": _pair(m, n, rank)} for i in range(pairs)}}


def _pair(m: int, n: int, rank: int, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "lora_a": jax.ShapeDtypeStruct((*stack, m, rank), jnp.float32),
        "lora_b": jax.ShapeDtypeStruct((*stack, rank, n), jnp.float32),
    }


def _update_case(bench: Bench, shapes: Any, bar: "tqdm[Any]") -> Iterator[Row]:
    rows: dict[Contestant, Row] = {}
    turns: dict[Contestant, Turn] = {}
    params, gradients = random_like(shapes, 0), random_like(shapes, 1)

    def step(call: Callable[..., Any], state: Any) -> tuple[Any, Any]:
        updates, state = call(gradients, state, params)
        return updates, state

    for name in bench.optimizers:
        call, rows[name] = compile_update(name, shapes)
        needed = rows[name]["peak_bytes"] / 2**30
        if needed > bench.memory_gib:
            reason = f"needs {needed:.1f} GiB, over the {bench.memory_gib:g} GiB that are allowed"
            rows[name]["skipped"] = reason
        else:
            state = make_optimizer(name).init(params)
            turns[name] = Turn(functools.partial(step, call), state)
        bar.update()
    times = take_turns(turns, bench.rounds, bench.seconds)
    for name in turns:
        rows[name] |= timing(times, name)
        turns[name].check(name)
    for name, row in rows.items():
        yield {"optimizer": name} | row


def random_like(shapes: Any, seed: int) -> Any:
    """Normal random arrays: as factors well conditioned and not zero, as they are in training."""
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    arrays = [
        jnp.asarray(0.1 * rng.standard_normal(leaf.shape, dtype=np.float32)) for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, arrays)


def compile_update(name: Contestant, shapes: Any) -> Compiled:
    """Compiles an update with donated state, from shapes alone.

    Args:
        name: Of the contestant.
        shapes: Its parameters.

    Returns:
        The update, from (gradients, state, parameters) to (updates, state); and the costs of
        `compile_cold` with `state_bytes`.
    """
    tx = make_optimizer(name)
    state = jax.eval_shape(tx.init, shapes)
    call, costs = compile_cold(jax.jit(tx.update, donate_argnums=1), shapes, state, shapes)
    return Compiled(call, costs | {"state_bytes": state_bytes(tx, shapes)})


def compile_cold(jitted: Any, *arguments: Any) -> Compiled:
    """Traces and compiles with nothing left of what was compiled before.

    Args:
        jitted: A function under `jax.jit`.
        arguments: Its arguments, or their shapes.

    Returns:
        The compiled function with its costs.
    """
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    call = lowered.compile()
    done = time.perf_counter()
    memory = call.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    costs = {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
    }
    return Compiled(call, costs)


class Turn:
    """What one contestant does when it is its turn, going on from the last time.

    Args:
        step: From a state to (result, next state).
        state: The first state; `step` may donate it.
    """

    def __init__(self, step: Callable[[Any], tuple[Any, Any]], state: Any) -> None:
        self._step, self._state = step, state
        self._result: Any = None

    def __call__(self, repeats: int) -> float:
        """Does it `repeats` times, to the end; gives the seconds of all together."""
        start = time.perf_counter()
        for _ in range(repeats):
            self._result, self._state = self._step(self._state)
        jax.block_until_ready((self._result, self._state))
        return time.perf_counter() - start

    def check(self, name: str) -> None:
        """Refuses a measurement of NaN.

        Args:
            name: Of the contestant, for the message.

        Raises:
            InputError: The last result is not finite.
        """
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(self._result)):
            raise InputError(f"{name} came to values that are not finite: its time means nothing")


def take_turns(
    turns: Mapping[Contestant, Turn], rounds: int, seconds: float, *, repeat: bool = True
) -> dict[Contestant, list[float]]:
    """Times contestants by turns.

    Args:
        turns: By name.
        rounds: Turns of each at most.
        seconds: After which no new round begins, but three are done.
        repeat: Whether a turn is filled up to 30 ms. It has an even number of repeats, since both
            factors take the same share of it then; otherwise it is a single one.

    Returns:
        Seconds of one repeat by name, one number a round.
    """
    repeats = {}
    for name, turn in turns.items():
        for _ in range(_WARM_UP):
            turn(1)
        repeats[name] = 2 * math.ceil(_TURN_SECONDS / turn(2)) if repeat else 1
    times: dict[Contestant, list[float]] = {name: [] for name in turns}
    names = list(turns)
    start = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            times[name].append(turns[name](repeats[name]) / repeats[name])
    return times


def timing(times: Mapping[Contestant, Sequence[float]], name: Contestant) -> Row:
    """What the rounds came to for one contestant.

    Args:
        times: Seconds by contestant, one number a round.
        name: Of the contestant.

    Returns:
        `seconds` (median), `rounds`, and for each reference that took part (adamw, both dense)
        the median ratio over the rounds with its quartiles: `to_adamw`, `to_adamw_quartiles`.
    """
    row: Row = {"seconds": statistics.median(times[name]), "rounds": len(times[name])}
    for reference in REFERENCES:
        if reference in times:
            ratios = [x / y for x, y in zip(times[name], times[reference], strict=True)]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
            row |= {f"to_{reference}": middle, f"to_{reference}_quartiles": [low, high]}
    return row


def _against(shapes: Any, row: Row) -> Row:
    """A row with its temporaries as a share of the base weight in bfloat16."""
    size = base_bytes(shapes)
    return row | {"base_bytes": size, "temp_share": row["temp_bytes"] / size}


# --- compile: whole models, shapes only ---


def compile_rows(bench: Bench) -> Iterator[Row]:
    """Measures trace and compile time and the planned memory of updates of whole models.

    Args:
        bench: Its optimizers and quick are used.

    Yields:
        A row for each case and contestant.
    """
    rank = 4 if bench.quick else _RANK
    hidden, intermediate, layers = (32, 48, 2) if bench.quick else (4096, 11008, 32)
    cases = {
        "one pair": pair_shapes(hidden, intermediate, rank, 1),
        "Llama-2-7B separate": llama_shapes(hidden, intermediate, layers, rank, stacked=False),
        "Llama-2-7B stacked": llama_shapes(hidden, intermediate, layers, rank, stacked=True),
    }
    todo = [
        (case, name)
        for case, name in itertools.product(cases, bench.optimizers)
        if not (name in DENSE and case.endswith("stacked"))
    ]
    with tqdm(todo, desc="compile", unit="row") as bar:
        for case, name in bar:
            bar.set_postfix_str(f"{case}, {name}")
            shapes = cases[case]
            row = compile_update(name, shapes).costs
            yield {"case": case, "rank": rank, "optimizer": name} | _against(shapes, row)


def llama_shapes(hidden: int, intermediate: int, layers: int, rank: int, *, stacked: bool) -> Any:
    """The factors of all linear layers of a Llama with as many key heads as heads, shapes only.

    Args:
        hidden: Width of the model.
        intermediate: Width of the MLP.
        layers: How many.
        rank: Of the factors.
        stacked: One leaf with the layers in front, or one for each layer.

    Returns:
        A tree with paths like `layers/0/self_attn/q_proj`, or `layers/self_attn/q_proj`.
    """
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    mlp = dict.fromkeys(("gate_proj", "up_proj"), (hidden, intermediate))
    modules = {"self_attn": attention, "mlp": mlp | {"down_proj": (intermediate, hidden)}}

    def layer(stack: tuple[int, ...]) -> Any:
        return {
            block: {name: _pair(m, n, rank, stack) for name, (m, n) in inside.items()}
            for block, inside in modules.items()
        }

    return {"layers": layer((layers,)) if stacked else {str(i): layer(()) for i in range(layers)}}


def base_bytes(shapes: Any) -> int:
    """Bytes in bfloat16 of the weights that pairs adapt."""
    total = 0
    for pair in _pairs(shapes):
        *stack, m, _ = pair["lora_a"].shape
        total += 2 * math.prod(stack) * m * pair["lora_b"].shape[-1]
    return total


def rank_of(shapes: Any) -> int:
    """The rank that all pairs have."""
    [rank] = {pair["lora_a"].shape[-1] for pair in _pairs(shapes)}
    return int(rank)


def _pairs(shapes: Any) -> list[Any]:
    return jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, dict) and "lora_a" in x)


# --- train: the whole step ---


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
    add_lora(model, LoRAConfig(rank=4 if bench.quick else _RANK), rngs=nnx.Rngs(0))
    model.train()
    parts = split_model(model, nnx.LoRAParam)
    for text in batches:
        rows, length = map(int, text.split("x"))
        yield from _train_case(bench, model, weights, parts, (rows, length))


def _train_case(
    bench: Bench, model: Llama, weights: str, parts: Any, shape: tuple[int, int]
) -> Iterator[Row]:
    rows, length = shape
    batch = random_batch(rows, length, model.config.vocab_size)
    names = [name for name in bench.optimizers if name not in DENSE]
    case = {"case": f"{weights}, batch {rows}x{length}", "rank": rank_of(parts.params)}
    costs: dict[Contestant, Row] = {}
    turns: dict[Contestant, Turn] = {}
    total = len(names) * (bench.train_rounds + _WARM_UP)
    with tqdm(total=total, desc="train", unit="step") as bar:

        def step(call: Callable[..., Any], state: TrainState) -> tuple[Any, TrainState]:
            state, metrics = call(state, parts.frozen, batch)
            bar.update()
            return metrics, state

        for name in names:
            bar.set_postfix_str(f"compiling {name}")
            tx = make_optimizer(name)
            state = initial_state(parts, tx)
            call, costs[name] = compile_cold(make_step(parts, tx), state, parts.frozen, batch)
            costs[name] |= {"state_bytes": state_bytes(tx, parts.params)}
            turns[name] = Turn(functools.partial(step, call), state)
        bar.set_postfix_str("")
        times = take_turns(turns, bench.train_rounds, math.inf, repeat=False)
    for name in names:
        turns[name].check(name)
        about = case | {"optimizer": name}
        yield about | _against(parts.params, costs[name]) | timing(times, name)


def load_model(bench: Bench) -> tuple[Llama, str]:
    """The model of the train group, in the dtype that `loft-jax finetune` takes by default.

    Args:
        bench: Its model and quick are used.

    Returns:
        The model, and which it is, in words.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if bench.quick:
        config = dataclasses.replace(
            SMOLLM2_135M,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
        return Llama(config, rngs=nnx.Rngs(0)), "a tiny Llama of random weights"
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


# --- what it was measured with ---


def versions() -> Row:
    """What the measurements were made with."""
    packages = ("loft-jax", "jax", "jaxlib", "flax", "optax")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    sys.exit(main())
