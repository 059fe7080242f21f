"""Sequences cut over ranks: each rank runs its positions of every sequence, uneven lengths included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.kernels.permute import permute_rows
from moe_lab.layer.moe import MoE


@dataclass(frozen=True)
class SequenceShard:
    """Rank `rank`'s part of a batch of B sequences of L tokens, cut along L over `size` ranks.

    Every shard is (B, l, D) with l = ceil(L / size). Where L does not divide, the last positions are padding:
    zeros that reach no router and so count nowhere, in no counts, bias or loss.
    """

    batch: int
    length: int
    size: int
    rank: int

    def __post_init__(self) -> None:
        check_int("batch", self.batch, 0)
        check_int("length", self.length, 0)
        check_int("size", self.size, 1)
        check_int("rank", self.rank, 0, self.size - 1)

    @property
    def local_length(self) -> int:
        """Positions of each sequence in a shard, padding included, l."""
        return -(-self.length // self.size)

    @cached_property
    def valid_T(self) -> Bool[Tensor, " T"]:
        """Which of the shard's B*l tokens are real."""
        position_l = self.rank * self.local_length + torch.arange(self.local_length)
        return (position_l < self.length).repeat(self.batch)

    @cached_property
    def index_T(self) -> Int[Tensor, " T"]:
        """Where each of the shard's tokens lies in the whole batch: batch * L + offset + position; -1 for padding."""
        start_B = torch.arange(self.batch) * self.length
        index_Bl = start_B[:, None] + self.rank * self.local_length + torch.arange(self.local_length)
        return torch.where(self.valid_T, index_Bl.flatten(), -1)

    def cut(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B l D"]:
        """This rank's shard, zeros where there is no token. `ValueError` for another batch or length."""
        if x_BLD.shape[:2] != (self.batch, self.length):
            raise ValueError(f"x is {tuple(x_BLD.shape)}: must be ({self.batch}, {self.length}, D)")
        real_T = self.index_T.clamp(min=0).to(x_BLD.device)
        rows_TD = x_BLD.flatten(0, 1)[real_T] if self.length else x_BLD.new_zeros(0, x_BLD.shape[2])
        valid_T1 = self.valid_T.to(x_BLD.device)[:, None]
        return torch.where(valid_T1, rows_TD, 0).view(self.batch, self.local_length, x_BLD.shape[2])

    def real(self, x_BlD: Float[Tensor, "B l D"]) -> Float[Tensor, "t D"]:
        """The shard's real tokens in a row."""
        keep_t, back_T = self._keep(x_BlD.device)
        return permute_rows(x_BlD.flatten(0, 1), keep_t, back_T)

    def padded(self, rows_tD: Float[Tensor, "t D"]) -> Float[Tensor, "B l D"]:
        """Real tokens back in their shard, zeros between."""
        keep_t, back_T = self._keep(rows_tD.device)
        return permute_rows(rows_tD, back_T, keep_t).view(self.batch, self.local_length, rows_tD.shape[1])

    def run(self, moe: MoE, x_BlD: Float[Tensor, "B l D"]) -> Float[Tensor, "B l D"]:
        """The layer on this shard; every rank of its mesh calls it, those without a real token too."""
        return self.padded(moe(self.real(x_BlD)))

    def _keep(self, device: torch.device) -> tuple[Tensor, Tensor]:
        keep_t = self.valid_T.nonzero().flatten()
        back_T = torch.full_like(self.index_T, -1)
        back_T[keep_t] = torch.arange(len(keep_t))
        return keep_t.to(device), back_T.to(device)


def join(shards: list[Tensor], length: int) -> Tensor:
    """Shards (B, l, D) of all ranks, by rank -> (B, L, D)."""
    return torch.cat(shards, dim=1)[:, :length]
