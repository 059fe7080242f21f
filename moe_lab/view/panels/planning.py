"""The panel of the planner: ranks, layout and tokens steered, what the fullest rank needs, and what fits."""

from __future__ import annotations

from functools import cache
from html import escape

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure

from moe_lab import data
from moe_lab.config import MoEConfig
from moe_lab.models.lm import SMALL, LMConfig
from moe_lab.study.planner import Footprint, Layout, beforehand, plan
from moe_lab.view import theme
from moe_lab.view.panels.base import Panel, control
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import table
from moe_lab.view.theme import INK, MORE, MUTED, SERIES

GIB = 2**30
TRACE = "p99.9 of the trace"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOADS = {"mean": 1.0, "1.25 x mean": 1.25, "1.5 x mean": 1.5, "2 x mean": 2.0}
TERMS = ("parameters", "gradients", "optimizer", "activations", "receive", "gathered")
MODELS = {
    "shipped, 11.5 M": SMALL,
    "24 layers of 10B_2B": LMConfig(
        num_layers=24, num_heads=16, max_length=2048, moe=MoEConfig.preset("10B_2B", load_balance_coeff=1e-3)
    ),
    "24 layers of olmoe_1b_7b": LMConfig(
        num_layers=24, num_heads=16, max_length=2048, moe=MoEConfig.preset("olmoe_1b_7b")
    ),
}


opened = cache(data.open)


@cache
def at_the_tail(
    source: str, config: LMConfig, layout: Layout, tokens: int, dtype: torch.dtype, checkpointing: bool
) -> Footprint:
    """Beforehand, from a shipped trace."""
    return beforehand(config, layout, tokens, opened(source), dtype=dtype, checkpointing=checkpointing)


