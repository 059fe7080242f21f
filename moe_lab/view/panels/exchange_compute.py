"""What the exchange panel shows, from plans alone: one micro-batch over EP ranks, and its two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch
from torch import Tensor

from moe_lab.config import EqualSplit
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import count
from moe_lab.layer.splits import CountMatrix, EqualSplits, UnequalSplits, choose_splits
from moe_lab.study.batches import count_matrix, micro_batches
from moe_lab.study.load import ALL_DOMAINS
from moe_lab.study.trace import RoutingTrace
from moe_lab.view import theme
from moe_lab.view.exchanging import EXCHANGE_COLOUR, heat
from moe_lab.view.pictures import box, heading, inset, rank_axis, ratio_bar
from moe_lab.view.theme import INK, WITHIN

SHUFFLED, SORTED = "shuffled documents", "one after another (control)"
BLOCKWISE, REPLICAS = "block-wise", "replicas of busy ones"
CEILING = 3  # of the mean, where bars are cut


@dataclass(frozen=True, kw_only=True)
class Params:
    """Everything that the panel shows follows from this. Traces are compared by identity."""

    trace: RoutingTrace
    ep: int
    layer: int
    domain: str
    tokens: int
    equal_split: EqualSplit
    packing: str
    placing: str


class View(NamedTuple):
    """One micro-batch: each rank's expert ids, where experts live, who sends how much to whom, and how."""

    ids: list[Tensor]
    placement: Placement
    counts: CountMatrix
    splits: UnequalSplits | EqualSplits

    @property
    def zeros_R(self) -> list[int]:
        """Zero rows that each rank receives."""
        rows_R = self.counts.splits_RR.sum(dim=0).tolist()
        size = self.splits.size if isinstance(self.splits, EqualSplits) else 0
        return [size * self.counts.ep - rows if size else 0 for rows in rows_R]


@lru_cache(maxsize=64)
def compute(params: Params) -> View:
    """The first micro-batch and its plan. `ValueError` when the domain has too few tokens for the ranks."""
    trace = params.trace if params.domain == ALL_DOMAINS else params.trace.domain(params.domain)
    batches = micro_batches(trace, params.layer, params.ep, params.tokens, shuffle=params.packing == SHUFFLED)
    (ids,) = islice(batches, 1)
    placement = Placement.blockwise(trace.num_experts, params.ep)
    if params.placing == REPLICAS:
        placement = Placement.replicated(_load(params.trace, params.layer), params.ep)
    counts = count_matrix(ids, placement)
    return View(ids, placement, counts, choose_splits(counts.splits_RR, params.equal_split))


@lru_cache(maxsize=64)
def _load(trace: RoutingTrace, layer: int) -> tuple[int, ...]:
    """Rows of each expert over the whole trace: what a placement may know before a micro-batch comes."""
    ids_TK = trace.expert_ids_LTK[trace.info.layers.index(layer)][trace.valid_T]
    return tuple(count(ids_TK.long(), trace.num_experts).tolist())


class MatrixPicture(theme.Live):
    """Rows from rank to rank over their mean, as colour."""

    def __init__(self, ep: int) -> None:
        with theme.style():
            drawn = theme.figure(*theme.PICTURE)
            axes = inset(drawn, left=34, right=44, bottom=34, top=40)
            self._note = heading(axes, "Rows from rank to rank / mean")
            self._image = heat(axes, np.ones((ep, ep)))
            ratio_bar(inset(drawn, left=theme.PICTURE[0] - 36, right=28, bottom=34, top=40))
            axes.set_xlabel("to rank", labelpad=2)
            axes.set_ylabel("from rank", labelpad=2)
        super().__init__(drawn, [self._image, self._note])

    def update(self, counts: CountMatrix, what: str) -> MatrixPicture:
        """Show another matrix of as many ranks."""
        splits_RR = counts.splits_RR.numpy()
        self._image.set_data(theme.log_ratio(splits_RR / max(splits_RR.mean(), 1e-9)))
        self._note.set_text(what)
        return self


class ReceivedPicture(theme.Live):
    """Rows that each rank receives over the mean rank's, zeros of padding on top; cut at `CEILING`."""

    def __init__(self, ep: int) -> None:
        with theme.style():
            drawn = theme.figure(*theme.PICTURE)
            axes = inset(drawn, left=34, right=10, bottom=34, top=40)
            self._note = heading(axes, "Rows received / mean")
            axes.set_ylim(0, CEILING)
            rank_axis(axes, ep)
            axes.set_ylabel("rows / mean", labelpad=2)
            colours = {"rows": EXCHANGE_COLOUR, "zeros": WITHIN}
            self._bars = [PolyCollection([], facecolors=colour, linewidths=0) for colour in colours.values()]
            for bars in self._bars:
                axes.add_collection(bars, autolim=False)
            mean = axes.axhline(1, color=INK, lw=0.8, zorder=3)
            marks = [Patch(color=colour, label=name) for name, colour in colours.items()]
            axes.legend(handles=marks, ncols=2, fontsize=6.5, loc="lower right", bbox_to_anchor=(1, 1.08))
        super().__init__(drawn, [*self._bars, mean, self._note])

    def update(self, rows_R: Sequence[int], zeros_R: Sequence[int]) -> ReceivedPicture:
        """Show another micro-batch on as many ranks."""
        mean = max(sum(rows_R) / len(rows_R), 1e-9)
        ends = [(0.0, rows / mean, (rows + zeros) / mean) for rows, zeros in zip(rows_R, zeros_R)]
        for i, bars in enumerate(self._bars):
            bars.set_verts([box(rank, *edges[i : i + 2]) for rank, edges in enumerate(ends)])
        self._note.set_text(f"mean {mean:,.0f}, cut at {CEILING}")
        return self
