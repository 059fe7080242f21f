"""Balancing drawn: methods on the same logits, load over steps, and trained models' loss against imbalance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.jobs.balance_live import LiveRun
from moe_lab.study.balance_runs import BalanceRuns
from moe_lab.study.balancing import METHODS
from moe_lab.study.counterfactual import Learned, Outcome
from moe_lab.study.metrics import NullBand, measure
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import CHANCE, INK, LESS, MORE, MUTED, SERIES, WIDTH


class OutcomeText(Text):
    """Methods over the same logits of one layer, as a table."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = outcomes

    def text(self) -> str:
        """One line a method; shares are of the unconstrained choice, in percent."""
        first = self.outcomes[0]
        rows = [["", "max/mean", "dropped", "unserved", "rerouted", "gates lost", "straggler", "padding", "exchanged"]]
        for one in self.outcomes:
            shares = [one.dropped, one.unserved, one.rerouted, one.gate_lost]
            cells = [f"{one.load.metrics.max_over_mean:.2f}", *(f"{100 * share:.1f}" for share in shares)]
            cells += [f"{one.straggler_factor:.2f}", f"{100 * one.padding:.0f}", f"{one.exchanged:,}"]
            rows.append([one.method, *cells])
        load, setup = first.load, first.setup
        null = f"{load.null.mean.max_over_mean:.2f}, 95 % to {load.null.high.max_over_mean:.2f}"
        where = f"layer {load.layer} · {load.windows} steps of {setup.ep} ranks x {setup.tokens_per_rank} tokens"
        return f"{where} · chance {null} · open-loop\n{table(rows)}"


def outcomes(found: Sequence[Outcome]) -> Figure:
    """What each method makes of the same logits: load beside chance, what it moves, and rows padded."""
    names, place = [one.method for one in found], np.arange(len(found))
    null = found[0].load.null
    with theme.style():
        drawn = theme.figure(WIDTH, 84 + 20 * len(found))
        axes = [inset(drawn, left=left, right=WIDTH - left - 226, bottom=38, top=44) for left in (146, 408, 666)]
        heading(axes[0], "Load: max / mean", "grey: 95 % of chance")
        axes[0].axvspan(null.low.max_over_mean, null.high.max_over_mean, color=CHANCE, lw=0)
        load = [one.load.metrics.max_over_mean for one in found]
        axes[0].hlines(place, 1, load, color=MUTED, lw=0.8)
        axes[0].plot(load, place, "o", ms=5, color=LESS)
        axes[0].set(xlim=(0.95, None))
        axes[0].set_xlabel("max / mean", labelpad=2)
        heading(axes[1], "Moved from the free choice", "filled: assignments · open: weight of gates")
        rerouted, lost = ([100 * getattr(one, name) for one in found] for name in ("rerouted", "gate_lost"))
        axes[1].hlines(place, lost, rerouted, color=MUTED, lw=0.8)
        axes[1].plot(rerouted, place, "o", ms=5, color=MORE)
        axes[1].plot(lost, place, "o", ms=5, mfc="white", mec=MORE)
        axes[1].set(xlim=(-1, None))
        axes[1].set_xlabel("%", labelpad=2)
        heading(axes[2], "Zero rows under even splits", f"over real rows, {found[0].setup.ep} ranks")
        padding = [100 * one.padding for one in found]
        axes[2].hlines(place, 0, padding, color=MUTED, lw=0.8)
        axes[2].plot(padding, place, "o", ms=5, color=SERIES[2])
        axes[2].set(xlim=(-1, None))
        axes[2].set_xlabel("%", labelpad=2)
        _name_rows(axes, names)
    return drawn


class LiveText(Text):
    """Live runs as a table, the first of them the one that the others change."""

    def __init__(self, runs: Sequence[LiveRun]) -> None:
        self.runs = runs

    def text(self) -> str:
        """One line a run: bits per byte, their change, and max/mean, mean of layers and the worst."""
        rows = [["", "bits", "change", "max/mean", "worst layer"]]
        for run in self.runs:
            load = [f"{float(value):.1f}" for value in (run.load_L.mean(), run.load_L.max())]
            rows.append([run.method, f"{run.bits:.2f}", f"{run.bits - self.runs[0].bits:+.2f}", *load])
        return table(rows)


def steps_load(learned: Learned, place: int = 0) -> np.ndarray:
    """Max/mean of every step of one layer, by its place among those learned."""
    return measure(learned.counts_SLE[:, place].numpy())[:, 0]


