"""Where which backend wins: a map over tokens, experts, top-k and skew, with the band in which nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from moe_lab.study.crossover import SURE, Winner
from moe_lab.view import theme
from moe_lab.view.pictures import inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import INK, MUTED, PAPER, WIDTH

TALL = 158  # CSS pixels of a line of pictures
COLOURS = {
    "loop": "#8fc1e0",
    "padded": "#e6b3d0",
    "grouped": "#f4b183",
    "fused": "#8fd3bd",
    "buffered": "#f3e38a",
    "batched": "#c9ced6",
    "blocked": "#b7a1cf",
}


@dataclass(frozen=True, eq=False, repr=False)
class CrossoverTable(Text):
    """The winner at every point, and how far behind the next is."""

    found: tuple[Winner, ...]

    def text(self) -> str:
        """A line a point; a winner that fewer than 95 % of draws confirm has a question mark."""
        rows: list[tuple[str, ...]] = [("T", "E", "K", "skew", "fastest", "ms", "next", "takes", "95 %", "sure")]
        for won in self.found:
            tokens, experts, top_k, skew = won.point
            sizes = (f"{tokens:,}", f"{experts}", f"{top_k}", f"{skew:g}")
            lead = (f"{won.lead:.2f} x", f"{won.lead_low:.2f} - {won.lead_high:.2f}")
            mark = f"{100 * won.share:.0f} %{'' if won.sure else ' ?'}"
            rows.append((*sizes, won.arm, f"{won.ms:.3g}", won.second, *lead, mark))
        return table(rows, left=(4, 6))


@dataclass(frozen=True, eq=False, repr=False)
class WinsTable(Text):
    """How many points each backend wins, and at how many the winner is not sure."""

    found: tuple[Winner, ...]

    def text(self) -> str:
        """A line a backend."""
        rows: list[tuple[str, ...]] = [("", "wins", "not sure")]
        for arm in sorted({won.arm for won in self.found}):
            won = [one for one in self.found if one.arm == arm]
            rows.append((arm, f"{len(won)}", f"{sum(not one.sure for one in won)}"))
        return table(rows)


def crossover_map(found: Sequence[Winner], what: str) -> Figure:
    """A square a point: tokens across, experts up, a picture for each top-k and skew.

    Colour names the winner, the number how many times its time the next one takes; hatched where fewer than 95 % of
    bootstrap draws have this winner.
    """
    top_ks = sorted({won.point.top_k for won in found})
    skews = sorted({won.point.skew for won in found})
    with theme.style():
        height = 70 + TALL * len(skews)
        drawn = theme.figure(WIDTH, height)
        drawn.text(14 / WIDTH, 1 - 20 / height, f"Which backend wins: {what}", size=9, color=INK)
        width = (WIDTH - 40) // len(top_ks)
        for i, top_k in enumerate(top_ks):
            for j, skew in enumerate(skews):
                sides = {"left": 52 + i * width, "right": WIDTH - 32 - (i + 1) * width}
                axes = inset(drawn, **sides, top=84 + TALL * j, bottom=height - 56 - TALL * (j + 1) + 38)
                axes.set_title(f"K {top_k}, skew {skew:g}", pad=6)
                cells = [won for won in found if (won.point.top_k, won.point.skew) == (top_k, skew)]
                _cells(axes, cells, found)
                axes.set_xlabel("tokens" if j == len(skews) - 1 else "", labelpad=2)
                axes.set_ylabel("experts" if i == 0 else "")
                axes.tick_params(labelleft=i == 0)
        arms = [arm for arm in COLOURS if any(won.arm == arm for won in found)]
        keys = [Patch(fc=COLOURS[arm], label=arm) for arm in arms]
        unsure = f"not sure: under {100 * SURE:.0f} % of draws"
        keys.append(Patch(fc=PAPER, ec=MUTED, hatch="////", lw=0.5, label=unsure))
        at = (10 / WIDTH, 1 - 28 / height)
        drawn.legend(handles=keys, loc="upper left", bbox_to_anchor=at, ncols=len(keys), fontsize=7.5, handlelength=1.4)
    return drawn


def _cells(axes: Axes, cells: Sequence[Winner], found: Sequence[Winner]) -> None:
    tokens = sorted({won.point.tokens for won in found})
    experts = sorted({won.point.num_experts for won in found})
    for won in cells:
        x, y = tokens.index(won.point.tokens), experts.index(won.point.num_experts)
        hatch: dict[str, Any] = {} if won.sure else {"hatch": "////", "ec": MUTED}
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fc=COLOURS[won.arm], lw=0, **hatch))
        box = {"fc": COLOURS[won.arm], "lw": 0, "pad": 1.0}
        axes.text(x, y, f"{won.lead:.2f}", ha="center", va="center", size=7, color=INK, bbox=box)
    axes.set(xlim=(-0.5, len(tokens) - 0.5), ylim=(-0.5, len(experts) - 0.5))
    axes.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens])
    axes.set_yticks(range(len(experts)), list(map(str, experts)))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
