"""Times drawn: backends side by side with their bounds, a layer's phases stacked, peers as times the dense bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_lab.study.breakdown import REST
from moe_lab.study.measurements import Measurement
from moe_lab.study.timing import medians, summarise
from moe_lab.view import theme
from moe_lab.view.exchanging import PHASE_COLOURS
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import CHANCE, INK, LESS, MUTED, SERIES, WIDTH, WITHIN

BOUNDS = ("dense", "copy")
FLOOR = 0.8  # times the bound where bars begin
Breakdowns = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]


@dataclass(frozen=True, eq=False, repr=False)
class BreakdownTable(Text):
    """Phases of each path, ms: medians over rounds. Measured on the machine that shows them."""

    found: Breakdowns

    def text(self) -> str:
        """A line a phase, a column a path."""
        phases = phases_of(self.found)
        rows: list[tuple[str, ...]] = [("", *self.found)]
        for phase in ("all", *phases):
            cells = (self.found[path].get(phase) for path in self.found)
            rows.append((phase, *("" if runs is None else f"{summarise(medians(runs)).median:.2f}" for runs in cells)))
        return table(rows)


@dataclass(frozen=True, eq=False, repr=False)
class PhaseNames(Text):
    """Which phases each path has: what is the same on every machine."""

    found: Breakdowns

    def text(self) -> str:
        """A line a path."""
        return "\n".join(
            f"{path}: {', '.join(p for p in of if p not in ('all', REST))}" for path, of in self.found.items()
        )


def phases_of(found: Breakdowns) -> list[str]:
    """Every phase that some path has, in the order of a forward, the rest last."""
    names = dict.fromkeys(name for of in found.values() for name in of if name not in ("all", REST))
    order = list(PHASE_COLOURS)
    return [*sorted(names, key=lambda name: order.index(name) if name in order else len(order)), REST]


def breakdown_bars(found: Breakdowns, what: str) -> Figure:
    """A bar a path, its phases one after another, ms."""
    phases = phases_of(found)
    with theme.style():
        drawn = theme.figure(WIDTH, 120 + 34 * len(found))
        axes = inset(drawn, left=116, right=20, bottom=40, top=72)
        heading(axes, "Forward, phase by phase", what)
        for y, of in enumerate(found.values()):
            start = 0.0
            for phase in phases:
                ms = summarise(medians(of[phase])).median if phase in of else 0.0
                axes.barh(y, ms, 0.66, left=start, color=PHASE_COLOURS.get(phase, CHANCE), lw=0)
                start += ms
            axes.text(start, y, f" {start:.2f}", va="center", size=7.5, color=INK)
        axes.set_yticks(range(len(found)), list(found))
        axes.set(ylim=(len(found) - 0.5, -0.5), xlabel="ms, medians of phases")
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
        keys = [Patch(color=PHASE_COLOURS.get(phase, CHANCE), label=phase) for phase in phases]
        drawn.legend(handles=keys, loc="upper right", ncols=len(keys), fontsize=7, columnspacing=1, handlelength=1.4)
    return drawn


@dataclass(frozen=True, eq=False, repr=False)
class ArmsTable(Text):
    """Arms of one layer and direction: ms with its interval, and times the bound with its own."""

    rows: Sequence[Measurement]

    def text(self) -> str:
        """A line an arm, in the order measured."""
        lines: list[tuple[str, ...]] = [("", "ms", "95 %", "x bound", "95 %", "roofline")]
        for row in self.rows:
            spread = f"{row.low:.3g} - {row.high:.3g}"
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            around = "" if row.ratio_low is None else f"{row.ratio_low:.2f} - {row.ratio_high:.2f}"
            share = "" if row.arm in BOUNDS or row.roofline_share is None else f"{100 * row.roofline_share:.0f} %"
            lines.append((row.arm, f"{row.median:.3g}", spread, ratio, around, share))
        return table(lines)


def arm_bars(axes: Axes, rows: Sequence[Measurement]) -> None:
    """A bar an arm with its interval; bounds grey, the fastest arm dark; dashed: the dense bound."""
    shown = [row for row in rows if row.arm != "copy"]
    best = min((row.median for row in shown if row.arm not in BOUNDS), default=0.0)
    for y, row in enumerate(shown):
        colour = WITHIN if row.arm in BOUNDS else LESS if row.median == best else "#8fc1e0"
        axes.barh(y, row.median, 0.66, color=colour, lw=0)
        axes.plot([row.low, row.high], [y, y], color=INK, lw=1.2)
        axes.text(max(row.high, row.median), y, f"  {row.median:.3g}", va="center", size=7, color=INK)
        if row.arm == "dense":
            axes.axvline(row.median, color=MUTED, lw=0.8, ls="--")
    axes.set_yticks(range(len(shown)), [row.arm for row in shown])
    axes.set(ylim=(len(shown) - 0.5, -0.5), xlabel="ms (line: 95 % of the median)")
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0)


def times_bound(groups: Mapping[str, Sequence[Measurement]], what: str) -> Figure:
    """Times the dense bound, a group of bars a layer, a bar an arm, forward and with backward beside each other."""
    directions = ("forward", "forward+backward")
    arms = list(dict.fromkeys(row.arm for rows in groups.values() for row in rows if row.arm not in BOUNDS))
    with theme.style():
        drawn = theme.figure(WIDTH, 330)
        for i, direction in enumerate(directions):
            axes = inset(drawn, left=48 + i * 440, right=WIDTH - 440 - i * 440 + 10, bottom=36, top=74)
            heading(axes, direction, what if i == 0 else "dashed: the dense bound")
            for x, rows in enumerate(groups.values()):
                _group(axes, x, [row for row in rows if row.direction == direction], arms)
            axes.axhline(1, color=INK, lw=0.8, ls="--")
            axes.set_yscale("log", base=2)
            axes.set_yticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
            axes.set_ylim(FLOOR, 160)
            axes.set_xticks(range(len(groups)), list(groups))
            axes.set_ylabel("times two dense products" if i == 0 else "")
            axes.tick_params(axis="x", length=0)
        keys = [Patch(color=SERIES[a % len(SERIES)], label=arm) for a, arm in enumerate(arms)]
        drawn.legend(handles=keys, loc="upper right", ncols=len(keys), fontsize=7.5, handlelength=1.4)
    return drawn


def _group(axes: Axes, x: int, rows: Sequence[Measurement], arms: Sequence[str]) -> None:
    width = 0.84 / len(arms)
    for row in rows:
        if row.ratio is None or row.arm in BOUNDS:
            continue
        a = arms.index(row.arm)
        at = x - 0.42 + (a + 0.5) * width
        axes.bar(at, row.ratio - FLOOR, 0.9 * width, bottom=FLOOR, color=SERIES[a % len(SERIES)], lw=0)
        top, label = max(row.ratio, 1) * 1.04, f"{row.ratio:.2f}"
        axes.text(at, top, label, ha="center", va="bottom", size=5.5, rotation=90, color=INK)