class StepsText(Text):
    """Max/mean over steps by name, at a few steps."""

    def __init__(self, series: Mapping[str, np.ndarray], every: int = 8) -> None:
        self.series, self.every = series, every

    def text(self) -> str:
        """One line a series."""
        picked = [*range(0, len(next(iter(self.series.values()))), self.every)]
        rows = [["step", *map(str, picked), "last", "mean of last 10"]]
        for name, values in self.series.items():
            cells = [f"{values[step]:.2f}" for step in (*picked, -1)]
            rows.append([name, *cells, f"{values[-10:].mean():.2f}"])
        return table(rows)


def over_steps(series: Mapping[str, np.ndarray], null: NullBand, title: str, note: str) -> Figure:
    """Max/mean over steps, a line a name; the band of chance for as many tokens."""
    with theme.style():
        drawn = theme.figure(WIDTH, 270)
        axes = inset(drawn, left=46, right=150, bottom=40, top=44)
        heading(axes, title, f"{note} · grey: 95 % of chance")
        axes.axhspan(null.low.max_over_mean, null.high.max_over_mean, color=CHANCE, lw=0)
        for colour, (name, values) in zip(SERIES, series.items(), strict=False):
            axes.plot(range(len(values)), values, color=colour, lw=1.2, marker="o", ms=2.5, label=name)
        axes.set(ylim=(1, None), xlim=(0, None), ylabel="max / mean", xlabel="step")
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


class TrainedText(Text):
    """Trained models by method, as a table."""

    def __init__(self, runs: BalanceRuns) -> None:
        self.runs = runs

    def text(self) -> str:
        """One line a method: means over seeds and half widths of their 95 % intervals."""
        rows = [["", "seeds", "bits - none", "±", "held-out max/mean", "±", "in training", "dropped %"]]
        for name in self.runs.methods:
            of, bits, load = self.runs.of(name), self.runs.paired(name), self.runs.load(name)
            dropped = 100 * sum(run.dropped for run in of) / len(of)
            train = self.runs.load(name, train=True).mean
            cells = [f"{bits.mean:+.3f}", f"{bits.half:.3f}", f"{load.mean:.2f}", f"{load.half:.2f}", f"{train:.2f}"]
            rows.append([name, str(len(of)), *cells, f"{dropped:.1f}"])
        return table(rows)


def trained(runs: BalanceRuns) -> Figure:
    """Held-out bits per byte above those without balancing, against imbalance: means over seeds, 95 % intervals."""
    names = runs.methods
    with theme.style():
        drawn = theme.figure(WIDTH, 90 + 20 * len(names))
        axes = [inset(drawn, left=left, right=WIDTH - left - 320, bottom=40, top=44) for left in (150, 540)]
        place = np.arange(len(names))
        bits, load = [runs.paired(name) for name in names], [runs.load(name) for name in names]
        train = [runs.load(name, train=True).mean for name in names]
        seeds = len(runs.seeds)
        heading(axes[0], "Held-out bits per byte, less those of none", f"paired by seed, {seeds} seeds, 95 % (t)")
        _intervals(axes[0], place, bits, [_colour(name) for name in names])
        axes[0].axvline(0, color=INK, lw=0.8)
        axes[0].set_xlabel("bits per byte (left is better)", labelpad=2)
        heading(axes[1], "Imbalance: max / mean, mean of layers", "dots: held out · crosses: last steps of training")
        _intervals(axes[1], place, load, [_colour(name) for name in names])
        axes[1].plot(train, place, "x", ms=5, color=INK, mew=1, zorder=5)
        axes[1].set_xlim(1, 6)
        axes[1].set_xlabel("max / mean", labelpad=2)
        _name_rows(axes, names)
    return drawn


def _name_rows(axes: Sequence[Axes], names: Sequence[str]) -> None:
    """One row a name in each of the axes, from the top down, named in the first."""
    for one in axes:
        one.set(ylim=(len(names) - 0.4, -0.6), yticks=range(len(names)), yticklabels=names if one is axes[0] else [])
        one.tick_params(axis="y", length=0)
        one.grid(axis="x")


def _intervals(axes: Axes, place: np.ndarray, estimates: Sequence[Any], colours: Sequence[str]) -> None:
    for y, (mean, half), colour in zip(place, estimates, colours, strict=True):
        axes.errorbar(mean, y, xerr=half, fmt="o", ms=4.5, lw=1.2, color=colour, capsize=2)


def _colour(name: str) -> str:
    """By what a method moves."""
    acts = ("nothing", "choice", "loss", "drops", "noise")
    return (MUTED, SERIES[0], SERIES[1], SERIES[2], SERIES[3])[acts.index(METHODS[name].acts)]
