"""What shared experts hide of the exchange beside them, drawn from a recorded step or from profiler traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_lab.jobs.overlap import BESIDE_SHARED, exposed, unpack
from moe_lab.study.timeline import RankSteps, by_exchange
from moe_lab.study.timing import Timing, summarise
from moe_lab.view import theme
from moe_lab.view.exchanging import EXCHANGE_COLOUR, PHASE_COLOURS
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import table
from moe_lab.view.theme import CHANCE, LESS, MORE, MUTED, WIDTH

SIDES = {"off": ("at once", MORE, "s", -0.12), "on": ("overlapped", LESS, "o", 0.12)}


def overlap(off: Sequence[RankSteps], on: Sequence[RankSteps], what: str) -> Figure:
    """Combine, forward and backward, on every rank: waited for at once, and with shared experts computed meanwhile.

    A bar is an exchange from a rank's arrival to its end: grey is hidden behind the shared experts, the rest exposed.
    """
    with theme.style():
        drawn = theme.figure(WIDTH, 92 + 44 * len(on))
        width = (WIDTH - 156) / 2
        for at, name in enumerate(BESIDE_SHARED):
            axes = inset(drawn, left=126 + at * width, right=WIDTH - 112 - (at + 1) * width, bottom=40, top=44)
            heading(axes, name.capitalize(), "grey: hidden · solid: exposed" if at else what)
            labels = []
            for side, steps in (("at once", off), ("overlapped", on)):
                for rank, part in enumerate(by_exchange(steps)[name]):
                    y = 2.4 * rank + (side == "overlapped")
                    axes.barh(y, 1e3 * part.hidden, 0.8, color=CHANCE)
                    axes.barh(y, 1e3 * part.exposed, 0.8, left=1e3 * part.hidden, color=EXCHANGE_COLOUR)
                    labels.append((y, f"rank {rank}, {side}"))
            axes.set_yticks([y for y, _ in labels], [label for _, label in labels] if not at else [])
            axes.invert_yaxis()
            axes.set_xlabel("ms from the rank's arrival to the end", color=MUTED)
    return drawn


def traced(result: dict[str, Any]) -> Figure:
    """What `jobs.overlap` measured: exposed time of combine in every layer, then the intervals of one layer.

    Above, medians over rounds with 95 % intervals. Below, a typical round: an exchange on each rank from its post to
    its end, grey where the rank computes meanwhile, and all that it computes (green).
    """
    shown, rounds = result["shown"], result["rounds"]
    with theme.style():
        drawn = theme.figure(WIDTH, 480)
        for at, name in enumerate(BESIDE_SHARED):
            left, right = (108, WIDTH - 468) if not at else (510, 30)
            above = inset(drawn, left=left, right=right, bottom=310, top=44)
            note = f"ms · mean of ranks, median of {len(rounds)} rounds, 95 % intervals"
            heading(above, f"{name.capitalize()}: exposed", note)
            _by_layer(above, rounds, name)
            below = inset(drawn, left=left, right=right, bottom=64, top=250)
            heading(below, f"{name.capitalize()}, layer {shown['layer']}", f"round {shown['round']}, a typical one")
            _intervals(below, shown, name)
            if at:
                above.legend(loc="center", ncols=2)
                below.set_yticklabels([])
        keys = [Patch(color=EXCHANGE_COLOUR, label="exchange, exposed"), Patch(color=CHANCE, label="exchange, hidden")]
        keys.append(Patch(color=PHASE_COLOURS["experts"], label="the rank computes"))
        drawn.legend(handles=keys, loc="lower center", ncols=3)
    return drawn


def _by_layer(axes: Axes, rounds: Sequence[dict[str, Any]], name: str) -> None:
    layers = range(len(rounds[0]["off"]))
    for side, (label, colour, marker, shift) in SIDES.items():
        found = [summarise(exposed(rounds, side, name, layer)) for layer in layers]
        x = [layer + shift for layer in layers]
        axes.vlines(x, [one.low for one in found], [one.high for one in found], color=colour, lw=1.5)
        axes.plot(
            x, [one.median for one in found], ls="", marker=marker, ms=5, color=colour, label=label, clip_on=False
        )
    axes.set_ylim(0)
    axes.set_xticks(list(layers))
    axes.set_xlabel("layer", color=MUTED)
    axes.grid(axis="y")


def _intervals(axes: Axes, shown: dict[str, Any], name: str) -> None:
    labels = []
    for side, (label, *_) in SIDES.items():
        for rank, step in enumerate(unpack(shown[side], name)):
            (flight,) = step.flights
            y = 2.4 * rank + (side == "on")
            _bar(axes, y, flight.arrival, flight.end, 0.8, EXCHANGE_COLOUR)
            for span in step.spans:
                _bar(axes, y, max(span.start, flight.arrival), min(span.end, flight.end), 0.8, CHANCE)
                _bar(axes, y, span.start, span.end, 0.22, PHASE_COLOURS["experts"])
            labels.append((y, f"rank {rank}, {label}"))
    axes.set_yticks([y for y, _ in labels], [label for _, label in labels], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0)
    axes.set_xlabel("ms since the first rank posted its rows", color=MUTED)


def _bar(axes: Axes, y: float, start: float, end: float, height: float, colour: str) -> None:
    axes.barh(y, 1e3 * (end - start), height, left=1e3 * start, color=colour)


def trace_table(result: dict[str, Any]) -> str:
    """Exposed ms of combine, forward and backward, by layer and of all: off, on, and the change with its interval."""
    rows = [["layer", "combine off", "on", "on less off (95 %)", "gradients off", "on", "on less off (95 %)"]]
    for layer in (*range(len(result["rounds"][0]["off"])), None):
        cells = ["all" if layer is None else str(layer)]
        for name in BESIDE_SHARED:
            off, on, change = changes(result, name, layer)
            cells += [
                f"{off.median:.2f}",
                f"{on.median:.2f}",
                f"{change.median:+.2f} [{change.low:+.2f}, {change.high:+.2f}]",
            ]
        rows.append(cells)
    return table(rows)


def changes(result: dict[str, Any], name: str, layer: int | None = None) -> tuple[Timing, Timing, Timing]:
    """Exposed ms of an exchange over rounds: off, on, and on less off within a round."""
    off, on = (exposed(result["rounds"], side, name, layer) for side in SIDES)
    return summarise(off), summarise(on), summarise([b - a for a, b in zip(off, on, strict=True)])
