"""The ladder of determinism as a table of ticks: drawn, and as text. Prices of batch invariance as text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_lab.jobs.determinism import Price
from moe_lab.study.determinism import Difference, Ladder
from moe_lab.view import theme
from moe_lab.view.pictures import inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import CHANCE, GRID, INK, MORE, MUTED, PAPER, SERIES, WIDTH

HEADINGS = {
    "repeat": "run to run",
    "recompute": "recomputed",
    "permuted": "permuted",
    "alone": "alone",
    "in seven": "one of 7",
    "split": "in 4 parts",
    "ep 2": "2 ranks",
    "ep 4": "4 ranks",
    "threads": "threads",
}
SHORT = {
    "router logits": "logits",
    "dispatched rows": "rows",
    "w1/w3 products": "w1/w3",
    "w2 product": "w2",
    "shared experts": "shared",
    "input gradient": "dx",
    "weight gradients": "dW",
}
LEFT, TOP, BOTTOM = 150, 64, 28  # CSS pixels around the cells
SAME, TINT = SERIES[2], 0.28  # green; how much of a colour a cell takes


class LadderText(Text):
    """A ladder as a table: `same`, or the first stage that differs and by how many ULPs; `-` where not asked."""

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder

    def text(self) -> str:
        """One line an arm."""
        questions = list(next(iter(self.ladder.cells.values())))
        rows = [["", *(HEADINGS[question] for question in questions)]]
        rows += [[arm, *(_text(cell[q]) for q in questions)] for arm, cell in self.ladder.cells.items()]
        return f"{title(self.ladder)}\n{table(rows)}"


class PriceText(Text):
    """What batch invariance costs: milliseconds, and the ratio to the plain arm in the same rounds, 95 % interval."""

    def __init__(self, prices: Sequence[Price]) -> None:
        self.prices = prices

    def text(self) -> str:
        """One line a measurement."""
        rows = [["layer", "dtype", "tokens", "direction", "ms", "ratio", "interval", "to"]]
        for p in self.prices:
            ratio, interval = f"{p.ratio:.2f}", f"{p.low:.2f}-{p.high:.2f}"
            rows.append([p.layer, p.dtype, f"{p.tokens:,}", p.direction, f"{p.ms:.3g}", ratio, interval, p.base])
        return table(rows, left=(0, 1, 3, 7))


def title(ladder: Ladder) -> str:
    """What a ladder is of."""
    threads = f", 1 thread; last column {ladder.threads}" if ladder.device == "cpu" else ""
    return f"{ladder.tokens:,} tokens, {ladder.dtype}, {ladder.device}{threads}"


def _text(found: Difference | None) -> str:
    if found is None:
        return "-"
    if found.stage is None:
        return "same"
    return f"{SHORT.get(found.stage, found.stage)} {found.ulps:.2g}"


def ladder_figure(ladder: Ladder) -> Figure:
    """Arms down, surroundings across. A tick: the same bits, gradients too. Else the first stage that differs."""
    arms, questions = list(ladder.cells), list(next(iter(ladder.cells.values())))
    with theme.style():
        height = TOP + 34 * len(arms) + BOTTOM
        drawn = theme.figure(WIDTH, height)
        drawn.text(LEFT / WIDTH, 1 - 18 / height, "Equal to the bit?", size=9, color=INK)
        drawn.text(LEFT / WIDTH, 1 - 34 / height, title(ladder), color=MUTED)
        axes = inset(drawn, left=LEFT, right=12, bottom=BOTTOM, top=TOP)
        axes.set(xlim=(0, len(questions)), ylim=(len(arms), 0))
        axes.set_yticks([y + 0.5 for y in range(len(arms))], arms, color=INK)
        axes.set_xticks([x + 0.5 for x in range(len(questions))], [HEADINGS[q] for q in questions], color=INK)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for y, arm in enumerate(arms):
            for x, question in enumerate(questions):
                _cell(axes, x, y, ladder.cells[arm][question])
        for spine in axes.spines.values():
            spine.set_visible(False)
        note = "✓ same bits, gradients too · grey: only gradients of weights (dW), sums over tokens"
        drawn.text(LEFT / WIDTH, 10 / height, f"{note} · under a stage: size in ULPs", color=MUTED)
    return drawn


def _cell(axes, x: int, y: int, found: Difference | None) -> None:  # type: ignore[no-untyped-def]
    if found is None:
        colour, text, size = PAPER, "–", 8.0
    elif found.stage is None:
        colour, text, size = SAME, "✓", 13.0
    else:
        colour = CHANCE if found.stage == "weight gradients" else MORE
        text, size = f"{SHORT.get(found.stage, found.stage)}\n{found.ulps:.2g}", 7.5
    alpha = 0.6 if colour == CHANCE else TINT
    axes.add_patch(Rectangle((x + 0.03, y + 0.05), 0.94, 0.9, facecolor=colour, alpha=alpha, edgecolor=GRID, lw=0))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.1)