class PlannerPanel(Panel):
    """What a training step needs on the fullest rank, by formula alone: nothing is allocated or run."""

    def __init__(self, source: str = "balanced") -> None:
        self._source = source
        self.model = control(widgets.Dropdown, "model", "240px", options=list(MODELS))
        powers = [2**n for n in range(11)]
        self.ranks = control(widgets.SelectionSlider, "ranks", "180px", options=powers, value=8)
        self.ep = control(widgets.SelectionSlider, "EP", "160px", options=powers, value=4)
        self.sp = control(widgets.SelectionSlider, "sp", "160px", options=powers[:5])
        self.sequences = control(widgets.SelectionSlider, "sequences a rank", "230px", options=powers[:8], value=4)
        self.load = control(widgets.Dropdown, "fullest rank", "240px", options=[TRACE, *LOADS])
        self.precision = control(widgets.Dropdown, "precision", "170px", options=list(DTYPES))
        self.recompute = control(widgets.Checkbox, "recompute", "100px", indent=False)
        self.limit = control(widgets.BoundedFloatText, "GiB a rank", "140px", min=0.01, max=1024, value=2.0)
        self.layout_image, self.token_image = (widgets.Image(format="png") for _ in range(2))
        controls = [self.model, self.ranks, self.ep, self.sp, self.sequences, self.load]
        controls += [self.precision, self.recompute, self.limit]
        super().__init__([controls], [self.layout_image, self.token_image])
        self.offer_files("plan")
        self.watch(controls, self.refresh)
        self.refresh()

    def footprint(self, ep: int, sequences: int) -> Footprint:
        """Of the controls, but for these. `ValueError` for what cannot be."""
        config, layout = MODELS[self.model.value], Layout(self.ranks.value, ep, self.sp.value)
        tokens = sequences * layout.positions(config)
        dtype, checkpointing = DTYPES[self.precision.value], self.recompute.value
        if self.load.value != TRACE:
            load = min(LOADS[self.load.value], float(ep))
            return plan(config, layout, tokens, load, dtype=dtype, checkpointing=checkpointing)
        return at_the_tail(self._source, config, layout, tokens, dtype, checkpointing)

    def _update(self) -> None:
        self.shown = self.footprint(self.ep.value, self.sequences.value)
        self.layout_image.value = theme.png(self._layouts())
        self.token_image.value = theme.png(self._tokens())
        self.numbers.value = f"<pre>{escape(self.text())}</pre>"

    def _possible(self, eps: list[int], sequences: list[int]) -> dict[tuple[int, int], Footprint]:
        found = {}
        for ep in eps:
            for number in sequences:
                try:
                    found[ep, number] = self.footprint(ep, number)
                except ValueError:
                    continue  # does not divide: no such layout
        return found

    def _layouts(self) -> Figure:
        """Every EP that the ranks and experts allow, term on term."""
        found = self._possible([ep for ep in self.ep.options if ep <= self.ranks.value], [self.sequences.value])
        with theme.style():
            drawn = theme.figure(470, 260)
            axes = inset(drawn, left=44, right=112, bottom=40, top=44)
            heading(axes, "The fullest rank by EP", "bars: terms · black: the most at once · dashed: what a rank has")
            bottom = [0.0] * len(found)
            for colour, term in zip(SERIES, TERMS, strict=False):
                sizes = [getattr(one, term) / GIB for one in found.values()]
                axes.bar(range(len(found)), sizes, 0.7, bottom=bottom, color=colour, label=term)
                bottom = [a + b for a, b in zip(bottom, sizes)]
            for at, one in enumerate(found.values()):
                axes.plot([at - 0.4, at + 0.4], [one.peak / GIB] * 2, color=INK, lw=1.5)
            axes.axhline(self.limit.value, color=MORE, lw=1, ls=(0, (3, 2)))
            chosen = [ep for ep, _ in found].index(self.ep.value)
            axes.plot([chosen], [self.shown.peak / GIB], marker="o", ms=8, mfc="none", color=INK)
            axes.set_xticks(range(len(found)), [str(ep) for ep, _ in found])
            axes.set(xlabel="EP", ylabel="GiB")
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return drawn

    def _tokens(self) -> Figure:
        """The most at once by sequences a rank, and where it no longer fits."""
        found = self._possible([self.ep.value], list(self.sequences.options))
        sequences = [number for _, number in found]
        peaks = [one.peak / GIB for one in found.values()]
        fits = [number for number, peak in zip(sequences, peaks) if peak <= self.limit.value]
        with theme.style():
            drawn = theme.figure(390, 260)
            axes = inset(drawn, left=64, right=12, bottom=40, top=44)
            heading(
                axes, "The most at once by sequences a rank", f"fits: up to {max(fits)}" if fits else "nothing fits"
            )
            axes.plot(sequences, peaks, color=INK, lw=1, marker="o", ms=4)
            axes.plot([self.sequences.value], [self.shown.peak / GIB], marker="o", ms=8, mfc="none", color=INK)
            axes.axhline(self.limit.value, color=MORE, lw=1, ls=(0, (3, 2)))
            axes.set(xscale="log", yscale="log", ylabel="GiB")
            axes.set_xticks(sequences, [str(number) for number in sequences])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
            axes.set_xlabel("sequences a rank", color=MUTED)
        return drawn

    # forms

    def text(self) -> str:
        """The plan, term by term, and whether it fits."""
        config, layout = MODELS[self.model.value], Layout(self.ranks.value, self.ep.value, self.sp.value)
        cut = f", sp {layout.sp}" if layout.sp > 1 else ""
        how = self.precision.value + (" · recompute" if self.recompute.value else "")
        fits = "fits" if self.shown.peak <= self.limit.value * GIB else "does not fit"
        rows = [[name, f"{size / GIB:.3f}"] for name, size in self.shown._asdict().items()]
        return (
            f"{self.model.value} · {layout.ranks} ranks, EP {layout.ep}{cut} · "
            f"{self.sequences.value} x {layout.positions(config):,} tokens a rank · {self.load.value} · "
            f"{how} · {fits} in {self.limit.value:g} GiB\n" + table([["", "GiB"], *rows])
        )

    def csv(self) -> str:
        """Bytes by term, in what precision and whether blocks run again."""
        how = f"{self.precision.value},{self.recompute.value}"
        lines = [f"{name},{size},{how}" for name, size in self.shown._asdict().items()]
        return "\n".join(["term,bytes,precision,recompute", *lines]) + "\n"

    def png(self) -> bytes:
        """The pictures side by side."""
        return theme.side_by_side([bytes(self.layout_image.value), bytes(self.token_image.value)])
