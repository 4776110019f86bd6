"""The validation loss by learning rate of full fine-tuning, LoRA and LoFT, from the kept logs."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from experiments.log import ResultLog, Setting
from experiments.registry import TASKS, read_results, summaries_of
from scripts.pictures.style import BLUE, GREY, ORANGE, panels

LOGS = Path(__file__).parents[2] / "experiments" / "results"
TASK, RANK = TASKS["stories"], 4
METHODS = {
    "full fine-tuning of the same layers": Setting("stories", "full-linear", 0, TASK.eps),
    f"LoRA, rank {RANK}": Setting("stories", "lora", RANK, TASK.eps),
    f"LoFT, rank {RANK}": Setting("stories", "loft-factored", RANK, TASK.eps),
}


def compute() -> dict[str, Mapping[float, float]]:
    """Reads the mean validation losses by rate, of each method."""
    found = summaries_of(TASK, read_results(ResultLog(LOGS / "stories.jsonl"), TASK))
    return {name: found[setting].rates for name, setting in METHODS.items()}


def draw(losses: Mapping[str, Mapping[float, float]]) -> Figure:
    """Draws a line for each method."""
    figure, (ax,) = panels(1, (6.4, 3.2))
    for (name, of_method), style in zip(losses.items(), ("s--", "o-", "o-"), strict=True):
        color = dict(zip(METHODS, (GREY, BLUE, ORANGE), strict=True))[name]
        ax.plot(list(of_method), list(of_method.values()), style, color=color, label=name)
    low = min(min(of_method.values()) for of_method in losses.values())
    ax.set(xscale="log", xlim=(8e-4, 5e-2), ylim=(low - 0.03, low + 0.6))
    ticks = [rate for rate in TASK.rates if rate < 0.1]
    ax.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    ax.tick_params(which="minor", bottom=False)
    ax.set(xlabel="learning rate", ylabel="validation loss, nats")
    ax.legend(loc="upper center")
    return figure
