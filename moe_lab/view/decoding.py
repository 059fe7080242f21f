"""Few tokens drawn: how many times reading the used experts' weights once a forward takes, by number of tokens."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from moe_lab.study.measurements import Measurements
from moe_lab.view import theme
from moe_lab.view.pictures import inset
from moe_lab.view.theme import INK, MUTED, SERIES, WIDTH

HEIGHT = 290
LINES = {"eager": ":", "graph": "-"}
NAMES = {"eager": "launched by the host", "graph": "replayed from a graph"}
TICKS = (1, 2, 5, 10, 20)


def bounds_by_tokens(table: Measurements, what: str) -> Figure:
    """A picture a layer, a line an arm and mode of `jobs.decode_bench`: 1 is the bound, shades are intervals."""
    rows = [row for row in table.rows if row.bytes_ms is not None]
    colours = dict(zip(dict.fromkeys(row.arm for row in rows), SERIES))
    layers = list(dict.fromkeys(row.layer for row in rows))
    with theme.style():
        drawn = theme.figure(WIDTH, HEIGHT)
        drawn.text(14 / WIDTH, 1 - 20 / HEIGHT, f"Forward over reading the used experts' weights: {what}", size=9)
        width = (WIDTH - 56) // len(layers)
        for i, layer in enumerate(layers):
            axes = inset(drawn, left=50 + i * width, right=WIDTH - 34 - (i + 1) * width, bottom=44, top=92)
            first = next(row for row in rows if row.layer == layer)
            shape = f"D {first.dim:,}, F {first.hidden_dim:,}, E {first.num_experts}, K {first.top_k}"
            axes.set_title(f"{layer}\n{shape}", size=7.5, pad=6)
            for arm, colour in colours.items():
                for mode, line in LINES.items():
                    mine = [row for row in rows if (row.layer, row.arm, row.mode) == (layer, arm, mode)]
                    xs, ms, low, high = ([getattr(r, f) for r in mine] for f in ("tokens", "median", "low", "high"))
                    over = [row.bytes_ms or 1.0 for row in mine]
                    axes.fill_between(xs, _ratios(low, over), _ratios(high, over), color=colour, alpha=0.15, lw=0)
                    axes.plot(xs, _ratios(ms, over), line, color=colour, lw=1.3)
            _scales(axes, first_of_line=i == 0)
        for arm, colour in colours.items():
            axes.plot([], [], color=colour, label=arm)
        for mode, line in LINES.items():
            axes.plot([], [], line, color=INK, label=NAMES[mode])
        at = (10 / WIDTH, 1 - 28 / HEIGHT)
        drawn.legend(loc="upper left", bbox_to_anchor=at, ncols=len(colours) + len(LINES), fontsize=7.5)
    return drawn


def _ratios(values: list[float], bounds: list[float]) -> list[float]:
    return [value / bound for value, bound in zip(values, bounds)]


def _scales(axes: Axes, *, first_of_line: bool) -> None:
    axes.axhline(1, color=MUTED, lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log", ylim=(0.9, 30), xlabel="tokens")
    axes.xaxis.set_major_locator(FixedLocator([1, 16, 256, 4096]))
    axes.yaxis.set_major_locator(FixedLocator(TICKS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(labelleft=first_of_line)
    if first_of_line:
        axes.set_ylabel("times the bound")
