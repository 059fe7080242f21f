"""The exchange panel: who sends how much to whom, from plans alone; and the same on real ranks, at a press."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from moe_lab.config import EqualSplit
from moe_lab.jobs.exchange_runs import exchange_ids
from moe_lab.parallel.ranks import RankError, RankPool
from moe_lab.study.load import ALL_DOMAINS
from moe_lab.study.trace import RoutingTrace
from moe_lab.view import theme
from moe_lab.view.exchanging import MatrixText
from moe_lab.view.panels.base import RunPanel, control
from moe_lab.view.panels.exchange_compute import (
    BLOCKWISE,
    REPLICAS,
    SHUFFLED,
    SORTED,
    MatrixPicture,
    Params,
    ReceivedPicture,
    View,
    compute,
)
from moe_lab.view.panels.sources import named_trace

PLANS: tuple[EqualSplit, ...] = ("off", "adaptive", "force")
MOST_RANKS, RUNS, DIM = 8, 10, 256


class ExchangePanel(RunPanel):
    """Steer one exchange of a recorded trace over EP ranks; run it on real ones.

    `source` is the name of a shipped trace, a trace, or the path of one (`named_trace`).
    `function` is what real ranks run (`moe_lab.jobs.exchange_runs.exchange_ids`).
    """

    def __init__(
        self, source: str | Path | RoutingTrace = "balanced_wide", *, function: Callable[..., Any] = exchange_ids
    ) -> None:
        (self._source, self.trace), self._function = named_trace(source), function
        experts = self.trace.num_experts
        eps = [ep for ep in (2, 4, 8, 16, 32, 64) if experts % ep == 0]
        self.ep = control(widgets.SelectionSlider, "EP", "170px", options=eps, value=4)
        layers = self.trace.info.layers
        self.layer = control(widgets.IntSlider, "layer", "180px", min=min(layers), max=max(layers), value=layers[0])
        self.domain = control(widgets.Dropdown, "domain", "155px", options=[ALL_DOMAINS, *self.trace.domains])
        sizes = [32, 64, 128, 256, 512, 1024]
        self.tokens = control(widgets.SelectionSlider, "tokens a rank", "220px", options=sizes, value=256)
        self.equal_split = control(widgets.Dropdown, "equal splits", "165px", options=PLANS)
        self.packing = control(widgets.Dropdown, "packing", "270px", options=[SHUFFLED, SORTED])
        self.placing = control(widgets.Dropdown, "placement", "235px", options=[BLOCKWISE, REPLICAS])
        self.heat_image, self.bar_image = (widgets.Image(format="png") for _ in range(2))
        self._pictures_by_ep: dict[int, tuple[MatrixPicture, ReceivedPicture]] = {}
        where = [self.ep, self.layer, self.domain, self.tokens]
        how = [self.equal_split, self.packing, self.placing]
        super().__init__([where, how], [self.heat_image, self.bar_image])
        self.offer_files("exchange")
        run = "the same rows over gloo, counted on the way"
        self.offer_run("run on real ranks", run, "kill the ranks, even in a hung exchange", RUNS)
        self.watch([*where, *how], self.refresh)
        self.refresh()

    def params(self) -> Params:
        """What the controls say."""
        return Params(
            trace=self.trace,
            ep=self.ep.value,
            layer=self.layer.value,
            domain=self.domain.value,
            tokens=self.tokens.value,
            equal_split=self.equal_split.value,
            packing=self.packing.value,
            placing=self.placing.value,
        )

    def _update(self) -> None:
        params = self.params()
        self.shown = compute(params)
        if params.ep not in self._pictures_by_ep:
            self._pictures_by_ep[params.ep] = MatrixPicture(params.ep), ReceivedPicture(params.ep)
        matrix, bars = self._pictures_by_ep[params.ep]
        self.heat_image.value = matrix.update(self.shown.counts, f"layer {params.layer} · {params.domain}").png()
        self.bar_image.value = bars.update(self._received(), self.shown.zeros_R).png()
        self.numbers.value = f"{escape(self._line())}<br>{escape(self.shown.splits.reason)}"
        if not self.running:
            self.tell("")

    def _received(self) -> list[int]:
        return self.shown.counts.splits_RR.sum(dim=0).tolist()

    def _line(self) -> str:
        params, rows_R, zeros = self.params(), self._received(), sum(self.shown.zeros_R)
        of = f"{self._source} · {params.ep} ranks x {params.tokens:,} tokens · layer {params.layer} · {params.domain}"
        return (
            f"{of} · {params.packing} · {params.placing} · straggler {max(rows_R) * params.ep / sum(rows_R):.2f} · "
            f"{sum(rows_R):,} rows sent, {zeros:,} zeros"
        )

    # real ranks

    def run(self) -> None:
        """Start real ranks on what is shown, in a thread; `cancel` ends it. One run at a time."""
        if self.ep.value > MOST_RANKS:
            self.tell(f"real ranks: at most {MOST_RANKS} here, EP is {self.ep.value}")
        else:
            super().run()

    def _job(self) -> Callable[[], None]:
        params = self.params()
        return partial(self._on_ranks, params, compute(params))

    def _on_ranks(self, params: Params, view: View) -> None:
        if self.pool is None or self.pool.size != params.ep:
            if self.pool is not None:
                self.pool.close()
            self.pool = RankPool(params.ep, backend="gloo")
        ids, ms = [ids_TK.numpy() for ids_TK in view.ids], []
        for turn in range(RUNS):
            if self.stopped:
                raise RankError("cancelled between two exchanges")
            ranks = self.pool.run(self._function, ids, view.placement, params.equal_split, DIM)
            ms.append(1e3 * max(rank["seconds"] for rank in ranks))
            self.progress.value = turn + 1
        counted = [rank["sent"][0][0] for rank in ranks]
        even = [getattr(view.splits, "size", 0)] * params.ep
        planned = [view.splits.send(rank) or even for rank in range(params.ep)]
        same = "as planned" if counted == planned else "NOT as planned"
        sent = sum(sum(rows) * width for rank in ranks for rows, width in rank["sent"])
        times = f"{sent / 1e6:.1f} MB both ways, {sorted(ms)[RUNS // 2]:.1f} ms"
        self.tell(f"{params.ep} gloo ranks: rows {same}, {times}")

    # forms

    def text(self) -> str:
        """The line of numbers and the matrix; above 8 ranks only what each receives."""
        if self.ep.value <= 8:
            return f"{self._line()}\n{MatrixText(self.shown.counts, self.shown.splits).text()}"
        return f"{self._line()}\nreceived {' '.join(map(str, self._received()))}\n{self.shown.splits.reason}"

    def csv(self) -> str:
        """Rows from rank to rank."""
        lines = [",".join(map(str, sent)) for sent in self.shown.counts.splits_RR.tolist()]
        return "\n".join([",".join(f"to {rank}" for rank in range(self.ep.value)), *lines]) + "\n"

    def png(self) -> bytes:
        """Both pictures."""
        return theme.side_by_side([bytes(self.heat_image.value), bytes(self.bar_image.value)])
