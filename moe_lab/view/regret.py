"""What choosing a backend by its table costs: every legal backend at shapes that the table does not hold."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from moe_lab.jobs.auto_table import BACKENDS, regrets
from moe_lab.layer.auto import Case
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import INK, MUTED, SERIES, WIDTH

Measured = Sequence[tuple[Case, dict[str, float]]]
ROW = 19  # CSS pixels
COLOURS = dict(zip(("loop", "padded", "grouped", "buffered", "fused"), SERIES))
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 40)


@dataclass(frozen=True, eq=False, repr=False)
class RegretText(Text):
    """How much longer each choice takes than the fastest legal backend, over held-out cases of one file."""

    measured: Measured

    def text(self) -> str:
        """A line a device and way to choose: the table's, and each backend always, where it is legal throughout."""
        rows: list[tuple[str, ...]] = [("device", "choose", "mean", "median", "largest", "cases")]
        for device, cases in _by_device(self.measured):
            ways = {"auto": [regret for *_, regret in regrets(cases)]}
            for name in BACKENDS[device]:
                ways[name] = [ms[name] / _best(ms) - 1 for _, ms in cases if name in ms]
            for way, values in ways.items():
                shown = (f"{f(values):.1%}" for f in (statistics.mean, statistics.median, max))
                rows.append((device, way, *shown, str(len(values))))
        return table(rows, left=(0, 1))


def choice_dots(measured: Measured, device: str, what: str) -> Figure:
    """A line a held-out case, a dot a legal backend at its time over the fastest one's; a ring marks the table's."""
    cases = [(case, ms) for case, ms in measured if case.device == device]
    chosen = {case: name for case, name, _ in regrets(cases)}
    with theme.style():
        drawn = theme.figure(WIDTH, 112 + ROW * len(cases))
        axes = inset(drawn, left=288, right=20, bottom=66, top=46)
        heading(axes, "Held-out shapes: every backend's time over the fastest one's", what)
        for y, (case, ms) in enumerate(cases):
            axes.axhline(y, color=theme.GRID, lw=0.6, zorder=0)
            for name in BACKENDS[device]:
                if name in ms:
                    axes.plot(ms[name] / _best(ms), y, "o", ms=5.5, color=COLOURS[name], mec="white", mew=0.5, zorder=2)
            at = ms[chosen[case]] / _best(ms)
            axes.plot(at, y, "o", ms=10, mfc="none", mec=INK, mew=1.2, zorder=3)
        for name in BACKENDS[device]:
            axes.plot([], [], "o", ms=5.5, color=COLOURS[name], label=name)
        axes.plot([], [], "o", ms=10, mfc="none", mec=INK, mew=1.2, label="chosen by auto")
        drawn.legend(loc="lower right", ncols=6, handletextpad=0.2, columnspacing=1.4)
        axes.set_yticks(range(len(cases)), [_label(case) for case, _ in cases], size=7.5)
        axes.set(xscale="log", ylim=(len(cases) - 0.4, -0.6), xlabel="time over that of the fastest (log scale)")
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.tick_params(axis="y", length=0, labelcolor=MUTED)
    return drawn


def _by_device(measured: Measured) -> Iterator[tuple[str, Measured]]:
    for device, cases in groupby(measured, key=lambda row: row[0].device):
        yield device, list(cases)


def _best(ms: dict[str, float]) -> float:
    return min(time for name, time in ms.items() if name != "batched")  # skewed counts rule it out


def _label(case: Case) -> str:
    step = "step" if case.grad else "forward"
    return f"{case.dtype} {step}: {case.rows:g} rows, D {case.dim:,}, F {case.hidden_dim:,}, E {case.num_experts}"
