"""Plots of a comparison."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from experiments.log import Setting
from experiments.summary import Summary

matplotlib.use("agg")

# The methods that are drawn, in their order: with all of them nothing could be told apart.
_STYLES = {
    "full": ("black", "--"),
    "full-linear": ("gray", "--"),
    "loft-factored": ("tab:red", "-"),
    "loft": ("tab:orange", "-"),
    "loft-alternate": ("tab:pink", "-"),
    "lora": ("tab:blue", "-"),
    "reflora": ("tab:green", "-"),
    "dora": ("tab:purple", "-"),
    "rslora": ("tab:cyan", "-"),
    "loft-muon": ("tab:brown", "-"),
    "lora-rite": ("tab:olive", "-"),
}

_HEADLINE = ("full-linear", "loft-factored", "loft-alternate", "lora")


def plot_headline(summaries: Mapping[Setting, Summary], rank: int, path: Path) -> None:
    """What carries the page: loss by learning rate at one rank, and loss by rank.

    Args:
        summaries: Of methods at several ranks.
        rank: Of the left panel.
        path: PNG to write.
    """
    figure, (rates, ranks) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method in _HEADLINE:
        color, line = _STYLES[method]
        of_method = {s.rank: x for s, x in summaries.items() if s.method == method}
        if not of_method:
            continue
        if found := of_method.get(rank, of_method.get(0)):
            tried = {r: v for r, v in found.rates.items() if math.isfinite(v)}
            rates.plot(list(tried), list(tried.values()), f"o{line}", color=color, label=method)
        if 0 in of_method:
            ranks.axhline(of_method[0].best_loss, color=color, ls=line, label=method)
            continue
        known = sorted(of_method)
        ranks.plot(known, [of_method[r].best_loss for r in known], "o-", color=color, label=method)
    low = min(x.best_loss for s, x in summaries.items() if s.method in _HEADLINE)
    rates.set(
        xscale="log",
        ylim=(low - 0.03, low + 0.6),
        xlabel="learning rate",
        ylabel="validation loss",
        title=f"by learning rate, rank {rank}; above the frame not drawn",
    )
    ranks.set_xscale("log", base=2)
    ticks = sorted({s.rank for s in summaries if s.rank and s.method in _HEADLINE})
    ranks.set_xticks(ticks, [str(tick) for tick in ticks])
    ranks.set(xlabel="rank", title="by rank, each at its best learning rate")
    for axes in (rates, ranks):
        axes.legend(fontsize=8)
    _save(figure, path)


def plot_task(title: str, summaries: Sequence[Summary], steps: int, path: Path) -> None:
    """Loss curves at the best learning rate, and validation loss by learning rate.

    Args:
        title: Of the task.
        summaries: Of methods at one rank.
        steps: Of a run.
        path: PNG to write.
    """
    figure, (curves, rates) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for summary in _ordered(summaries):
        color, line = _STYLES[summary.setting.method]
        curve = summary.curve()
        x = [(i + 0.5) * steps / len(curve) for i in range(len(curve))]
        label = f"{summary.setting.method}, rate {summary.learning_rate:g}"
        curves.plot(x, curve, line, color=color, label=label, lw=1.4)
        tried = {r: v for r, v in summary.rates.items() if math.isfinite(v)}
        rates.plot(list(tried), list(tried.values()), f"o{line}", color=color, ms=4, lw=1.4)
    figure.suptitle(title)
    curves.set(xlabel="step", ylabel="training loss", title="at the best learning rate")
    curves.legend(fontsize=8)
    if min((min(s.curve()) for s in summaries), default=1.0) < 1e-3:
        curves.set_yscale("log")
        rates.set_yscale("log")
    if valleys := [loss for s in summaries for loss in _valley(s)]:
        low, high = min(valleys), max(valleys)
        log = rates.get_yscale() == "log"
        rates.set_ylim(
            *((low / 2, high * 2) if log else (low - 0.05 * (high - low), high)),
        )
    rates.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="validation loss",
        title="by learning rate; losses above the frame are not drawn",
    )
    _save(figure, path)


def plot_ranks(title: str, summaries: Mapping[Setting, Summary], measure: str, path: Path) -> None:
    """The measure of the test by rank, with the spread over seeds.

    Args:
        title: Of the task.
        summaries: Of methods at several ranks.
        measure: That is shown.
        path: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    by_method: dict[str, list[Summary]] = {}
    for setting, summary in summaries.items():
        if setting.method in _STYLES:
            by_method.setdefault(setting.method, []).append(summary)
    for method in _STYLES:
        if method not in by_method:
            continue
        found = sorted(by_method[method], key=lambda s: s.setting.rank)
        color, line = _STYLES[method]
        means = [s.mean(measure) for s in found]
        if not found[0].setting.rank:
            axes.axhline(means[0], color=color, ls=line, label=method)
            continue
        spreads = [s.spread(measure) for s in found]
        ranks = [s.setting.rank for s in found]
        axes.errorbar(ranks, means, spreads, color=color, label=method, marker="o", ms=4, lw=1.4)
    axes.set_xscale("log", base=2)
    ticks = sorted({s.rank for s in summaries if s.rank})
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.set(xlabel="rank", ylabel=f"test {measure}", title=title)
    axes.legend(fontsize=8)
    _save(figure, path)


def _valley(summary: Summary) -> list[float]:
    """The losses at the best rate and at those beside it."""
    losses = list(summary.rates.values())
    best = list(summary.rates).index(summary.learning_rate)
    return [loss for loss in losses[max(0, best - 1) : best + 2] if math.isfinite(loss)]


def _ordered(summaries: Sequence[Summary]) -> list[Summary]:
    shown = [s for s in summaries if s.setting.method in _STYLES]
    return sorted(shown, key=lambda s: list(_STYLES).index(s.setting.method))


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and the version, so that the same results give the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
