"""What a training step takes of each TPU chip: LoRA beside every LoFT, compiled ahead of time.

For Llama-2-7B, Llama-3-8B and Llama-2-70B with adapters on q, k, v, up and down: the real step,
compiled by libtpu for a slice that it fits (`loft-jax plan`), for LoRA with AdamW and for LoFT with
its exact second moment in float32 and bfloat16 and with the factored one. No TPU and no weights are
needed.

Writes into the output folder `compile_matrix.jsonl`, one line a compiled step as soon as it is
there, and `compile_matrix.md`, the table of all lines. A step that has a line is not compiled
again: stop it at any time and start it again; remove the file to measure anew.

    python scripts/compile_matrix.py  # everything
    python scripts/compile_matrix.py --models llama-2-7b --ranks 16
"""

import dataclasses
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

from loft_jax.data import DataConfig
from loft_jax.errors import InputError
from loft_jax.methods import LoFT, LoRA, Method
from loft_jax.training.config import AdapterConfig, FinetuneConfig, ModelConfig, ScheduleConfig
from loft_jax.training.config_io import config_from_dict, config_to_dict
from loft_jax.training.plan import StepPlan, plan_method, plan_step

# The smallest slices of v5e that every step below fits, 16 rows of 256 tokens.
SLICES = {"llama-2-7b": "v5e:2x4", "llama-3-8b": "v5e:2x4", "llama-2-70b": "v5e:4x4"}
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
METHODS: dict[str, Method] = {
    "lora": LoRA(),
    "loft": LoFT(),
    "loft full": LoFT("full"),
    "loft full bfloat16": LoFT("full", state_dtype="bfloat16"),
}


@dataclass(frozen=True)
class Options:
    """What to compile.

    Args:
        models: Some of the three.
        ranks: Of the adapters.
        methods: Some of the four.
        output: Folder of the lines and the table.
    """

    models: tuple[str, ...] = tuple(SLICES)
    ranks: tuple[int, ...] = (16, 4, 32)
    methods: tuple[str, ...] = tuple(METHODS)
    output: str = "runs/compile_matrix"

    def __post_init__(self) -> None:
        for name, known in (("models", SLICES), ("methods", METHODS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise InputError(f"{name}: unknown {min(unknown)!r}, expected some of {[*known]}")


def cases(options: Options) -> list[FinetuneConfig]:
    """All runs whose step is compiled, those that are compared with each other side by side."""
    return [
        FinetuneConfig(
            ModelConfig(model, remat="full"),
            DataConfig("", max_length=256),
            output="",
            method=METHODS[method],
            lora=AdapterConfig(rank=rank, target_modules=TARGETS),
            schedule=ScheduleConfig(batch_size=16),
        )
        for rank, model, method in itertools.product(options.ranks, options.models, options.methods)
    ]


def as_line(plan: StepPlan) -> dict[str, Any]:
    """A plan as JSON has it, with what it was compiled by."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    # Tuples become lists, as they come back from the file.
    return json.loads(json.dumps({**dataclasses.asdict(plan), "total": plan.total, **versions}))


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The lines as Markdown, each step beside LoRA of the same model and rank."""
    rows = [
        "MiB on each chip, 16 rows of 256 tokens, bfloat16 weights and computation, float32 "
        "adapters on q, k, v, up and down, each layer recomputed in the backward pass.",
        "",
        "| model | slice | rank | method | weights | adapter | optimizer | other | temporaries "
        "| program | total | of the chip | over LoRA |",
        "| --- | --- " + "| ---: " * 11 + "|",
    ]
    totals = {
        _model_and_rank(line): line["total"]
        for line in lines
        if line["config"]["method"]["name"] == "lora"
    }
    for line in lines:
        method = config_from_dict(line["config"]).method
        model, rank = _model_and_rank(line)
        names = ("weights", "adapter", "optimizer_state", "other", "temporaries", "program")
        cells = [model, line["topology"], str(rank), plan_method(method)]
        if line["total"] is None:
            cells += ["does not fit", *[""] * 8]
        else:
            cells += [f"{line[name] / 2**20:,.1f}" for name in (*names, "total")]
            cells.append(f"{line['total'] / line['memory']:.1%}")
            base = totals.get((model, rank))
            compared = base is not None and method != LoRA()
            cells.append(f"{line['total'] / base - 1:+.1%}" if compared and base else "")
        rows.append(f"| {' | '.join(cells)} |")
    made = sorted({f"jax {line['jax']}, libtpu {line['libtpu']}" for line in lines})
    return "\n".join([*rows, "", f"Made by `scripts/compile_matrix.py`: {'; '.join(made)}.", ""])


def _model_and_rank(line: dict[str, Any]) -> tuple[str, int]:
    return line["config"]["model"]["path"], line["config"]["lora"]["rank"]


def _place(line: dict[str, Any]) -> tuple[int, int]:
    model, rank = _model_and_rank(line)
    return [*SLICES].index(model), rank


def main(options: Options) -> None:
    """Compiles what is missing, and writes the table after each step."""
    jax.config.update("jax_platforms", "cpu")  # compiling must not take a TPU that is there
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "compile_matrix.jsonl"
    # A line that was being written when the program was killed has no end.
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def save() -> None:
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(file)
        (folder / "compile_matrix.md").write_text(table(lines), encoding="utf-8")

    done = [line["config"] for line in lines]
    wanted = cases(options)
    missing = [case for case in wanted if config_to_dict(case) not in done]
    bar = tqdm(missing, initial=len(wanted) - len(missing), total=len(wanted), unit="step")
    for case in bar:
        model = case.model.path
        bar.set_description(f"{model} rank {case.lora.rank} {plan_method(case.method)}")
        lines.append(as_line(plan_step(case, SLICES[model])))
        lines.sort(key=_place)
        save()
    print(table(lines))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except InputError as error:
        sys.exit(f"compile_matrix: {error}")
