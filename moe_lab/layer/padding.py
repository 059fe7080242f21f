"""Zero rows at the end of segments: put in before what wants round sizes, taken out after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.kernels.permute import permute_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPadding:
    """Segments of `counts_S` rows, each padded with zero rows at its end to `sizes_S` rows."""

    counts_S: Int[Tensor, " S"]
    sizes_S: Int[Tensor, " S"]
    source_P: Int[Tensor, " P"]
    target_R: Int[Tensor, " R"]

    @classmethod
    def of(cls, counts_S: Int[Tensor, " S"], sizes_S: Int[Tensor, " S"], device: torch.device) -> RowPadding | None:
        """The padding of these segments, its indices made on `device`; None where there is nothing to pad.

        Counts and sizes are on the CPU, so nothing waits for the device.
        """
        if torch.equal(counts_S, sizes_S):
            return None
        counts_s, sizes_s = counts_S.to(device), sizes_S.to(device)
        segment_P, offset_P = segments(sizes_s, int(sizes_S.sum()))
        segment_R, offset_R = segments(counts_s, int(counts_S.sum()))
        source_P = (counts_s.cumsum(0) - counts_s)[segment_P] + offset_P
        source_P.masked_fill_(offset_P >= counts_s[segment_P], -1)
        target_R = (sizes_s.cumsum(0) - sizes_s)[segment_R] + offset_R
        return cls(counts_S=counts_S, sizes_S=sizes_S, source_P=source_P, target_R=target_R)

    def pad(self, rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "P D"]:
        """Rows with the zeros put in; their gradients go nowhere."""
        return permute_rows(rows_RD, self.source_P, self.target_R)

    def strip(self, rows_PD: Float[Tensor, "P D"]) -> Float[Tensor, "R D"]:
        """Rows without the padding, whatever it holds by now; its gradient is exactly zero."""
        return permute_rows(rows_PD, self.target_R, self.source_P)


def segments(lengths_S: Int[Tensor, " S"], num_rows: int) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """The segment of each row, and its place in it, for segments that lie one after another. `num_rows` their sum."""
    ends_S = lengths_S.cumsum(0)
    row_R = torch.arange(num_rows, device=lengths_S.device)
    segment_R = torch.searchsorted(ends_S, row_R, right=True)
    return segment_R, row_R - (ends_S - lengths_S)[segment_R]


def round_up(counts_S: Int[Tensor, " S"], multiple: int) -> Int[Tensor, " S"]:
    """Each count raised to the next multiple; 0 stays 0."""
    return (counts_S + multiple - 1).div(multiple, rounding_mode="floor") * multiple
