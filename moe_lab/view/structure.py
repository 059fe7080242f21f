"""Experts together: in one token, from layer to layer, with kinds of text, and on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.config import check_choice
from moe_lab.study.ranks import RankLoad, rank_load
from moe_lab.study.structure import Specialisation, co_activation, specialisation, transition
from moe_lab.study.trace import RoutingTrace
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset, ratio_bar, ratio_image
from moe_lab.view.text import Text, table
from moe_lab.view.theme import CHANCE, INK, MUTED, SERIES, WIDTH

SQUARE = 300  # CSS pixels of an expert x expert picture


@dataclass(frozen=True, eq=False, repr=False)
class Pairs(Text):
    """Experts of one layer against experts of the same or another, as a ratio to chance; NaN where none can be.

    `kind`: "together" in one token, or "next" from one layer to another.
    """

    kind: str
    layers: tuple[int, int]
    tokens: int
    lift_EE: Float[Tensor, "E E"]

    def strongest(self, number: int = 5) -> list[tuple[int, int, float]]:
        """Pairs furthest above chance; of a symmetric pair one."""
        lift_EE = self.lift_EE.triu(1) if self.kind == "together" else self.lift_EE
        values, places = lift_EE.nan_to_num(0).flatten().topk(min(number, lift_EE.numel()))
        width = lift_EE.shape[1]
        return [(p // width, p % width, v) for p, v in zip(places.tolist(), values.tolist())]

    def text(self) -> str:
        """The spread of all pairs and the strongest."""
        known = self.lift_EE[~self.lift_EE.isnan()]
        low, middle, high = known.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=known.dtype)).tolist()
        where = f"layer {self.layers[0]}" if self.kind == "together" else "layer {} to layer {}".format(*self.layers)
        sign = "+" if self.kind == "together" else ">"
        pairs = ", ".join(f"{a} {sign} {b} ({value:.1f})" for a, b, value in self.strongest())
        spread = f"times chance: median {middle:.2f}, middle 90 % {low:.2f} - {high:.2f}"
        return f"{where} · {self.tokens:,} tokens · {spread}\nstrongest: {pairs}"


def together(trace: RoutingTrace, layer: int) -> Pairs:
    """Which experts of a layer one token chooses together: lift over the chance of their loads."""
    return Pairs("together", (layer, layer), int(trace.valid_T.sum()), co_activation(trace, layer).lift_EE)


def onward(trace: RoutingTrace, layer: int, to: int) -> Pairs:
    """Where the tokens of an expert go in another layer: shares over that layer's loads."""
    shares_EE = transition(trace, layer, to)
    load_E = trace.layer(to).counts_LE[0].double()
    chance_E = load_E / load_E.sum()
    return Pairs("next", (layer, to), int(trace.valid_T.sum()), shares_EE / chance_E.where(chance_E > 0, torch.nan))


def pairs(*results: Pairs) -> Figure:
    """Expert x expert pictures side by side on one scale: times chance."""
    titles = {"together": "Chosen together", "next": "Chosen next"}
    with theme.style():
        drawn = theme.figure(WIDTH, SQUARE + 60)
        wide = SQUARE + 70
        for i, result in enumerate(results):
            left = 44 + i * wide
            axes = inset(drawn, left=left, right=WIDTH - left - SQUARE, bottom=36, top=44)
            a, b = result.layers
            note = f"layer {a}" if result.kind == "together" else f"from layer {a} to layer {b}"
            heading(axes, titles[result.kind], f"{note} · {result.tokens:,} tokens · times chance")
            ratio_image(axes, result.lift_EE.numpy())
            axes.set_xlabel("expert" if result.kind == "together" else f"expert of layer {b}", labelpad=2)
            axes.set_ylabel("expert" if result.kind == "together" else f"expert of layer {a}", labelpad=2)
        right = 44 + (len(results) - 1) * wide + SQUARE + 10
        ratio_bar(inset(drawn, left=right, right=WIDTH - right - 8, bottom=36, top=44))
    return drawn


