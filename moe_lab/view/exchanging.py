"""The exchange drawn: who sends how much to whom, which rank straggles, and who waits for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from moe_lab.jobs.exchange_runs import Overlap
from moe_lab.layer.splits import CountMatrix, EqualSplits, UnequalSplits
from moe_lab.study.ranks import RankLoad
from moe_lab.study.timeline import RankSteps, by_exchange
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import INK, MUTED, PAPER, SERIES, WIDTH

EXCHANGE_COLOUR = "#0072b2"
PHASE_COLOURS = {
    "router": "#e69f00",
    "plan": "#cc79a7",
    "pack": "#56b4e9",
    "unpack": "#56b4e9",
    "experts": "#009e73",
    "unpermute": "#56b4e9",
    "shared experts": "#f0e442",
    "combine": "#d55e00",
}


@dataclass(frozen=True, eq=False, repr=False)
class MatrixText(Text):
    """Rows from rank to rank, and how they are sent."""

    counts: CountMatrix
    splits: UnequalSplits | EqualSplits

    def text(self) -> str:
        """A line a sending rank; below, what each receives, and zero rows of padding."""
        splits_RR, ep = self.splits.splits_RR, self.counts.ep
        rows = [["to rank", *map(str, range(ep)), "sent", "zeros"]]
        for rank, sent in enumerate(splits_RR.tolist()):
            rows.append([f"from {rank}", *map(str, sent), str(sum(sent)), str(self.splits.padded_rows(rank))])
        received = splits_RR.sum(dim=0).tolist()
        rows.append(["received", *map(str, received), str(sum(received)), ""])
        return f"{table(rows)}\n{self.splits.reason}"


def blocks(counts: CountMatrix, what: str) -> Figure:
    """Send buffers and, after the exchange and the reordering, what experts read; coloured by source rank."""
    ep, slots = counts.counts_RP.shape
    with theme.style():
        drawn = theme.figure(WIDTH, 70 + 46 * ep)
        halves = [inset(drawn, left=left, right=right, bottom=42, top=44) for left, right in ((50, 465), (485, 14))]
        heading(halves[0], "Sent: rank by rank, sorted by expert", what)
        heading(halves[1], "At the experts: expert by expert, from all ranks", "colour: the rank it came from")
        experts = [[(r, p, int(counts.counts_RP[r, p])) for p in range(slots)] for r in range(ep)]
        local = slots // ep
        arrived = [
            [(s, p, int(counts.counts_RP[s, p])) for p in range(r * local, (r + 1) * local) for s in range(ep)]
            for r in range(ep)
        ]
        for axes, buffers in zip(halves, (experts, arrived)):
            _buffers(axes, buffers, local)
    return drawn


def _buffers(axes: Axes, buffers: list[list[tuple[int, int, int]]], local: int) -> None:
    """One bar a rank; a block for each source and expert, named by its expert where there is room."""
    longest = max(sum(rows for _, _, rows in blocks) for blocks in buffers)
    for rank, segments in enumerate(buffers):
        start = 0
        for source, expert, rows in segments:
            colour = SERIES[source % len(SERIES)]
            axes.barh(rank, rows, 0.62, left=start, color=colour, alpha=0.55 + 0.4 * (expert % 2), ec=PAPER, lw=0.5)
            if rows > longest / 26:
                ink = PAPER if expert % 2 else INK  # on the strong and on the pale shade
                axes.text(start + rows / 2, rank, str(expert), ha="center", va="center", size=6.5, color=ink)
            start += rows
    axes.set(xlim=(0, 1.02 * longest), ylim=(len(buffers) - 0.5, -0.5), xlabel="rows (numbers: expert)")
    axes.set_yticks(range(len(buffers)), [f"rank {rank}" for rank in range(len(buffers))])
    axes.tick_params(axis="y", length=0)


def heatmaps(matrices: Sequence[CountMatrix], what: str) -> Figure:
    """Rank x rank over EP: rows sent over the mean of a pair."""
    with theme.style():
        drawn = theme.figure(WIDTH, 275)
        width = (WIDTH - 60) // len(matrices)
        for i, counts in enumerate(matrices):
            axes = inset(drawn, left=44 + i * width, right=WIDTH - 44 - (i + 1) * width + 34, bottom=36, top=44)
            image = heat(axes, counts.splits_RR.numpy())
            heading(axes, f"EP {counts.ep}", what if i == 0 else "")
            axes.set(xlabel="to rank", ylabel="from rank" if i == 0 else "")
        bar = drawn.colorbar(image, cax=inset(drawn, left=WIDTH - 38, right=30, bottom=36, top=44))
        bar.outline.set_visible(False)
        bar.ax.set_yticks(list(theme.RATIO_TICKS), list(theme.RATIO_TICKS.values()))
        bar.ax.set_title("/ mean", size=7, pad=4, loc="center")
    return drawn


def heat(axes: Axes, splits_RR: np.ndarray) -> AxesImage:
    """One matrix of rows over their mean, rank 0 at the top left."""
    ratio_RR = splits_RR / max(splits_RR.mean(), 1e-9)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    step = max(1, len(splits_RR) // 8)
    axes.set_xticks(range(0, len(splits_RR), step))
    axes.set_yticks(range(0, len(splits_RR), step))
    shades = Normalize(-2, 2)
    picture = theme.log_ratio(ratio_RR)
    return axes.imshow(picture, cmap=theme.RATIO_MAP, norm=shades, aspect="auto", interpolation="nearest")


@dataclass(frozen=True, eq=False, repr=False)
class StragglerTable(Text):
    """Straggler factors by EP and tokens a rank, beside chance."""

    loads: tuple[RankLoad, ...]

    def text(self) -> str:
        """One line for each."""
        rows: list[tuple[str, ...]] = [("EP", "tokens a rank", "forwards", "straggler", "chance", "95 % of chance")]
        for load in self.loads:
            band = f"{load.chance_low:.3f} - {load.chance_high:.3f}"
            cells = (f"{load.ranks}", f"{load.tokens_per_rank:,}", f"{load.windows:,}")
            rows.append((*cells, f"{load.straggler:.3f}", f"{load.chance_mean:.3f}", band))
        return table(rows, left=())


def stragglers(result: StragglerTable, what: str) -> Figure:
    """Straggler factor over EP, a line for each number of tokens a rank, the chance of each dashed."""
    with theme.style():
        drawn = theme.figure(WIDTH, 300)
        axes = inset(drawn, left=48, right=210, bottom=40, top=44)
        heading(axes, "Straggler factor: the fullest rank's rows over the mean's", what)
        for i, tokens in enumerate(sorted({load.tokens_per_rank for load in result.loads})):
            loads = [load for load in result.loads if load.tokens_per_rank == tokens]
            eps = [load.ranks for load in loads]
            axes.plot(eps, [load.straggler for load in loads], "o-", ms=4, color=SERIES[i], label=f"{tokens:,} a rank")
            chance = [load.chance_mean for load in loads]
            axes.plot(eps, chance, ls="--", lw=1, color=SERIES[i], label=f"{tokens:,}, chance")
        axes.set_xscale("log", base=2)
        ticks = sorted({load.ranks for load in result.loads})
        axes.set_xticks(ticks, map(str, ticks))
        axes.set(xlabel="EP (ranks)", ylabel="straggler factor (1: balanced)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return drawn


@dataclass(frozen=True, eq=False, repr=False)
class TimelineTable(Text):
    """Each exchange on each rank, ms: measured on this machine."""

    steps: tuple[RankSteps, ...]

    def text(self) -> str:
        """One line for each exchange and rank."""
        rows: list[tuple[str, ...]] = [("exchange", "rank", "wait ms", "transfer ms", "exposed ms", "hidden ms")]
        for name, found in by_exchange(self.steps).items():
            for rank, part in enumerate(found):
                ms = [f"{1e3 * value:.1f}" for value in part]
                rows.append((name if rank == 0 else "", str(rank), *ms))
        return table(rows)


def gantt(steps: Sequence[RankSteps], what: str) -> Figure:
    """Forward by rank: phases above, exchanges below them, waiting hatched and transfer solid."""
    start = min(span.start for step in steps for span in step.spans)
    with theme.style():
        drawn = theme.figure(WIDTH, 100 + 62 * len(steps))
        axes = inset(drawn, left=50, right=14, bottom=40, top=66)
        heading(axes, "Forward, rank by rank", what)
        for rank, step in enumerate(steps):
            for span in step.spans:
                _bar(axes, rank - 0.18, span.start - start, span.end - start, color=PHASE_COLOURS.get(span.name, MUTED))
        for flights in zip(*(step.flights for step in steps)):
            latest = max(flight.arrival for flight in flights)
            if "gradients" in flights[0].name:
                continue
            for rank, flight in enumerate(flights):
                _bar(axes, rank + 0.18, flight.arrival - start, latest - start, color=PAPER, hatch="////")
                _bar(axes, rank + 0.18, latest - start, flight.end - start, color=EXCHANGE_COLOUR)
        axes.set_xlabel("ms since the first rank began")
        axes.set_ylim(len(steps) - 0.5, -0.5)
        axes.set_yticks(range(len(steps)), [f"rank {rank}" for rank in range(len(steps))])
        names = {colour: [n for n, c in PHASE_COLOURS.items() if c == colour] for colour in PHASE_COLOURS.values()}
        keys = [Patch(color=colour, label=", ".join(of)) for colour, of in names.items()]
        keys += [Patch(fc=PAPER, ec=INK, hatch="////", label="wait"), Patch(color=EXCHANGE_COLOUR, label="transfer")]
        drawn.legend(handles=keys, loc="upper right", ncols=5, fontsize=6.5, columnspacing=1, handlelength=1.4)
    return drawn


def _bar(axes: Axes, y: float, start: float, end: float, *, color: str, hatch: str = "") -> None:
    edge, width = (INK, 0.4) if hatch else (color, 0.0)
    axes.barh(y, 1e3 * (end - start), 0.3, left=1e3 * start, fc=color, ec=edge, lw=width, hatch=hatch)


@dataclass(frozen=True, eq=False, repr=False)
class OverlapTable(Text):
    """What shared experts hide of the exchange beside them, exposed ms, with 95 % intervals over paired rounds."""

    found: tuple[Overlap, ...]

    def text(self) -> str:
        """One line a direction."""
        rows = [("exchange", "off ms", "on ms", "on less off, ms (95 %)")]
        for one in self.found:
            change = f"{one.change.median:+.2f} [{one.change.low:+.2f}, {one.change.high:+.2f}]"
            rows.append((one.exchange, f"{one.off.median:.2f}", f"{one.on.median:.2f}", change))
        return table(rows)
