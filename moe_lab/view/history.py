"""Routing over steps: how load moves, how many choices change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.study.history import Trajectories
from moe_lab.study.load import LABELS
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import MUTED, SERIES, WIDTH


@dataclass(frozen=True, eq=False, repr=False)
class OverSteps(Text):
    """One number of every layer over steps, NaN where there is none."""

    name: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    values_SL: Float[Tensor, "S L"]

    def text(self) -> str:
        """At most six steps, evenly picked, first and last among them."""
        picked = np.unique(np.linspace(0, len(self.steps) - 1, min(6, len(self.steps))).round().astype(int))
        rows = [[self.name, *(f"layer {layer}" for layer in self.layers)]]
        for i in picked:
            rows.append([f"step {self.steps[i]:,}", *(f"{value:.3f}" for value in self.values_SL[i].tolist())])
        return table(rows)


def load_over_steps(result: Trajectories, metric: str = "max_over_mean") -> OverSteps:
    """One metric of load, by its field's name in `LoadImbalance`."""
    return OverSteps(LABELS.get(metric, metric), result.steps, result.layers, result.metric(metric))


def churn_over_steps(steps: Sequence[int], layers: Sequence[int], churn_SL: Float[Tensor, "S L"]) -> OverSteps:
    """What `study.history.churn` gives for checkpoints of `steps`, one more of these than rows."""
    if len(steps) != len(churn_SL) + 1:
        raise ValueError(f"steps={tuple(steps)!r:.80} must name {len(churn_SL) + 1} checkpoints")
    return OverSteps("churn", tuple(steps[1:]), tuple(layers), churn_SL)


def lines(
    result: OverSteps,
    *,
    chance: float | None = None,
    title: str = "Load over steps",
    size: tuple[int, int] = (WIDTH, 260),
) -> Figure:
    """One line a layer, many from light to dark; chance dashed."""
    depth = len(result.layers)
    small = size[0] < 600
    with theme.style():
        drawn = theme.figure(*size)
        axes = inset(drawn, left=40 if small else 52, right=52 if small else 110, bottom=34 if small else 40, top=44)
        heading(axes, title, f"{result.name} by layer" + (" · dashed: chance" if chance is not None else ""))
        for i, layer in enumerate(result.layers):
            colour = SERIES[i] if depth <= len(SERIES) else theme.SHARE_MAP(0.25 + 0.75 * i / (depth - 1))
            values = result.values_SL[:, i].numpy()
            axes.plot(
                result.steps,
                values,
                color=colour,
                lw=1.2,
                marker="o",
                ms=3,
                label=str(layer) if small else f"layer {layer}",
            )
        if chance is not None:
            axes.axhline(chance, color=MUTED, lw=1, ls=(0, (4, 2)))
        axes.set_xlabel("step", color=MUTED, labelpad=2)
        axes.set_ylabel(result.name, labelpad=2)
        axes.grid(axis="y")
        if depth <= 12:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="layer" if small else None, handlelength=1)
    return drawn
