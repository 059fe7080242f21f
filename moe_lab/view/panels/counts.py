"""The panel for counts: load by expert and layer over the steps and ranks of a run, where no ids were kept."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import lru_cache
from html import escape

import ipywidgets as widgets
import numpy as np

from moe_lab.study.counts import CountsTrace
from moe_lab.study.history import count_imbalance, trajectories
from moe_lab.study.windows import WindowLoads, ratio
from moe_lab.view import history, plots, theme
from moe_lab.view.history import OverSteps
from moe_lab.view.panels.base import Panel, control
from moe_lab.view.panels.routing_forms import METRICS
from moe_lab.view.pictures import HeatPicture, LoadPicture
from moe_lab.view.text import table

ALL_STEPS, ALL_RANKS = "all steps", "all ranks"


@dataclass(frozen=True, eq=False)
class View:
    """Loads of every layer over the chosen steps of the chosen ranks, and max/mean over all steps."""

    loads: WindowLoads
    over: OverSteps


@lru_cache(maxsize=64)
def compute(counts: CountsTrace, top_k: int, step: int | None, rank: int | None) -> View:
    """Measure counts; None is all steps, each a window, and all ranks together. Counts are compared by identity.

    Raises `ValueError` where chance is not known: steps or layers that differ in assignments.
    """
    part = counts.select(step=step, rank=rank)
    loads = tuple(load for load in count_imbalance(part, top_k).loads if load.domain == ALL_RANKS)
    counts_SLE = part.counts_SLRE.sum(dim=2).double().numpy()
    low_LE, high_LE = np.quantile(counts_SLE / counts_SLE.mean(axis=2, keepdims=True), (0.05, 0.95), axis=0)
    over = history.load_over_steps(trajectories(counts.select(rank=rank)))
    name = ALL_RANKS if rank is None else f"rank {rank}"
    return View(WindowLoads(tuple(load._replace(domain=name) for load in loads), low_LE, high_LE), over)


class CountsPanel(Panel):
    """Look at tokens by expert that a run counted, by step, layer and rank.

    Chance needs tokens: assignments over `top_k`, which counts do not hold and the control says. What needs ids
    (other routers, text, pairs) cannot be had from counts.
    """

    def __init__(self, counts: CountsTrace, top_k: int, *, name: str = "counts") -> None:
        self.counts, self.name = counts, name
        self.layer = control(widgets.SelectionSlider, "layer", "180px", options=counts.layers, value=counts.layers[0])
        steps = [(ALL_STEPS, None), *((f"step {step:,}", step) for step in counts.steps)]
        self.step = control(widgets.Dropdown, "", "130px", options=steps)
        ranks = [(ALL_RANKS, None), *((f"rank {rank}", rank) for rank in counts.ranks)]
        self.rank = control(widgets.Dropdown, "", "120px", options=ranks)
        self.top_k = control(widgets.BoundedIntText, "K", "80px", value=top_k, min=1, max=counts.num_experts)
        self.load_image, self.heat_image, self.over_image = (widgets.Image(format="png") for _ in range(3))
        controls = [self.layer, self.step, self.rank, self.top_k]
        super().__init__([controls], [self.load_image, self.heat_image, self.over_image])
        mean_LE = counts.counts_LE.double().mean(dim=1, keepdim=True).clamp(min=1e-9)
        highest = float((counts.counts_LE / mean_LE).max())
        self._load_picture = LoadPicture(counts.num_experts, min(plots.ceiling_for(highest), 8))
        self._heat_picture = HeatPicture(counts.layers, counts.num_experts)
        self._over: OverSteps | None = None
        self.offer_files("counts")
        self.watch(controls, self.refresh)
        self.refresh()

    def _update(self) -> None:
        self.view = compute(self.counts, self.top_k.value, self.step.value, self.rank.value)
        row = self.view.loads.layers.index(self.layer.value)
        self.load = self.view.loads.loads[row]
        spread = self.view.loads.low_LE[row], self.view.loads.high_LE[row]
        self.load_image.value = self._load_picture.update(self.load, spread=spread).png()
        self.heat_image.value = self._heat_picture.update(self.view.loads.loads, self.layer.value).png()
        if self.view.over is not self._over:
            self.over_image.value = theme.png(history.lines(self.view.over, size=theme.PICTURE))
            self._over = self.view.over
        cells = []
        for field in ("max_over_mean", "cv", "dead_experts"):
            name, form = METRICS[field]
            value, low, high = (
                getattr(of, field) for of in (self.load.metrics, self.load.null.low, self.load.null.high)
            )
            cells.append(
                f"{name} <b>{form.format(value)}</b> <small>(chance {form.format(low)}–{form.format(high)})</small>"
            )
        self.numbers.value = " &ensp;|&ensp; ".join(["&emsp;".join(cells), escape(self.words)])

    @property
    def words(self) -> str:
        """What all numbers are of."""
        load = self.load
        steps = ALL_STEPS if self.step.value is None else f"step {self.step.value:,}"
        windows = f"{load.tokens:,} tokens x {load.windows:,} step{'s' * (load.windows != 1)}"
        return f"{self.name}, {windows} ({steps}), layer {load.layer}, {load.domain}, K {self.top_k.value}"

    def text(self) -> str:
        rows = [["", "value", "chance", "95 % of chance"]]
        for field, (name, form) in METRICS.items():
            of = (self.load.metrics, self.load.null.mean, self.load.null.low, self.load.null.high)
            value, mean, low, high = (form.format(getattr(metrics, field)) for metrics in of)
            rows.append([name, value, mean, f"{low} - {high}"])
        ratio_E = ratio(self.load)
        busiest = ", ".join(f"{e} ({ratio_E[e]:.2f})" for e in np.argsort(-ratio_E, kind="stable")[:4])
        return f"{self.words}\n{table(rows)}\nbusiest (load / mean): {busiest}\n{self.view.over}"

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["quantity", "layer", "expert", "step", "value", "of"])
        for field, value in self.load.metrics._asdict().items():
            writer.writerow([field, self.load.layer, "", "", f"{value:.6g}", self.words])
        for of_layer in self.view.loads.loads:
            for expert, value in enumerate(ratio(of_layer)):
                writer.writerow(["load_over_mean", of_layer.layer, expert, "", f"{value:.6g}", self.words])
        for step, row in zip(self.view.over.steps, self.view.over.values_SL.tolist()):
            for layer, value in zip(self.view.over.layers, row):
                writer.writerow(["max_over_mean", layer, "", step, f"{value:.6g}", self.load.domain])
        return out.getvalue()

    def png(self) -> bytes:
        images = (self.load_image, self.heat_image, self.over_image)
        return theme.side_by_side([bytes(image.value) for image in images])
