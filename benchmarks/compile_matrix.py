"""What a training step takes of each TPU chip: LoRA beside every LoFT, compiled ahead of time.

For Llama-2-7B, Llama-3-8B and Llama-2-70B with adapters on q, k, v, up and down: the real step,
compiled by libtpu for a slice that it fits (`loft-jax plan`), for LoRA with AdamW and for LoFT with
its factored second moment and with the exact one, in float32 and in bfloat16, along the tangent
space and alternating. No TPU and no weights are needed.

Adds to `compile_matrix.jsonl` in the folder of results one line a compiled step as soon as it is
there, and writes `compile_matrix.md`, the table of the latest line of each step. A step that has a
line of this revision, JAX and libtpu is not compiled again: stop it at any time and start it again.

    python -m benchmarks.compile_matrix  # everything
    python -m benchmarks.compile_matrix --models llama-2-7b --ranks 16
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

from benchmarks.history import RESULTS, Entry, History, Row
from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.methods import LoFT, LoRA, Method
from loft_jax.training.config import AdapterConfig, FinetuneConfig, ModelConfig, ScheduleConfig
from loft_jax.training.plan import plan_method, plan_step

# The smallest slices of v5e that every step below fits, 16 rows of 256 tokens.
SLICES = {"llama-2-7b": "v5e:2x4", "llama-3-8b": "v5e:2x4", "llama-2-70b": "v5e:4x4"}
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
METHODS: dict[str, Method] = {
    plan_method(method): method
    for method in (
        LoRA(),
        LoFT(),
        LoFT("full"),
        LoFT("full", state_dtype="bfloat16"),
        LoFT(move="alternate"),
        LoFT("full", "alternate"),
        LoFT("full", "alternate", "bfloat16"),
    )
}

# Of Llama-2-7B, with either move: the most that a step should take over LoRA's, by method and rank,
# and its program in bytes.
AIMS = {
    ("loft", 16): 0.013,
    ("loft full", 16): 0.055,
    ("loft full", 32): 0.20,
    ("loft full bfloat16", 16): 0.035,
    ("loft full bfloat16", 32): 0.11,
}
PROGRAM_AIM = 20 * 2**20


@dataclass(frozen=True)
class Options:
    """What to compile.

    Args:
        models: Some of the three.
        ranks: Of the adapters.
        methods: Some of those above, named as `loft-jax plan` names them.
        results: Folder of the results: add to those that are kept, or start others.
    """

    models: tuple[str, ...] = tuple(SLICES)
    ranks: tuple[int, ...] = (16, 4, 32)
    methods: tuple[str, ...] = tuple(METHODS)
    results: Path = RESULTS

    def __post_init__(self) -> None:
        for name, known in (("models", SLICES), ("methods", METHODS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise InputError(f"{name}: unknown {min(unknown)!r}, expected some of {[*known]}")


def cases(options: Options) -> list[Row]:
    """All steps, those that are compared with each other side by side."""
    return [
        {"model": model, "topology": SLICES[model], "rank": rank, "method": method}
        for rank, model, method in itertools.product(options.ranks, options.models, options.methods)
    ]


def compile_step(case: Row) -> Row:
    """What the step of a case takes of a chip; sizes are None where it does not fit."""
    config = FinetuneConfig(
        ModelConfig(case["model"], remat="full"),
        DataConfig("", max_length=256),
        output="",
        method=METHODS[case["method"]],
        lora=AdapterConfig(rank=case["rank"], target_modules=TARGETS),
        schedule=ScheduleConfig(batch_size=16),
    )
    plan = plan_step(config, case["topology"])
    measured = {**dataclasses.asdict(plan), "total": plan.total}
    del measured["config"], measured["topology"]
    return measured


def latest(entries: Sequence[Entry]) -> list[Entry]:
    """The last entry of each step, models and ranks in the order of the table."""
    by_case = {json.dumps(entry.case): entry for entry in entries}
    order = {name: place for place, name in enumerate(SLICES)}
    return sorted(by_case.values(), key=lambda e: (order[e.case["model"]], e.case["rank"]))


def table(entries: Sequence[Entry]) -> str:
    """The entries as Markdown, each step beside LoRA of the same model and rank."""
    rows = [
        "MiB on each chip, 16 rows of 256 tokens, bfloat16 weights and computation, float32 "
        "adapters on q, k, v, up and down, each layer recomputed in the backward pass.",
        "",
        "| model | slice | rank | method | weights | adapter | optimizer | other | temporaries "
        "| program | total | of the chip | over LoRA |",
        "| --- | --- " + "| ---: " * 11 + "|",
    ]
    totals = {
        (entry.case["model"], entry.case["rank"]): entry.measured["total"]
        for entry in entries
        if entry.case["method"] == "lora"
    }
    for entry in entries:
        case, line = entry.case, entry.measured
        names = ("weights", "adapter", "optimizer_state", "other", "temporaries", "program")
        cells = [case["model"], case["topology"], str(case["rank"]), case["method"]]
        if line["total"] is None:
            cells += ["does not fit", *[""] * 8]
        else:
            cells += [f"{line[name] / 2**20:,.1f}" for name in (*names, "total")]
            cells.append(f"{line['total'] / line['memory']:.1%}")
            base = totals.get((case["model"], case["rank"]))
            compared = base is not None and case["method"] != "lora"
            cells.append(f"{line['total'] / base - 1:+.1%}" if compared and base else "")
        rows.append(f"| {' | '.join(cells)} |")
    versions = ("revision", "jax", "libtpu")
    made = sorted({", ".join(f"{v} {e.made_with[v]}" for v in versions) for e in entries})
    rows += ["", f"Made by `benchmarks/compile_matrix.py`: {'; '.join(made)}.", ""]
    return "\n".join([*rows, *aims(entries), ""])


def aims(entries: Sequence[Entry]) -> list[str]:
    """What was measured beside `AIMS`, as Markdown."""
    found = {
        (entry.case["method"], entry.case["rank"]): entry.measured
        for entry in entries
        if entry.case["model"] == "llama-2-7b" and entry.measured["total"] is not None
    }
    rows = ["| aim | measured | at most | met |", "| --- | ---: | ---: | --- |"]
    for (method, rank), line in found.items():
        base = found.get(("lora", rank))
        bound = AIMS.get((method.replace(" alternate", ""), rank))
        if base is not None and bound is not None:
            over = line["total"] / base["total"] - 1
            program = line["program"] - base["program"]
            met = "yes" if over <= bound else "**no**"
            rows.append(f"| {method}, r {rank}, over LoRA | {over:+.2%} | {bound:+.1%} | {met} |")
            met = "yes" if program <= PROGRAM_AIM else "**no**"
            sizes = f"{program / 2**20:+.1f} MiB | {PROGRAM_AIM / 2**20:+.1f} MiB"
            rows.append(f"| {method}, r {rank}, program | {sizes} | {met} |")
    return rows


def main(options: Options) -> None:
    """Compiles what is missing, and writes the table after each step."""
    jax.config.update("jax_platforms", "cpu")  # compiling must not take a TPU that is there
    history = History(options.results, "compile_matrix")
    made_with = ("revision", "jax", "libtpu")
    done = [
        entry.case
        for entry in history.read()
        if all(entry.made_with[name] == history.made_with[name] for name in made_with)
    ]
    wanted = cases(options)
    missing = [case for case in wanted if case not in done]
    bar = tqdm(missing, initial=len(wanted) - len(missing), total=len(wanted), unit="step")
    for case in bar:
        bar.set_description(f"{case['model']} rank {case['rank']} {case['method']}")
        history.append(case, compile_step(case))
        page = table(latest(history.read()))
        (options.results / "compile_matrix.md").write_text(page, encoding="utf-8")
    print(table(latest(history.read())))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python -m benchmarks.compile_matrix", description=__doc__))
    except InputError as error:
        sys.exit(f"compile_matrix: {error}")
