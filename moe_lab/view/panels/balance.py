"""The balance panel: one method at one strength on the recorded logits of one layer, load over its steps, open-loop."""

from __future__ import annotations

import csv
import io
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
from matplotlib.patches import Rectangle

from moe_lab import data
from moe_lab.study.balancing import METHODS, method
from moe_lab.study.counterfactual import Outcome, Setup, learn, outcome
from moe_lab.study.metrics import NullBand, null_band
from moe_lab.study.trace import RoutingTrace
from moe_lab.view import theme
from moe_lab.view.balancing import steps_load
from moe_lab.view.panels.base import Panel, control
from moe_lab.view.panels.sources import fit_layers, named_trace
from moe_lab.view.pictures import LoadPicture, heading, inset
from moe_lab.view.text import table
from moe_lab.view.theme import CHANCE, LESS, MUTED

TRACES = ("balanced", "unbalanced")
SHOWN = tuple(name for name in METHODS if name != "jitter")  # which needs what the router reads
USUAL = {method.coefficient for method in METHODS.values() if method.coefficient is not None}
STRENGTHS = sorted({float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 2, 5)} | USUAL)
SETUP = Setup(ep=2, tokens_per_rank=512, steps=24)
CEILING = 6
SIZE = (440, 240)


class Params(NamedTuple):
    """Everything the panel shows follows from this; `coefficient` is None for methods without one."""

    source: str
    trace: RoutingTrace
    method: str
    coefficient: float | None
    layer: int


class Result(NamedTuple):
    """Load over steps and after them, of the method and of none; `null` is of one step."""

    steps_S: np.ndarray
    free_S: np.ndarray
    outcome: Outcome
    free: Outcome
    null: NullBand


@lru_cache(maxsize=256)
def compute(params: Params) -> Result:
    """Let the method act on the layer's logits. `ValueError` as `study.counterfactual` raises."""
    trace, given = params.trace, {"setup": SETUP, "layer": params.layer}
    made = outcome(trace, params.method, params.coefficient, **given)
    steps = steps_load(learn(trace, params.method, params.coefficient, **given))
    free = steps_load(learn(trace, "none", None, **given))
    null = null_band(SETUP.tokens, trace.top_k, trace.num_experts)
    return Result(steps, free, made, outcome(trace, "none", None, **given), null)


class StepsPicture(theme.Live):
    """Max/mean over steps: the method, and nothing done, over the band of chance."""

    def __init__(self) -> None:
        with theme.style():
            drawn = theme.figure(*SIZE)
            axes = inset(drawn, left=36, right=10, bottom=36, top=44)
            self._note = heading(axes, "Load over steps")
            axes.set(xlim=(-0.5, SETUP.steps - 0.5), ylim=(1, CEILING), ylabel="max / mean", xlabel="step")
            axes.grid(axis="y")
            self._band = Rectangle((-1, 0), SETUP.steps + 1, 0, color=CHANCE, lw=0)
            axes.add_patch(self._band)
            (self._free,) = axes.plot([], [], color=MUTED, lw=1, ls=(0, (3, 1)), label="none")
            (self._made,) = axes.plot([], [], color=LESS, lw=1.4, marker="o", ms=3, label="method")
            axes.legend(handles=[self._made, self._free, Rectangle((0, 0), 1, 1, color=CHANCE, label="95 % of chance")],
                        loc="upper right", ncols=3, fontsize=7)  # fmt: skip
        super().__init__(drawn, [self._band, self._free, self._made, self._note])

    def update(self, shown: Result, note: str) -> StepsPicture:
        """Show another method; what is above the ceiling is drawn at it."""
        low, high = shown.null.low.max_over_mean, shown.null.high.max_over_mean
        self._band.set(y=low, height=high - low)
        for line, values in ((self._free, shown.free_S), (self._made, shown.steps_S)):
            line.set_data(range(len(values)), np.minimum(values, CEILING))
        self._note.set_text(note)
        return self


