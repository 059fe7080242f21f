"""What shared experts hide of the exchange beside them, drawn from a recorded step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from moe_lab.study.timeline import RankSteps, by_exchange
from moe_lab.view import theme
from moe_lab.view.exchanging import EXCHANGE_COLOUR
from moe_lab.view.pictures import heading, inset
from moe_lab.view.theme import CHANCE, MUTED, WIDTH

BESIDE_SHARED = ("combine", "combine gradients")


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
