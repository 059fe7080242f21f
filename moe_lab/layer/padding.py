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
        """The padding of these segments, its indices on `device`; None where there is nothing to pad."""
        if torch.equal(counts_S, sizes_S):
            return None
        num_rows = int(counts_S.sum())
        shift_S = (sizes_S.cumsum(0) - sizes_S) - (counts_S.cumsum(0) - counts_S)
        target_R = torch.arange(num_rows) + shift_S.repeat_interleave(counts_S)
        source_P = torch.full((int(sizes_S.sum()),), -1)
        source_P[target_R] = torch.arange(num_rows)
        return cls(counts_S=counts_S, sizes_S=sizes_S, source_P=source_P.to(device), target_R=target_R.to(device))

    def pad(self, rows_RD: Float[Tensor, "R D"]) -> Float[Tensor, "P D"]:
        """Rows with the zeros put in; their gradients go nowhere."""
        return permute_rows(rows_RD, self.source_P, self.target_R)

    def strip(self, rows_PD: Float[Tensor, "P D"]) -> Float[Tensor, "R D"]:
        """Rows without the padding, whatever it holds by now; its gradient is exactly zero."""
        return permute_rows(rows_PD, self.target_R, self.source_P)


def round_up(counts_S: Int[Tensor, " S"], multiple: int) -> Int[Tensor, " S"]:
    """Each count raised to the next multiple; 0 stays 0."""
    return (counts_S + multiple - 1).div(multiple, rounding_mode="floor") * multiple