class BalancePanel(Panel):
    """Steer one method of balancing on recorded logits. The later layers of the model never see what it does.

    `source` is the name of a shipped trace, a trace, or the path of one (`named_trace`).
    """

    def __init__(self, source: str | Path | RoutingTrace = "unbalanced") -> None:
        self._traces: dict[str, RoutingTrace | None] = dict.fromkeys(TRACES)  # opened when chosen
        name, self._traces[name] = named_trace(source)
        self.source = control(widgets.Dropdown, "source", "190px", options=list(self._traces), value=name)
        self.method = control(widgets.Dropdown, "method", "250px", options=SHOWN, value="bias")
        strengths = [(f"{strength:g}", strength) for strength in STRENGTHS]  # a browser rounds to what a slider has
        self.coefficient = control(widgets.SelectionSlider, "coefficient", "310px", options=strengths, value=1e-3)
        self.layer = control(widgets.IntSlider, "layer", "170px", min=0, max=5, value=3)
        self.images = [widgets.Image(format="png", layout={"max_width": f"{SIZE[0]}px"}) for _ in range(2)]
        super().__init__([[self.source, self.method, self.coefficient, self.layer]], self.images)
        self._steps = StepsPicture()
        self.offer_files("balance")
        self.watch([self.source], self._open)
        self.watch([self.method], self._chosen)
        self.watch([self.coefficient, self.layer], self.refresh)
        self._open()

    def _open(self) -> None:
        """Fit layers and pictures to the source."""
        name = self.source.value
        self._trace = self._traces[name] = self._traces[name] or data.open(name)
        self._load = LoadPicture(self._trace.num_experts, CEILING, size=SIZE)
        with self.hold():
            fit_layers(self.layer, self._trace)
        self.refresh()

    def _chosen(self) -> None:
        usual = method(self.method.value).coefficient
        with self.hold():
            self.coefficient.disabled = usual is None
            if usual is not None:
                self.coefficient.value = usual
        self.refresh()

    def params(self) -> Params:
        """What the controls say."""
        usual = method(self.method.value).coefficient
        given = None if usual is None else self.coefficient.value
        return Params(self.source.value, self._trace, self.method.value, given, self.layer.value)

    def _update(self) -> None:
        params = self.params()
        self.shown = (params, compute(params))
        shown = self.shown[1]
        self._steps.update(shown, f"layer {params.layer} · {SETUP.tokens:,} tokens a step · open-loop")
        self._load.update(shown.outcome.load, baseline=shown.free.load)
        for image, picture in zip(self.images, (self._steps, self._load), strict=True):
            image.value = picture.png()
        self.numbers.value = escape(self.words) + f"<pre>{table(self._rows())}</pre>"

    @property
    def words(self) -> str:
        """What all numbers are of."""
        params = self.shown[0]
        strength = "" if params.coefficient is None else f" {params.coefficient:.3g}"
        where = f"layer {params.layer}, EP {SETUP.ep}, {SETUP.tokens_per_rank} tokens a rank, {SETUP.steps} steps"
        return f"{params.source}, {params.method}{strength}, {where}, open-loop"

    def _rows(self) -> list[tuple[str, ...]]:
        shown = self.shown[1]
        both = (shown.outcome, shown.free)
        chance = both[0].load.null
        return [
            ("", "method", "none"),
            ("max/mean, first step", f"{shown.steps_S[0]:.2f}", f"{shown.free_S[0]:.2f}"),
            ("max/mean, last step", f"{shown.steps_S[-1]:.2f}", f"{shown.free_S[-1]:.2f}"),
            ("max/mean, mean of steps after", *(f"{one.load.metrics.max_over_mean:.2f}" for one in both)),
            (f"(chance {chance.mean.max_over_mean:.2f}, 95 % to {chance.high.max_over_mean:.2f})", "", ""),
            ("dropped, %", *(f"{100 * one.dropped:.1f}" for one in both)),
            ("tokens without expert, %", *(f"{100 * one.unserved:.1f}" for one in both)),
            ("assignments moved, %", *(f"{100 * one.rerouted:.1f}" for one in both)),
            ("gates lost, %", *(f"{100 * one.gate_lost:.1f}" for one in both)),
            ("straggler factor", *(f"{one.straggler_factor:.2f}" for one in both)),
            ("zero rows of even splits, %", *(f"{100 * one.padding:.0f}" for one in both)),
        ]

    def text(self) -> str:
        return f"{self.words}\n{table(self._rows())}"

    def csv(self) -> str:
        shown, out = self.shown[1], io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["quantity", "place", "method", "none", "of"])
        for step, values in enumerate(zip(shown.steps_S, shown.free_S, strict=True)):
            writer.writerow(["max_over_mean_at_step", step, *(f"{v:.6g}" for v in values), self.words])
        shares = zip(shown.outcome.load.shares_E.tolist(), shown.free.load.shares_E.tolist(), strict=True)
        for expert, values in enumerate(shares):
            writer.writerow(["share_of_expert", expert, *(f"{v:.6g}" for v in values), self.words])
        for name in ("dropped", "unserved", "rerouted", "gate_lost", "straggler_factor", "padding"):
            both = (getattr(one, name) for one in (shown.outcome, shown.free))
            writer.writerow([name, "", *(f"{v:.6g}" for v in both), self.words])
        return out.getvalue()

    def png(self) -> bytes:
        return theme.side_by_side([bytes(image.value) for image in self.images])
