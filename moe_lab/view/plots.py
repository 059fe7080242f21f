"""Results drawn: every function takes a result and returns a matplotlib `Figure`.

Axes come from what is compared (experts, layers, sizes) and a ceiling for load / mean, not from the numbers
drawn, so that figures of one kind can be laid side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import NullLocator

from moe_lab.study.domains import Classification
from moe_lab.study.load import ALL_DOMAINS, Imbalance, Load
from moe_lab.study.windows import ratio
from moe_lab.view import theme
from moe_lab.view.choices import ChoiceComparison
from moe_lab.view.loads import WindowSweep
from moe_lab.view.pictures import HeatPicture, LoadPicture, expert_axis, heading, inset, ratio_bar, ratio_image
from moe_lab.view.strips import ROOM, caption, end_labels, legend, share_bars, strips
from moe_lab.view.text import window_of
from moe_lab.view.theme import CHANCE, INK, LESS, MORE, MUTED, OTHER_TINT, PAPER, PICTURE, WIDTH
from moe_lab.view.tokens import NEWLINE, TintedText, characters

CEILINGS = (4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def ceiling_for(highest: float) -> int:
    """The lowest usual ceiling over a load / mean, or hardly below it: what sticks out is marked with its value."""
    return next((ceiling for ceiling in CEILINGS if ceiling >= 0.95 * highest), CEILINGS[-1])


def load(result: Load, baseline: Load | None = None, *, ceiling: int = 4) -> Figure:
    """Load by expert as bars, with the mean line, the band of chance, and a baseline as outline."""
    picture = LoadPicture(len(result.shares_E), ceiling, size=(WIDTH, 250))
    return picture.update(result, baseline=baseline).figure


def layers(result: Imbalance, layer: int | None = None, domain: str | None = None) -> Figure:
    """Load / mean of every expert in every layer, one layer framed."""
    loads = [result.load(number, domain) for number in result.layers]
    experts, size = len(loads[0].shares_E), (WIDTH, 84 + 22 * len(loads))
    return HeatPicture(result.layers, experts, size=size).update(loads, layer).figure


def domains(result: Imbalance, *, ceiling: int | None = None) -> Figure:
    """Which experts drown, in which layer, for which domain, and whether chance would do it."""
    groups, depth = result.domains, len(result.layers)
    ceiling = ceiling or ceiling_for(max(float(ratio(load).max()) for load in result.loads))
    columns = min(6, len(groups))
    lines, tall, step = -(-len(groups) // columns), 17 * depth + 6, (WIDTH - 36) / columns
    height = 42 + lines * (tall + 26) + 8
    with theme.style():
        drawn = theme.figure(WIDTH, height)
        legend(drawn, "Load of experts by domain and layer")
        for g, group in enumerate(groups):
            loads = [result.load(layer, group) for layer in result.layers]
            line, column = divmod(g, columns)
            left, top = 34 + column * step, 42 + line * (tall + 26)
            axes = inset(drawn, left=left, right=WIDTH - left - step + 8, top=top, bottom=height - top - tall)
            strips(axes, loads, ceiling)
            caption(axes, "all" if group == ALL_DOMAINS else group, f"{loads[0].tokens * loads[0].windows:,} tokens")
            axes.set_yticks(range(depth), [str(layer) if column == 0 else "" for layer in result.layers])
            if column == 0:
                axes.set_ylabel("layer", labelpad=2)
            if g + columns >= len(groups):
                axes.set_xlabel("load / mean", labelpad=1, x=0.5 / ROOM)
    return drawn


def fingerprints(result: Imbalance, layer: int) -> Figure:
    """Load / mean of every expert of one layer by domain: what tells domains apart."""
    loads = [result.load(layer, domain) for domain in result.domains][::-1]
    with theme.style():
        drawn = theme.figure(WIDTH, 84 + 24 * len(loads))
        axes = inset(drawn, left=84, right=44, bottom=34, top=40)
        heading(axes, "Load / mean of every expert by domain", f"layer {layer} · one rank")
        ratio_image(axes, np.stack([ratio(load) for load in loads]))
        axes.set_yticks(range(len(loads)), [load.domain for load in loads])
        expert_axis(axes)
        ratio_bar(inset(drawn, left=WIDTH - 36, right=28, bottom=34, top=40))
    return drawn


def windows(result: WindowSweep, *, ceiling: int | None = None) -> Figure:
    """max/mean against window size: documents packed, their tokens mixed, chance."""
    sizes, ceiling = np.array(result.sizes), ceiling or ceiling_for(float(result.high_S.max()))
    chance = [(null.low.max_over_mean, null.mean.max_over_mean, null.high.max_over_mean) for null in result.null_S]
    low_S, mean_S, high_S = np.array(chance).T
    with theme.style():
        drawn = theme.figure(WIDTH, 300)
        axes = inset(drawn, left=44, right=140, bottom=40, top=44)
        heading(axes, "Imbalance against window size", result.where)
        axes.fill_between(sizes, low_S, high_S, color=CHANCE, lw=0)
        axes.plot(sizes, mean_S, color=MUTED, lw=1)
        axes.fill_between(sizes, result.low_S, result.high_S, color=MORE, alpha=0.16, lw=0)
        axes.plot(sizes, result.packed_S, color=MORE, marker="o", ms=3.5, lw=1.6)
        axes.plot(sizes, result.mixed_S, color=LESS, marker="s", ms=3, lw=1.4)
        axes.set_xscale("log", base=2)
        axes.set(xlim=(sizes[0] / 1.1, sizes[-1] * 1.1), ylim=(1, ceiling))
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("tokens per window (log scale)", labelpad=2)
        axes.set_ylabel("max / mean of expert load", labelpad=2)
        axes.grid(axis="y")
        ends = {"documents packed\n(middle 90 %)": (result.packed_S, MORE), "tokens mixed": (result.mixed_S, LESS)}
        ends["chance (95 %)"] = (mean_S, MUTED)
        end_labels(axes, result.sizes[-1], {name: (float(y_S[-1]), colour) for name, (y_S, colour) in ends.items()})
    return drawn


def choices(result: ChoiceComparison, *, ceiling: int | None = None) -> Figure:
    """One row a choice: every expert's load, assignments kept from the recording, the heaviest gate's share."""
    ceiling = ceiling or ceiling_for(max(float(ratio(load).max()) for load in result.loads))
    rows = len(result.names)
    with theme.style():
        drawn = theme.figure(WIDTH, 26 * rows + 116)
        legend(drawn, f"The same recorded logits of layer {result.loads[0].layer} under other choices (open-loop)", 20)
        place = {"top": 70, "bottom": 38}
        axes = inset(drawn, left=150, right=WIDTH - 570, **place)
        strips(axes, result.loads[::-1], ceiling)
        axes.set_yticks(range(rows), result.names[::-1])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlabel("load / mean", labelpad=2)
        caption(axes, "load of every expert", window_of(result.loads[0]))
        shares = {"assignments kept": result.kept_C, "heaviest gate": result.top_gate_C}
        for left, (name, share_C) in zip((596, 750), shares.items(), strict=True):
            share_bars(inset(drawn, left=left, right=WIDTH - left - 138, **place), share_C[::-1])
            caption(drawn.axes[-1], name, "")
    return drawn


def confusion(result: Classification, what: str) -> Figure:
    """Which domain the experts of a window name, against the true one; rows add up to 100 %."""
    size, counts_DD = len(result.domains), result.confusion_DD.numpy()
    percent_DD = 100 * counts_DD / np.maximum(counts_DD.sum(axis=1, keepdims=True), 1)
    with theme.style():
        drawn = theme.figure(100 + 74 * size, 84 + 40 * size)
        axes = inset(drawn, left=86, right=14, bottom=40, top=44)
        heading(axes, what, f"{int(counts_DD.sum()):,} windows, {100 * result.accuracy:.1f} % named right")
        axes.imshow(percent_DD, cmap=theme.SHARE_MAP, vmin=0, vmax=100, aspect="auto")
        for (i, j), percent in np.ndenumerate(percent_DD):
            colour = "white" if percent > 45 else INK if percent else MUTED
            axes.text(j, i, f"{percent:.0f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(size), result.domains)
        axes.set_yticks(range(size), result.domains)
        axes.tick_params(length=0)
        axes.set_xlabel("named by its experts, % of windows", labelpad=4)
        axes.set_ylabel("true domain", labelpad=2)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return drawn


def tokens(result: TintedText, *, size: tuple[int, int] = PICTURE) -> Figure:
    """The beginning of a tinted text, as much as fits."""
    width, height = size
    columns, lines = int((width - 20) / 6), int((height - 54) / 13)
    rows = _rows(result, columns)[:lines]
    with theme.style():
        drawn = theme.figure(*size)
        axes = inset(drawn, left=10, right=10, bottom=4, top=50)
        axes.set_title(f"Text by first expert, layer {result.layer}", pad=23)  # in line with the other pictures
        for place, (expert, share) in enumerate(result.shares()[: int(width / 55)]):
            chip: dict[str, Any] = {"facecolor": result.tints[expert], "lw": 0, "pad": 1.5}
            drawn.text((12 + 55 * place) / width, 1 - 43 / height, f"{expert}  {share}", size=7, bbox=chip)
        axes.set(xlim=(0, (width - 20) / 6), ylim=((height - 54) / 13, 0))
        axes.axis("off")
        cells = [(column, row, colour) for row, cells in enumerate(rows) for column, (_, colour) in enumerate(cells)]
        boxes = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y, _ in cells]
        axes.add_collection(PolyCollection(boxes, facecolors=[colour for *_, colour in cells], linewidths=0))
        for row, characters_ in enumerate(rows):  # 7.176 points make a character 6 pixels wide
            line = "".join(character for character, _ in characters_)
            axes.text(0, row + 0.74, line, size=7.176, family="DejaVu Sans Mono", parse_math=False)
    return drawn


# pieces


def _rows(result: TintedText, columns: int) -> list[list[tuple[str, str]]]:
    """Characters and their colours by row, wrapped at `columns`."""
    font = get_font(findfont("DejaVu Sans Mono"))
    rows: list[list[tuple[str, str]]] = []
    for heading_, start, end in result.parts:
        rows.append([(character, PAPER) for character in heading_[:columns]])
        rows.append([])
        for begin, _, shown in characters(result.pieces, start, end):
            colour = result.tints.get(int(result.expert_ids_TK[begin, 0]), OTHER_TINT)
            for character in shown:
                if len(rows[-1]) == columns:
                    rows.append([])
                rows[-1].append((character if font.get_char_index(ord(character)) else "▯", colour))
                if character == NEWLINE:
                    rows.append([])
    return [row for row in rows if row]
