"""The two pictures that sliders move: load by expert, and load by layer and expert.

Their axes are fixed when they are made; an update changes only what moves, and `png()` redraws only that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moe_lab.study.load import Load
from moe_lab.study.windows import ratio
from moe_lab.view import theme
from moe_lab.view.text import window_of
from moe_lab.view.theme import CHANCE, INK, LESS, MORE, MUTED, PICTURE, WITHIN, Pixels

Ratios = Float[NDArray[np.float64], " E"]


class LoadPicture(theme.Live):
    """Load by expert: bars against the band of chance, thin lines over the middle 90 % of windows.

    Bars above `ceiling` are cut there and marked with a triangle; the busiest expert is named with its value.
    """

    def __init__(self, num_experts: int, ceiling: int = 4, *, size: tuple[int, int] = PICTURE) -> None:
        self.num_experts, self.ceiling = num_experts, ceiling
        with theme.style():
            drawn = theme.figure(*size)
            axes = inset(drawn, left=34, right=8, bottom=34, top=40)
            note = heading(axes, "Load by expert")
            axes.set(xlim=(-0.7, num_experts - 0.3), ylim=(0, ceiling))
            expert_axis(axes)
            axes.set_ylabel("load / mean", labelpad=2)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            self._band = Rectangle((-1, 0), num_experts + 1, 0, color=CHANCE, lw=0, zorder=1)
            axes.add_patch(self._band)
            self._bars = PolyCollection([], linewidths=0, zorder=2)
            axes.add_collection(self._bars, autolim=False)
            mean = axes.axhline(1, color=INK, lw=0.8, zorder=3)
            self._range = LineCollection([], colors=INK, lw=0.7, zorder=4)
            axes.add_collection(self._range, autolim=False)
            (self._baseline,) = axes.plot([], [], color=INK, lw=1, ls=(0, (3, 1)), zorder=5)
            (self._over,) = axes.plot([], [], ls="", marker="^", ms=4, color=MORE, zorder=6, clip_on=False)
            self._top = axes.text(0, 0, "", size=7.5, weight="bold", zorder=7, ha="center", va="bottom")
            _key(axes, ("chance", "windows") if size[0] < 600 else ("95 % of chance", "90 % of windows"))
        self._note = note
        moving = [self._band, self._bars, mean, self._range, self._baseline, self._over, self._top, note]
        super().__init__(drawn, moving)

    def update(
        self, result: Load, *, spread: tuple[Ratios, Ratios] | None = None, baseline: Load | None = None
    ) -> LoadPicture:
        """Show another load of as many experts; `spread` is the middle 90 % of windows."""
        ratio_E, expert_E = ratio(result), np.arange(self.num_experts)
        low, high = result.null.share_low * self.num_experts, result.null.share_high * self.num_experts
        self._band.set(y=low, height=high - low)
        self._bars.set_verts(list(_bars(ratio_E)))
        self._bars.set_facecolor(colours(ratio_E, low, high))
        ends = np.empty((0, 2)) if spread is None or result.windows == 1 else np.stack(spread, axis=1)
        self._range.set_segments([((e, a), (e, b)) for e, (a, b) in zip(expert_E, ends, strict=False)])
        outlined = baseline is not None and len(baseline.shares_E) == self.num_experts
        self._baseline.set_visible(outlined)
        if baseline is not None and outlined:
            self._baseline.set_data(*_outline(ratio(baseline)))
        over_E = ratio_E > self.ceiling
        self._over.set_data(expert_E[over_E], np.full(over_E.sum(), self.ceiling))
        self._name_top(ratio_E, ratio_E if spread is None else spread[1], high)
        self._note.set_text(f"layer {result.layer} · {window_of(result)}")
        return self

    def _name_top(self, ratio_E: Ratios, reach_E: Ratios, high: float) -> None:
        top, edge = int(ratio_E.argmax()), 0.07 * self.num_experts
        self._top.set(
            text=f"{top}: {ratio_E[top]:.2f}",
            x=min(max(top, edge), self.num_experts - 1 - edge),
            y=min(max(ratio_E[top], reach_E[top]) + 0.03 * self.ceiling, 0.94 * self.ceiling),
            color=MORE if ratio_E[top] > high else MUTED,
        )


class HeatPicture(theme.Live):
    """Layer x expert: load / mean as colour; one layer framed, experts without load crossed."""

    def __init__(self, layers: Sequence[int], num_experts: int, *, size: tuple[int, int] = PICTURE) -> None:
        self.layers = tuple(layers)
        with theme.style():
            drawn = theme.figure(*size)
            axes = inset(drawn, left=34, right=44, bottom=34, top=40)
            self._note = heading(axes, "Load / mean by layer")
            self._image = ratio_image(axes, np.ones((len(layers), num_experts)))
            expert_axis(axes)
            layer_axis(axes, layers)
            ratio_bar(inset(drawn, left=size[0] - 36, right=28, bottom=34, top=40))
            (self._dead,) = axes.plot([], [], ls="", marker="x", ms=3, mew=0.8, color="white", zorder=2)
            self._frame = Rectangle((-0.5, -0.5), num_experts, 1, fill=False, ec=INK, lw=1.4, zorder=3, clip_on=False)
            axes.add_patch(self._frame)
        super().__init__(drawn, [self._image, self._dead, self._frame, self._note])

    def update(self, loads: Sequence[Load], layer: int | None = None) -> HeatPicture:
        """Show other loads, one for each layer; frame `layer`, or none."""
        ratio_LE = np.stack([ratio(load) for load in loads])
        self._image.set_data(theme.log_ratio(ratio_LE))
        dead_L, dead_E = np.nonzero(ratio_LE == 0)
        self._dead.set_data(dead_E, dead_L)
        self._frame.set_visible(layer is not None)
        if layer is not None:
            self._frame.set_y(self.layers.index(layer) - 0.5)
        self._note.set_text(window_of(loads[0]))
        return self


# pieces shared with the other figures


def inset(drawn: Figure, *, left: Pixels, right: Pixels, bottom: Pixels, top: Pixels) -> Axes:
    """Axes with margins in CSS pixels."""
    width, height = drawn.get_size_inches() * theme.DPI
    box = (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    return drawn.add_axes(box)


def heading(axes: Axes, title: str, note: str = "") -> Text:
    """A title, and below it a muted line that says what the numbers are of; returns that line."""
    axes.set_title(title, pad=16)
    return axes.annotate(
        note, (0, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points", color=MUTED, fontsize=7.5
    )


def expert_axis(axes: Axes) -> None:
    """The x axis of experts."""
    axes.set_xlabel("expert", labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 4, 8, 10]))


def rank_axis(axes: Axes, ep: int) -> None:
    """The x axis of ranks; at most eight are named."""
    axes.set_xlabel("rank", labelpad=2)
    axes.set_xlim(-0.6, ep - 0.4)
    axes.set_xticks(range(0, ep, -(-ep // 8)))


def layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """The y axis of layers, the first at the bottom; at most a dozen are named."""
    named = range(0, len(layers), -(-len(layers) // 12))
    axes.set_yticks(list(named), [str(layers[i]) for i in named])
    axes.set_ylabel("layer", labelpad=2)


def ratio_image(axes: Axes, ratio_NE: np.ndarray) -> AxesImage:
    """Load / mean as colour, 1 in the middle; rows from the bottom."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return axes.imshow(
        theme.log_ratio(ratio_NE),
        cmap=theme.RATIO_MAP,
        vmin=-2,
        vmax=2,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )


