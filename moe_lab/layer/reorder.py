"""Received rows from rank-major to expert-major order and back: three ways, the same rows.

Ranks send their rows sorted by slot, so a rank receives R*e segments, source rank by source rank, slot by slot
within. Experts want them slot by slot. Hand-checked: counts [2, 3 | 1, 4] of two ranks and two slots take rows
[0, 1, 5, 2, 3, 4, 6, 7, 8, 9], and slots get 3 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.config import Reorder
from moe_lab.kernels.permute import permute_rows
from moe_lab.layer.padding import segments
from moe_lab.layer.splits import CountMatrix

CPU = torch.device("cpu")
MANY = 64  # of 36 segments segment_cat took 0.31 ms and index 0.54, of 256 it was 1.02 and 0.62 (H200, 2 ranks)


def expert_major_index(counts_Re: Int[Tensor, "R e"], device: torch.device) -> Int[Tensor, " rows"]:
    """For each row in expert-major order, where it lies in rank-major order; from counts on the CPU."""
    num_rows = int(counts_Re.sum())
    counts_Re = counts_Re.to(device)
    start_Re = counts_Re.flatten().cumsum(0).view_as(counts_Re) - counts_Re
    segment_R, offset_R = segments(counts_Re.t().flatten(), num_rows)
    return start_Re.t().flatten()[segment_R] + offset_R


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexReorder:
    """One gather by row index, made on `device`: any counts, one index entry a row."""

    counts_Re: Int[Tensor, "R e"]
    reason: str
    device: torch.device

    @cached_property
    def _indices(self) -> tuple[Tensor, Tensor]:
        index = expert_major_index(self.counts_Re, self.device)
        back = torch.empty_like(index)
        back[index] = torch.arange(index.numel(), device=self.device)
        return index, back

    def to_expert_major(self, rows_RD: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """(rows, D) rank-major -> expert-major."""
        fastpaths.note("index_permute", self.reason)
        index, back = self._indices
        return permute_rows(rows_RD, index, back)

    def to_rank_major(self, rows_RD: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """(rows, D) expert-major -> rank-major."""
        fastpaths.note("index_unpermute", self.reason)
        index, back = self._indices
        return permute_rows(rows_RD, back, index)


@dataclass(frozen=True, kw_only=True, eq=False)
class EqualCountReorder:
    """A transpose of (R, e, count, D): legal where all of a rank's segments are equal, no index at all."""

    num_ranks: int
    num_slots: int
    count: int
    reason: str

    def to_expert_major(self, rows_RD: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """(rows, D) rank-major -> expert-major."""
        fastpaths.note("equal_count_permute", self.reason)
        return _transpose(rows_RD, (self.num_ranks, self.num_slots, self.count))

    def to_rank_major(self, rows_RD: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """(rows, D) expert-major -> rank-major."""
        fastpaths.note("equal_count_unpermute", self.reason)
        return _transpose(rows_RD, (self.num_slots, self.num_ranks, self.count))


def _transpose(rows_RD: Tensor, segments: tuple[int, int, int]) -> Tensor:
    return rows_RD.reshape(*segments, rows_RD.shape[1]).transpose(0, 1).reshape(rows_RD.shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentCatReorder:
    """Whole segments concatenated in the other order: any counts, one copy a segment."""

    counts_Re: Int[Tensor, "R e"]
    reason: str

    def to_expert_major(self, rows_RD: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """(rows, D) rank-major -> expert-major."""
        fastpaths.note("segment_cat_permute", self.reason)
        return _cat_segments(rows_RD, self.counts_Re)

    def to_rank_major(self, rows_RD: Float[Tensor, "rows D"]) -> Float[Tensor, "rows D"]:
        """(rows, D) expert-major -> rank-major."""
        fastpaths.note("segment_cat_unpermute", self.reason)
        return _cat_segments(rows_RD, self.counts_Re.t())


def _cat_segments(rows_RD: Tensor, counts_AB: Tensor) -> Tensor:
    """Segments that lie A by A, B within, put B by B, A within."""
    num_a, num_b = counts_AB.shape
    segments = rows_RD.split(counts_AB.flatten().tolist())
    return torch.cat([segments[a * num_b + b] for b in range(num_b) for a in range(num_a)])


def choose_reorder(
    counts: CountMatrix, rank: int, reorder: Reorder = "auto", device: torch.device = CPU
) -> IndexReorder | EqualCountReorder | SegmentCatReorder:
    """The reordering by name; `auto` is equal_count where this rank's segments are equal, else segment_cat.

    On CUDA `auto` takes index instead where there are more than `MANY` segments, whose many copies then take longer
    than making an index.

    `ValueError` for `equal_count` where some rank's segments differ: decided from the whole matrix, so that every
    rank raises it.
    """
    counts_Re = counts.received_by(rank)
    if reorder == "equal_count" and counts.uniform_counts is None:
        raise ValueError(
            "reorder='equal_count' needs equal segments on every rank, but they have "
            f"{int(counts.counts_RP.min())} to {int(counts.counts_RP.max())} rows: "
            "choose reorder='auto', 'index' or 'segment_cat'"
        )
    low, high = int(counts_Re.min()), int(counts_Re.max())
    if reorder == "equal_count" or (reorder == "auto" and low == high):
        ranks, slots = counts_Re.shape
        return EqualCountReorder(num_ranks=ranks, num_slots=slots, count=low, reason=f"all segments have {low} rows")
    reason = f"segments of {low} to {high} rows" if reorder == "auto" else f"reorder={reorder!r}"
    if reorder == "index" or (reorder == "auto" and device.type == "cuda" and counts_Re.numel() > MANY):
        return IndexReorder(counts_Re=counts_Re, reason=reason, device=device)
    return SegmentCatReorder(counts_Re=counts_Re, reason=reason)
