"""The padding panel: whose routing, over how many ranks, under which policy, and what is zero of what moves."""

from __future__ import annotations

import csv
import io
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from moe_lab import data
from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.batches import count_matrix, micro_batches
from moe_lab.study.padding import CAPACITY, POLICIES, Overhead, Policy, overhead, worst_overhead
from moe_lab.study.popularity import dirichlet, draw_ids, zipf
from moe_lab.study.trace import RoutingTrace
from moe_lab.view import theme
from moe_lab.view.panels.base import Panel, control
from moe_lab.view.panels.sources import fit_layers, named_trace
from moe_lab.view.pictures import box, heading, inset, rank_axis
from moe_lab.view.text import table
from moe_lab.view.theme import MUTED, SERIES, WIDTH, WITHIN

TRACES, ZIPF, DIRICHLET = ("balanced", "unbalanced"), "Zipf (synthetic)", "Dirichlet (synthetic)"
EXPERTS, TOP_K = 64, 8  # of synthetic routing
CEILING = 4
FIELDS = {"sent": ("sent_R", "exchange_zeros_R"), "experts": ("rows_R", "expert_zeros_R")}


class Params(NamedTuple):
    """Everything the panel shows follows from this; `skew` is Zipf's exponent or Dirichlet's concentration.

    `trace` is None for synthetic routing.
    """

    source: str
    trace: RoutingTrace | None
    skew: float
    layer: int
    ep: int
    tokens_per_rank: int
    policy: Policy
    threshold: float
    multiple: int


@lru_cache(maxsize=64)
def counts_of(
    source: str, trace: RoutingTrace | None, skew: float, layer: int, ep: int, tokens_per_rank: int
) -> CountMatrix:
    """The first micro-batch of a trace, or a synthetic one. `ValueError` for a trace that does not fill it."""
    if trace is not None:
        placement = Placement.blockwise(trace.num_experts, ep)
        return count_matrix(next(micro_batches(trace, layer, ep, tokens_per_rank)), placement)
    shares_E = zipf(EXPERTS, skew) if source == ZIPF else dirichlet(EXPERTS, skew)
    return count_matrix(draw_ids(shares_E, ep, tokens_per_rank, TOP_K), Placement.blockwise(EXPERTS, ep))


@lru_cache(maxsize=256)
def compute(params: Params) -> tuple[Overhead, float]:
    """One policy over one micro-batch, and the worst rank's overhead of even splits."""
    counts = counts_of(params.source, params.trace, params.skew, params.layer, params.ep, params.tokens_per_rank)
    found = overhead(counts, params.policy, threshold=params.threshold, multiple=params.multiple)
    return found, worst_overhead(counts)


class RowsPicture(theme.Live):
    """Real and zero rows by rank, in units of the mean rank's real rows: in its exchanges, and at its experts."""

    def __init__(self, ep: int) -> None:
        moving: list[PolyCollection] = []
        self._bars: dict[str, tuple[PolyCollection, ...]] = {}
        with theme.style():
            drawn = theme.figure(WIDTH, 240)
            titles = {"sent": "Rows in both exchanges", "experts": "Rows through the experts"}
            for left, (name, title) in zip((44, 496), titles.items(), strict=True):
                axes = inset(drawn, left=left, right=WIDTH - left - 396, bottom=36, top=44)
                heading(axes, title, f"in units of the mean of real rows, cut at {CEILING}")
                axes.set_ylim(0, CEILING)
                rank_axis(axes, ep)
                axes.set_ylabel("rows / mean", labelpad=2)
                axes.axhline(1, color=MUTED, lw=0.8)
                bars = tuple(PolyCollection([], facecolors=colour, linewidths=0) for colour in (SERIES[0], WITHIN))
                for collection in bars:
                    axes.add_collection(collection, autolim=False)
                self._bars[name] = bars
                moving += bars
            marks = [Patch(color=SERIES[0], label="real"), Patch(color=WITHIN, label="zero")]
            drawn.legend(handles=marks, loc="upper right", ncols=2)
        super().__init__(drawn, moving)

    def update(self, found: Overhead) -> RowsPicture:
        """Show another micro-batch of as many ranks."""
        for name, (real, zeros) in self._bars.items():
            real_R, zeros_R = (getattr(found, field) for field in FIELDS[name])
            if name == "sent":  # to dispatch and to combine
                real_R = [sent + rows for sent, rows in zip(found.sent_R, found.rows_R, strict=True)]
            mean = sum(real_R) / len(real_R)
            real.set_verts([box(r, 0, rows / mean) for r, rows in enumerate(real_R)])
            ends = zip(real_R, zeros_R, strict=True)
            zeros.set_verts([box(r, rows / mean, (rows + more) / mean) for r, (rows, more) in enumerate(ends) if more])
        return self