@dataclass(frozen=True, eq=False, repr=False)
class Stragglers(Text):
    """The straggler factor by numbers of ranks (columns) and tokens a rank (rows); None where a trace is too short."""

    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    loads: tuple[tuple[RankLoad | None, ...], ...]

    def text(self) -> str:
        """The factor, beside what chance gives."""
        rows = [["tokens a rank", *(f"EP {ranks}" for ranks in self.ranks)]]
        for tokens, loads in zip(self.tokens, self.loads):
            cells = ["-" if one is None else f"{one.straggler:.2f} ({one.chance_mean:.2f})" for one in loads]
            rows.append([f"{tokens:,}", *cells])
        return "straggler factor (chance)\n" + table(rows)


def stragglers(trace: RoutingTrace, ranks: Sequence[int], tokens: Sequence[int]) -> Stragglers:
    """`rank_load` of every pair that the trace is long enough for."""
    valid = int(trace.valid_T.sum())
    loads = tuple(tuple(rank_load(trace, r, t) if r * t <= valid else None for r in ranks) for t in tokens)
    return Stragglers(tuple(ranks), tuple(tokens), loads)


def straggler_lines(result: Stragglers) -> Figure:
    """The straggler factor against the number of ranks, a line a number of tokens; chance dashed in its colour."""
    with theme.style():
        drawn = theme.figure(WIDTH, 270)
        axes = inset(drawn, left=52, right=150, bottom=40, top=44)
        heading(axes, "Straggler factor", "rows of the busiest rank over the mean, over all layers · dashed: chance")
        for colour, tokens, loads in zip(SERIES, result.tokens, result.loads):
            known = [(i, one) for i, one in enumerate(loads) if one is not None]
            x = [i for i, _ in known]
            axes.plot(
                x, [one.straggler for _, one in known], color=colour, marker="o", ms=4, label=f"{tokens:,} tokens"
            )
            axes.plot(x, [one.chance_mean for _, one in known], color=colour, lw=1, ls=(0, (4, 2)))
        axes.axhline(1, color=INK, lw=0.8)
        axes.set_xticks(range(len(result.ranks)), [str(r) for r in result.ranks])
        axes.set_xlabel("expert-parallel ranks", color=MUTED)
        axes.set_ylabel("largest / mean rows", labelpad=2)
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="a rank")
    return drawn


class Telling(Text):
    """How much of a domain's name one chosen expert tells, by layer, of several traces."""

    def __init__(self, traces: dict[str, RoutingTrace]) -> None:
        self.layers = next(iter(traces.values())).info.layers
        for name, trace in traces.items():
            check_choice(f"layers of {name}", trace.info.layers, (self.layers,))
        self.of: dict[str, Specialisation] = {name: specialisation(trace) for name, trace in traces.items()}

    def text(self) -> str:
        """Shares in per cent; in brackets what 97.5 % of shuffled domains stay below."""
        rows = [["% of the domain's name", *(f"layer {layer}" for layer in self.layers)]]
        for name, got in self.of.items():
            cells = [f"{100 * s:.1f} ({100 * h:.1f})" for s, h in zip(got.share_L.tolist(), got.high_L.tolist())]
            rows.append([name, *cells])
        return table(rows)


def telling(result: Telling) -> Figure:
    """Specialisation by layer as bars, what chance stays below in grey."""
    with theme.style():
        drawn = theme.figure(WIDTH, 230)
        axes = inset(drawn, left=52, right=130, bottom=40, top=44)
        heading(axes, "What one expert tells of the domain", "share of the name's information · grey: 97.5 % of chance")
        width = 0.8 / len(result.of)
        for i, (name, got) in enumerate(result.of.items()):
            x = np.arange(len(result.layers)) + (i + 0.5) * width - 0.4
            axes.bar(x, 100 * got.share_L.numpy(), 0.92 * width, color=SERIES[i], label=name)
            axes.bar(x, 100 * got.high_L.numpy(), 0.92 * width, color=CHANCE)
        axes.set_xticks(range(len(result.layers)), [str(layer) for layer in result.layers])
        axes.set_xlabel("layer", color=MUTED)
        axes.set_ylabel("%", labelpad=2)
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn
