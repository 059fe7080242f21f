"""Padding drawn: buffers as segments of real and zero rows, thresholds, policies, and what forced balance hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.layer.padding import round_up
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.forced import ForcedView
from moe_lab.study.padding import worst_overhead
from moe_lab.study.threshold import ThresholdPoint
from moe_lab.study.waste import Waste
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import CHANCE, INK, MORE, MUTED, SERIES, WIDTH

DEFAULT_THRESHOLD = 0.10


class WasteText(Text):
    """Totals of every policy over all micro-batches, as a table."""

    def __init__(self, waste: Waste, dim: int, hidden_dim: int, *, itemsize: int = 2) -> None:
        self.waste, self.dim, self.hidden_dim, self.itemsize = waste, dim, hidden_dim, itemsize

    def text(self) -> str:
        """One line a policy; overheads are zero rows over real rows, in percent."""
        rows = [["", "exchange %", "worst rank", "MB", "experts %", "worst rank", "GFLOP", "dropped %", "straggler"]]
        for total in self.waste.totals():
            one = total.overhead
            shares = [
                one.exchange_overhead,
                one.worst_exchange_overhead,
                one.expert_overhead,
                one.worst_expert_overhead,
            ]
            exchange, worst, experts, worst_experts = (f"{100 * share:.1f}" for share in shares)
            megabytes = f"{one.wasted_bytes(self.dim, self.itemsize) / 1e6:.1f}"
            flops = f"{one.wasted_flops(self.dim, self.hidden_dim) / 1e9:.1f}"
            cells = [exchange, worst, megabytes, experts, worst_experts, flops, f"{100 * total.dropped_share:.1f}"]
            rows.append([total.setting, *cells, f"{total.straggler_factor:.2f}"])
        lines = [f"EP {self.waste.ep} · {self.waste.micro_batches} micro-batches · D {self.dim} · F {self.hidden_dim}"]
        lines.append(table(rows))
        if self.waste.traffic is not None and self.waste.forced_traffic is not None:
            both = {"rows that leave ranks": self.waste.traffic, "under forced balance": self.waste.forced_traffic}
            for name, found in both.items():
                parts = zip(("assignment", "rank", "node"), found, strict=True)
                lines.append(f"{name}: " + ", ".join(f"per {part} {sum(of or ()):,}" for part, of in parts))
        return "\n".join(lines)


class SplitsText(Text):
    """Rows of each pair of ranks, and the overhead of padding them to the largest."""

    def __init__(self, counts: CountMatrix) -> None:
        self.counts = counts

    def text(self) -> str:
        """One line a sending rank."""
        splits = self.counts.splits_RR.tolist()
        size = max(map(max, splits))
        rows = [["from \\ to", *map(str, range(len(splits))), "zero rows sent"]]
        rows += [[str(r), *map(str, row), str(size * len(row) - sum(row))] for r, row in enumerate(splits)]
        return f"{table(rows)}\npadded to {size}: worst rank's overhead {100 * worst_overhead(self.counts):.1f} %"


def xray(counts: CountMatrix) -> Figure:
    """What every rank sends, a segment a peer: as it is, and with all segments padded to the largest."""
    splits_RR, ep = counts.splits_RR.numpy(), counts.ep
    size = int(splits_RR.max())
    with theme.style():
        drawn = theme.figure(WIDTH, 96 + 22 * ep)
        for left, name, padded in ((52, "As they are", False), (486, "Equal split", True)):
            axes = inset(drawn, left=left, right=WIDTH - left - 400, bottom=40, top=52)
            note = (
                f"every segment {size} rows, hatched rows are zero" if padded else "a segment for each receiving rank"
            )
            heading(axes, name, note)
            for peer in range(ep):
                width_R = splits_RR[:, peer]
                start_R = np.full(ep, peer * size) if padded else splits_RR[:, :peer].sum(axis=1)
                axes.barh(range(ep), width_R, left=start_R, height=0.74, color=SERIES[peer % 6], ec="white", lw=0.6)
                if padded:
                    _zeros(axes, range(ep), size - width_R, start_R + width_R)
            axes.set(xlim=(0, size * ep), ylim=(ep - 0.4, -0.6), yticks=range(ep))
            axes.set_xlabel("rows sent", labelpad=2)
            axes.set_ylabel("rank", labelpad=2)
    return drawn


def tiles(counts: CountMatrix, multiple: int) -> Figure:
    """Rows of every expert, and zero rows up to the next multiple."""
    real_E = counts.counts_RP.sum(dim=0)
    zeros_E = (round_up(real_E, multiple) - real_E).numpy()
    with theme.style():
        drawn = theme.figure(WIDTH, 250)
        axes = inset(drawn, left=52, right=16, bottom=40, top=48)
        overhead = 100 * zeros_E.sum() / max(int(real_E.sum()), 1)
        heading(axes, f"Experts' rows in tiles of {multiple}", f"hatched: zero rows, {overhead:.1f} % of the real ones")
        axes.bar(range(len(real_E)), real_E.numpy(), color=SERIES[0], width=0.8)
        _zeros(axes, range(len(real_E)), zeros_E, real_E.numpy(), upright=True)
        per_rank = len(real_E) // counts.ep
        for rank in range(1, counts.ep):
            axes.axvline(rank * per_rank - 0.5, color=MUTED, lw=0.6, ls=(0, (2, 2)))
        axes.set(xlim=(-0.7, len(real_E) - 0.3))
        axes.set_xlabel("expert (dashed: from one rank to the next)", labelpad=2)
        axes.set_ylabel("rows", labelpad=2)
    return drawn


def _zeros(axes: Axes, place: Sequence[int], size: Any, start: Any, *, upright: bool = False) -> None:
    style: dict[str, Any] = {"color": CHANCE, "ec": MUTED, "lw": 0.3, "hatch": "////"}
    if upright:
        axes.bar(place, size, bottom=start, width=0.8, **style)
    else:
        axes.barh(place, size, left=start, height=0.74, **style)


class ThresholdText(Text):
    """Sweeps of the threshold by name, as a table."""

    def __init__(self, sweeps: Mapping[str, Sequence[ThresholdPoint]]) -> None:
        self.sweeps = sweeps

    def text(self) -> str:
        """One line a threshold: micro-batches padded, and zero rows over real rows, in percent."""
        first = next(iter(self.sweeps.values()))
        rows = [["threshold", *(f"{name} {what}" for name in self.sweeps for what in ("padded", "overhead %"))]]
        for i, point in enumerate(first):
            cells = [f"{point.threshold:.2f}"]
            for points in self.sweeps.values():
                cells += [f"{points[i].padded} of {points[i].micro_batches}", f"{100 * points[i].overhead:.1f}"]
            rows.append(cells)
        return table(rows)


def thresholds(sweeps: Mapping[str, Sequence[ThresholdPoint]]) -> Figure:
    """Share of micro-batches that are padded, and what that costs, against the threshold."""
    with theme.style():
        drawn = theme.figure(WIDTH, 280)
        columns = {"Micro-batches padded": "share_padded", "Zero rows over real rows": "overhead"}
        for left, (name, field) in zip((52, 500), columns.items(), strict=True):
            axes = inset(drawn, left=left, right=WIDTH - left - 384, bottom=40, top=48)
            heading(axes, name, f"dashed: the default threshold, {DEFAULT_THRESHOLD:.2f}")
            for colour, (label, points) in zip(SERIES, sweeps.items(), strict=False):
                y = [100 * getattr(point, field) for point in points]
                axes.plot([point.threshold for point in points], y, color=colour, marker="o", ms=3, label=label)
            axes.axvline(DEFAULT_THRESHOLD, color=INK, lw=0.9, ls=(0, (3, 2)))
            axes.set_xlabel("threshold: worst rank's overhead", labelpad=2)
            axes.set_ylabel("%", labelpad=2)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.legend(loc="lower right")
    return drawn


def policies(by_ep: Mapping[int, Waste], settings: Sequence[str]) -> Figure:
    """Zero rows over real rows against EP, in the exchange and at the experts, for some policies."""
    with theme.style():
        drawn = theme.figure(WIDTH, 310)
        columns = {"In both exchanges": "exchange_overhead", "At the experts": "expert_overhead"}
        for left, (name, field) in zip((52, 500), columns.items(), strict=True):
            axes = inset(drawn, left=left, right=WIDTH - left - 384, bottom=40, top=72)
            heading(axes, name, "zero rows over real rows")
            for i, setting in enumerate(settings):
                y = [100 * getattr(one.total(setting).overhead, field) for one in by_ep.values()]
                style: dict[str, Any] = {"color": SERIES[i % 7], "marker": "osD^v<>"[i % 7], "ms": 4, "lw": 1.3}
                axes.plot(range(len(y)), y, label=setting, **style)
            axes.set_xticks(range(len(by_ep)), [str(ep) for ep in by_ep])
            axes.set_xlabel("EP, ranks", labelpad=2)
            axes.set_ylabel("%", labelpad=2)
            axes.grid(axis="y")
            axes.set_ylim(bottom=0)
        handles, names = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="upper left", ncols=len(settings), bbox_to_anchor=(0, 1))
    return drawn


class ForcedText(Text):
    """Forced balance beside the real routing by EP, as a table."""

    def __init__(self, views: Mapping[int, ForcedView]) -> None:
        self.views = views

    def text(self) -> str:
        """Straggler factors, ranks a token visits, and rows that leave under round robin over the real ones."""
        rows = [["EP", "idle", "straggler", "forced", "ranks a token", "forced", "sent %", "per rank %", "per node %"]]
        for ep, view in self.views.items():
            seen = [_seen(view, f"per_{level}_R") for level in ("assignment", "rank", "node")]
            straggler = [f"{view.straggler_factor:.2f}", f"{view.forced_straggler_factor:.2f}"]
            visited = [f"{view.ranks_per_token:.2f}", f"{view.forced_ranks_per_token:.2f}"]
            rows.append([str(ep), str(view.idle_ranks), *straggler, *visited, *seen])
        return table(rows)


def _seen(view: ForcedView, level: str) -> str:
    """A percentage, where any rows leave."""
    return f"{100 * view.seen(level):.0f}" if sum(getattr(view.traffic, level)) else "-"


def forced(views: Mapping[int, ForcedView]) -> Figure:
    """Stragglers and ranks a token visits against EP, real and under forced balance."""
    with theme.style():
        drawn = theme.figure(WIDTH, 260)
        columns = {
            "Busiest rank over the mean": ("straggler_factor", "forced_straggler_factor"),
            "Ranks that a token visits": ("ranks_per_token", "forced_ranks_per_token"),
        }
        for left, (name, fields) in zip((52, 500), columns.items(), strict=True):
            axes = inset(drawn, left=left, right=WIDTH - left - 384, bottom=40, top=48)
            heading(axes, name, "the same micro-batch")
            for field, colour, label in zip(fields, (MORE, MUTED), ("real routing", "forced balance"), strict=True):
                y = [getattr(view, field) for view in views.values()]
                axes.plot(range(len(y)), y, color=colour, marker="o", ms=4, label=label)
            axes.set_xticks(range(len(views)), [str(ep) for ep in views])
            axes.set_xlabel("EP, ranks", labelpad=2)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y")
            axes.legend(loc="lower right")
    return drawn