class PaddingPanel(Panel):
    """Steer one micro-batch: from a trace or synthetic, over EP ranks, under one policy. Plans only, nothing moves.

    `source` is the name of a shipped trace, a trace, the path of one (`named_trace`), or synthetic.
    """

    def __init__(self, source: str | Path | RoutingTrace = "balanced") -> None:
        name = source
        self._traces: dict[str, RoutingTrace | None] = dict.fromkeys(TRACES)  # opened when chosen
        if source not in (ZIPF, DIRICHLET):
            name, self._traces[name] = named_trace(source)
        names = [*self._traces, ZIPF, DIRICHLET]
        self.source = control(widgets.Dropdown, "source", "215px", options=names, value=name)
        self.skew = control(widgets.FloatSlider, "skew", "190px", min=0.1, max=2.0, step=0.1, value=0.8)
        self.layer = control(widgets.IntSlider, "layer", "170px", min=0, max=5, value=3)
        self.ep = control(widgets.SelectionSlider, "EP", "170px", options=[2, 4, 8, 16, 32], value=8)
        sizes = [32, 64, 128, 256, 512, 1024]
        self.tokens = control(widgets.SelectionSlider, "tokens per rank", "240px", options=sizes, value=256)
        self.policy = control(widgets.Dropdown, "policy", "190px", options=POLICIES, value="equal_split")
        self.threshold = control(widgets.FloatSlider, "threshold", "230px", min=0.0, max=2.0, step=0.05, value=0.10)
        multiples = [8, 16, 32, 64, 128]
        self.multiple = control(widgets.SelectionSlider, "multiple", "190px", options=multiples, value=128)
        self.image = widgets.Image(format="png", layout={"width": "100%", "margin": "0"})
        first = [self.source, self.skew, self.layer, self.ep, self.tokens]
        second = [self.policy, self.threshold, self.multiple]
        super().__init__([first, second], [])
        self._pictures.children = (widgets.Box([self.image], layout={"flex": "1 1 auto", "max_width": f"{WIDTH}px"}),)
        self.offer_files("padding")
        self._pictures_by_ep: dict[int, RowsPicture] = {}
        self.watch([self.source], self._open)
        self.watch([*first[1:], *second], self.refresh)
        self._open()

    def _open(self) -> None:
        """Give the slider of layers those of the source."""
        name = self.source.value
        if name in self._traces:
            trace = self._traces[name] = self._traces[name] or data.open(name)
            with self.hold():
                fit_layers(self.layer, trace)
        self.refresh()

    def params(self) -> Params:
        """What the controls say; what does not matter to the source is left at its first value."""
        trace = self._traces.get(self.source.value)
        synthetic = trace is None
        return Params(
            self.source.value,
            trace,
            round(self.skew.value, 2) if synthetic else 0.0,
            0 if synthetic else self.layer.value,
            self.ep.value,
            self.tokens.value,
            self.policy.value,
            round(self.threshold.value, 2),
            self.multiple.value,
        )

    def _update(self) -> None:
        params = self.params()
        self.skew.disabled, self.layer.disabled = params.trace is not None, params.trace is None
        self.threshold.disabled, self.multiple.disabled = params.policy != "adaptive", params.policy != "multiple"
        self.shown = (params, *compute(params))
        if params.ep not in self._pictures_by_ep:
            self._pictures_by_ep[params.ep] = RowsPicture(params.ep)
        picture = self._pictures_by_ep[params.ep]
        self.image.value = picture.update(self.shown[1]).png()
        self.numbers.value = escape(self.words) + f"<pre>{table(self._rows())}</pre>"

    def _rows(self) -> list[tuple[str, str, str]]:
        _, found, worst = self.shown
        exchange, experts = sum(found.exchange_zeros_R), sum(found.expert_zeros_R)
        return [
            ("", "all ranks", "worst rank"),
            ("zero rows, exchanges", f"{exchange:,}", f"{max(found.exchange_zeros_R):,}"),
            ("over real rows, %", f"{100 * found.exchange_overhead:.1f}", f"{100 * found.worst_exchange_overhead:.1f}"),
            ("zero rows, experts", f"{experts:,}", f"{max(found.expert_zeros_R):,}"),
            ("over real rows, %", f"{100 * found.expert_overhead:.1f}", f"{100 * found.worst_expert_overhead:.1f}"),
            ("dropped", f"{sum(found.dropped_R):,}", f"{max(found.dropped_R):,}"),
            ("straggler factor", f"{found.straggler_factor:.2f}", ""),
            ("even splits would cost, %", "", f"{100 * worst:.1f}"),
        ]

    @property
    def words(self) -> str:
        """What all numbers are of."""
        params, *_ = self.shown
        what = f"skew {params.skew:g}" if params.trace is None else f"layer {params.layer}"
        extra = {"adaptive": f" {params.threshold:.2f}", "multiple": f" {params.multiple}"}
        extra |= dict.fromkeys(("drop", "capacity"), f" {CAPACITY:g}")
        where = f"EP {params.ep}, {params.tokens_per_rank:,} tokens a rank"
        return f"{params.source}, {what}, {where}, {params.policy}{extra.get(params.policy, '')}"

    def text(self) -> str:
        return f"{self.words}\n{table(self._rows())}"

    def csv(self) -> str:
        _, found, worst = self.shown
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["quantity", "rank", "value", "of"])
        for name in ("sent_R", "rows_R", "exchange_zeros_R", "expert_zeros_R", "dropped_R"):
            for rank, rows in enumerate(getattr(found, name)):
                writer.writerow([name.removesuffix("_R"), rank, rows, self.words])
        for name in ("exchange_overhead", "expert_overhead", "straggler_factor"):
            writer.writerow([name, "", f"{getattr(found, name):.6g}", self.words])
        writer.writerow(["worst_overhead_of_even_splits", "", f"{worst:.6g}", self.words])
        return out.getvalue()

    def png(self) -> bytes:
        return bytes(self.image.value)