def ratio_bar(axes: Axes) -> None:
    """The scale of `ratio_image`."""
    mapped = ScalarMappable(Normalize(-2, 2), theme.RATIO_MAP)
    bar = axes.figure.colorbar(mapped, cax=axes, ticks=list(theme.RATIO_TICKS))
    bar.outline.set_visible(False)
    axes.set_yticklabels(theme.RATIO_TICKS.values())
    axes.tick_params(length=2, pad=2)


def _key(axes: Axes, names: tuple[str, str]) -> None:
    """What grey, a thin line and a dashed outline are, to the right of the title."""
    marks = [
        Patch(color=CHANCE, label=names[0]),
        Line2D([], [], ls="", marker="|", ms=7, color=INK, label=names[1]),
        Line2D([], [], color=INK, lw=1, ls=(0, (3, 1)), label="baseline"),
    ]
    spacing: dict[str, Any] = {"handletextpad": 0.3, "columnspacing": 0.9, "handlelength": 1.3, "borderaxespad": 0}
    above = 1 + 17 / (axes.get_window_extent().height / axes.figure.dpi * theme.DPI)
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, above)}
    axes.legend(handles=marks, ncols=3, fontsize=6.5, labelcolor=MUTED, **place, **spacing)


def colours(ratio_E: np.ndarray, low: float, high: float) -> list[str]:
    """More than chance, less, or within its band."""
    return [MORE if ratio > high else LESS if ratio < low else WITHIN for ratio in ratio_E]


def _bars(ratio_E: Ratios) -> np.ndarray:
    left, right = np.arange(len(ratio_E)) - 0.38, np.arange(len(ratio_E)) + 0.38
    zero = np.zeros_like(ratio_E)
    return np.stack([np.stack([left, left, right, right], 1), np.stack([zero, ratio_E, ratio_E, zero], 1)], axis=2)


def box(place: int, low: float, high: float) -> list[tuple[float, float]]:
    """The corners of one bar of a `PolyCollection`."""
    return [(place - 0.4, low), (place + 0.4, low), (place + 0.4, high), (place - 0.4, high)]


def _outline(ratio_E: Ratios) -> tuple[np.ndarray, np.ndarray]:
    edge = np.arange(len(ratio_E) + 1) - 0.5
    return np.repeat(edge, 2)[1:-1], np.repeat(ratio_E, 2)
