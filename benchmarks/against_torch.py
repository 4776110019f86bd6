"""Measures a training step and generation against torch with PEFT and transformers, by turns.

Both sides have the same weights, rank, target modules, batch and number of threads, in float32 on
CPUs: LoRA on all linear layers with AdamW, and greedy generation with a cache of keys and values.
They take turns in one process, so that what else the machine does meets both alike, and each turn
is timed by the clock and by the process's CPU time, which other programs lengthen less. The losses
of the first step and the generated tokens of both sides are compared before anything is timed.

Adds a line a case to `against_torch.jsonl` in the folder of results, and prints a table.

    python -m benchmarks.against_torch
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import optax
import peft
import torch
import transformers
import tyro
from flax import nnx
from tqdm import tqdm

from benchmarks.history import RESULTS, History, Row, table
from benchmarks.optimizer.settings import Bench
from benchmarks.optimizer.train import load_model, random_batch
from loft_jax import LoRAConfig, add_lora, save_pretrained
from loft_jax.errors import InputError
from loft_jax.generation import generate
from loft_jax.models.family import LanguageModel
from loft_jax.tasks.causal_lm import CausalLM
from loft_jax.training.partition import split_model
from loft_jax.training.step import initial_state, make_step

Case = Literal["train", "generate"]

_RATE = 1e-4
_SAME_LOSS = 1e-3  # of float32 sums in another order


@dataclass(frozen=True)
class Options:
    """What to measure."""

    cases: tuple[Case, ...] = get_args(Case)
    """Training steps, generation, or both."""
    batches: tuple[str, ...] = ("4x128", "8x128")
    """Batches of training steps: ROWSxTOKENS."""
    prompts: tuple[str, ...] = ("1x64", "8x64")
    """Prompts of generation: ROWSxTOKENS."""
    new_tokens: int = 64
    """Number of tokens that are generated after each prompt."""
    rank: int = 16
    """Rank of the factors."""
    rounds: int = 10
    """Turns of each side, after one that does not count."""
    model: str = Bench.model
    """Model; where the file is missing, the same sizes with random weights."""
    results: Path = RESULTS
    """Folder of the results: add to those that are kept, or start others."""
    quick: bool = False
    """A tiny model and two rounds, to see that it runs: its numbers mean nothing."""


Work = Callable[[], Any]
"""One turn of a side, to its end."""


def main(options: Options) -> None:
    """Measures all cases and prints them.

    Raises:
        InputError: The two sides come to different losses.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, weights = load_model(Bench(model=options.model, quick=options.quick))
    history, lines = History(options.results, "against_torch"), []
    versions = {
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(Path(folder) / "model", model)
        cases: dict[Case, Callable[..., Iterator[tuple[str, Row, dict[str, Work]]]]] = {
            "generate": _generation,  # first: factors are added to the model in place
            "train": _training,
        }
        for case, sides in cases.items():
            if case not in options.cases:
                continue
            for shape, found, work in sides(options, model, Path(folder) / "model"):
                about = {"case": case, "model": weights, "batch": shape, "quick": options.quick}
                measured = found | timed(work, 2 if options.quick else options.rounds, case)
                history.append(about, measured | versions)
                lines.append(_cells(about, measured))
    head = ("case", "batch", "ours s", "torch s", "ratio", "ratio of CPU time", "tokens/s", "torch")
    print("\n".join(table(head, lines)))


def timed(work: Mapping[str, Work], rounds: int, title: str) -> Row:
    """Times both sides by turns.

    Args:
        work: A turn of "ours" and of "torch".
        rounds: Turns of each.
        title: Of the progress bar.

    Returns:
        For each side the median and least seconds of a turn and the median of its CPU seconds, and
        the median ratios of the rounds, ours to torch's, with the quartiles of those of time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    spent: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for turn in work.values():
        turn()
    for number in tqdm(range(rounds), desc=title, unit="round"):
        for name in names if number % 2 else names[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            work[name]()
            seconds[name].append(time.perf_counter() - wall)
            spent[name].append(time.process_time() - cpu)
    row: Row = {"rounds": rounds}
    for name in names:
        row[f"{name}_seconds"] = statistics.median(seconds[name])
        row[f"{name}_least_seconds"] = min(seconds[name])
        row[f"{name}_cpu_seconds"] = statistics.median(spent[name])
    ratios = np.divide(seconds["ours"], seconds["torch"])
    row["ratio"] = float(np.median(ratios))
    row["ratio_quartiles"] = np.quantile(ratios, (0.25, 0.75)).tolist()
    row["cpu_ratio"] = float(np.median(np.divide(spent["ours"], spent["torch"])))
    return row


def _training(
    options: Options, model: LanguageModel, folder: Path
) -> Iterator[tuple[str, Row, dict[str, Work]]]:
    """Gives the training steps of both sides for each batch."""
    add_lora(model, LoRAConfig(rank=options.rank), rngs=nnx.Rngs(0))
    model.train()
    parts = split_model(model, nnx.LoRAParam)
    tx = optax.adamw(_RATE, weight_decay=0.0)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = peft.LoraConfig(
        r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    for shape in ("2x16",) if options.quick else options.batches:
        rows, length = map(int, shape.split("x"))
        batch = random_batch(rows, length, model.config.vocab_size)
        ids = torch.from_numpy(np.array(batch["tokens"])).long()
        with_adapter = peft.get_peft_model(theirs, adapter).train()
        trained = [p for p in with_adapter.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.0, fused=True)
        step = make_step(parts, CausalLM().loss, tx)
        held = {"state": initial_state(parts, tx)}

        def ours(step: Any = step, held: Any = held, batch: Any = batch) -> float:
            held["state"], metrics = step(held["state"], parts.frozen, batch)
            jax.block_until_ready(held["state"])
            return float(metrics["loss"])

        def torchs(model: Any = with_adapter, optimizer: Any = optimizer, ids: Any = ids) -> float:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.item())

        losses = ours(), torchs()
        if abs(losses[0] - losses[1]) > _SAME_LOSS:
            raise InputError(
                f"first losses are {losses[0]} and torch's {losses[1]}, expected equal"
            )
        found = {"tokens": rows * length, "first_losses": losses}
        yield shape, found, {"ours": ours, "torch": torchs}
        theirs = with_adapter.unload()


def _generation(
    options: Options, model: LanguageModel, folder: Path
) -> Iterator[tuple[str, Row, dict[str, Work]]]:
    """Gives the generation of both sides for each set of prompts."""
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.eval()
    new = 8 if options.quick else options.new_tokens
    # Nothing ends a text, so both sides generate as much. The model's own setting goes first, since
    # it is taken where the one that is given is None.
    theirs.generation_config.eos_token_id = None
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    for shape in ("2x16",) if options.quick else options.prompts:
        rows, length = map(int, shape.split("x"))
        tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (rows, length))
        ids = torch.from_numpy(tokens)

        def ours(tokens: Any = tokens) -> list[list[int]]:
            prompts = tokens.tolist()
            return generate(model, prompts, max_new_tokens=new, eos_token_ids=())

        def torchs(ids: Any = ids) -> list[list[int]]:
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
            return out[:, ids.shape[1] :].tolist()

        same = np.mean(np.array(ours()) == np.array(torchs()))
        found = {"tokens": rows * new, "same_tokens": float(same)}
        yield shape, found, {"ours": ours, "torch": torchs}


def _cells(about: Row, row: Row) -> list[str]:
    low, high = row["ratio_quartiles"]
    return [
        about["case"],
        about["batch"],
        f"{row['ours_seconds']:.3g}",
        f"{row['torch_seconds']:.3g}",
        f"{row['ratio']:.3g} ({low:.3g} to {high:.3g})",
        f"{row['cpu_ratio']:.3g}",
        f"{row['tokens'] / row['ours_seconds']:.4g}",
        f"{row['tokens'] / row['torch_seconds']:.4g}",
    ]


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.against_torch", description=__doc__))
