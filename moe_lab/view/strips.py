"""Pieces of figures: strips of dots, bars of shares, their legend and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from moe_lab.study.load import Load
from moe_lab.study.windows import ratio
from moe_lab.view import theme
from moe_lab.view.pictures import colours
from moe_lab.view.theme import CHANCE, INK, LESS, MORE, MUTED, WIDTH, WITHIN, Pixels

ROOM = 1.3  # of a strip's width to its ceiling: the busiest expert is named beyond its dot


def strips(axes: Axes, loads: Sequence[Load], ceiling: int) -> None:
    """A row of dots for every load, upwards, the busiest expert named."""
    for row, load in enumerate(loads):
        ratio_E, null, experts = ratio(load), load.null, len(load.shares_E)
        low, high, limit = null.share_low * experts, null.share_high * experts, null.high.max_over_mean
        axes.barh(row, high - low, left=low, height=0.72, color=CHANCE, lw=0, zorder=1)
        axes.plot([limit, limit], [row - 0.36, row + 0.36], color=MUTED, lw=1, zorder=2)
        shown_E, top = np.minimum(ratio_E, ceiling), int(ratio_E.argmax())
        style: dict[str, Any] = {"s": 9, "alpha": 0.75, "lw": 0, "zorder": 3, "clip_on": False}
        axes.scatter(shown_E, np.full(experts, row), c=colours(ratio_E, low, high), **style)
        if ratio_E[top] > limit:
            place: dict[str, Any] = {"xytext": (3.5, 0), "textcoords": "offset points", "va": "center"}
            name = f"$\\bf{{{top}}}$ {ratio_E[top]:.1f}"
            axes.annotate(name, (shown_E[top], row), size=7.5, color=MORE, **place)
    axes.plot([1, 1], [-0.6, len(loads) - 0.4], color=INK, lw=0.8, zorder=2)
    axes.set(xlim=(0, ceiling * ROOM), ylim=(-0.6, len(loads) - 0.4), facecolor="none")
    axes.set_xticks([0, 1, ceiling // 2, ceiling])
    axes.spines["bottom"].set_bounds(0, ceiling)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def share_bars(axes: Axes, share_N: Sequence[float]) -> None:
    """A bar for every share, upwards, its percentage written beside it."""
    axes.barh(range(len(share_N)), [100 * share for share in share_N], height=0.5, color=WITHIN)
    for row, share in enumerate(share_N):
        place: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{100 * share:.0f}", (100 * share, row), size=7.5, **place)
    axes.set(xlim=(0, 112), ylim=(-0.6, len(share_N) - 0.4), xticks=(0, 50, 100), yticks=())
    axes.set_xlabel("%", labelpad=2)
    axes.spines["left"].set_visible(False)


def legend(drawn: Figure, title: str, below: Pixels = 0) -> None:
    """The title of a figure of strips, and to its right, or `below` it, what its marks mean."""
    height = drawn.get_figheight() * theme.DPI
    drawn.text(8 / WIDTH, 1 - 8 / height, title, size=10, va="top")
    dots = {"more than chance": MORE, "as chance": WITHIN, "less": LESS}
    marks: list[Any] = [Line2D([], [], ls="", marker="o", ms=4, color=dots[name], label=name) for name in dots]
    marks.append(Patch(color=CHANCE, label="95 % of experts at random"))
    marks.append(Line2D([], [], ls="", marker="|", ms=8, color=MUTED, label="the busiest at random"))
    spacing: dict[str, Any] = {"handletextpad": 0.3, "columnspacing": 1.2, "handlelength": 1.2, "borderpad": 0.2}
    left = {"loc": "upper left", "bbox_to_anchor": (0, 1 - (4 + below) / height)}
    place: dict[str, Any] = left if below else {"loc": "upper right", "bbox_to_anchor": (1, 1 - 4 / height)}
    drawn.legend(handles=marks, ncols=5, labelcolor=MUTED, fontsize=7.5, **place, **spacing)


def caption(axes: Axes, name: str, note: str) -> None:
    """A name above the left end of axes, a note above the right one."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(name, (0, 1), xytext=(0, 4), weight="bold", size=8, **place)
    axes.annotate(note, (1, 1), xytext=(0, 4), ha="right", color=MUTED, size=7, **place)


def end_labels(axes: Axes, x: int, ends: dict[str, tuple[float, str]]) -> None:
    """Names at the ends of lines, kept apart."""
    low, high = axes.get_ylim()
    gap, floor = (high - low) * 0.13, -np.inf
    for name, (y, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        floor = max(y, floor + gap)
        place: dict[str, Any] = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, floor), color=colour, **place)
