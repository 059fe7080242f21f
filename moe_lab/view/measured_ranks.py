"""What the benchmark over ranks measured, drawn: where the time of a layer goes, by routing and kind of splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moe_lab.jobs.ranks_table import HEAD, PHASES, Row
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import INK, PAPER, WIDTH

COLOURS = {
    "plan": "#cc79a7",
    "pack": "#56b4e9",
    "exchange": "#0072b2",
    "unpack": "#56b4e9",
    "experts": "#009e73",
    "repack": "#56b4e9",
    "combine exchange": "#0072b2",
    "weigh": "#d55e00",
}


@dataclass(frozen=True, eq=False, repr=False)
class RanksText(Text):
    """Rows of one layer, with the device, versions and date that they hold for."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]

    def text(self) -> str:
        """Where, of what, and a line for each routing and kind of splits: ms of whole layers, then of phases."""
        first, where = self.rows[0], self.environment
        shape = ", ".join(f"{name} {size:,}" for name, size in first.shape.items())
        lines = [
            f"{first.ranks} x {where['device']} · torch {where['torch']} · {where['date']}",
            f"{first.layer} · {layout(first)} · {first.tokens:,} tokens a rank · {shape}",
            table([HEAD, *(row.cells() for row in self.rows)], left=(0, 1)),
            "",
            table([["ms", "", *PHASES], *(_phases(row) for row in self.rows)], left=(0, 1)),
        ]
        return "\n".join(lines)


def layout(row: Row) -> str:
    """How many ranks share the experts, and how many such groups there are."""
    groups = row.ranks // row.ep
    return f"EP {row.ep}" if groups == 1 else f"EP {row.ep} x DP {groups}"


def _phases(row: Row) -> list[str]:
    return [row.routing, row.kind, *(f"{row.phases_ms[name]:.2f}" for name in PHASES)]


def phases(rows: Sequence[Row], what: str) -> Figure:
    """A bar for each routing and kind of splits, its phases in order, and a mark at the layer's undisturbed time."""
    with theme.style():
        drawn = theme.figure(WIDTH, 96 + 19 * len(rows))
        axes = inset(drawn, left=116, right=14, bottom=36, top=56)
        heading(axes, "Forward, the device awaited at each phase", what)
        for y, row in enumerate(rows):
            start = 0.0
            for name in PHASES:
                took = row.phases_ms[name]
                axes.barh(y, took, 0.7, left=start, color=COLOURS[name], ec=PAPER, lw=0.5)
                start += took
            axes.plot(row.forward_slowest_each, y, marker="D", ms=4, color=INK, mec=PAPER)
        axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="ms")
        axes.set_yticks(range(len(rows)), [f"{row.routing} · {row.kind}" for row in rows])
        axes.tick_params(axis="y", length=0)
        names = {colour: [n for n, c in COLOURS.items() if c == colour] for colour in COLOURS.values()}
        keys: list[Any] = [Patch(color=colour, label=", ".join(of)) for colour, of in names.items()]
        keys.append(Line2D([], [], ls="", marker="D", ms=4, color=INK, label="whole forward, nothing awaited"))
        drawn.legend(handles=keys, loc="upper right", ncols=3, fontsize=6.5, columnspacing=1, handlelength=1.4)
    return drawn
