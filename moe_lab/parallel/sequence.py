"""Sequences cut over ranks: each rank runs its positions of every sequence, uneven lengths included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_lab.config import check_int
from moe_lab.kernels.permute import permute_rows
from moe_lab.layer.moe import MoE
from moe_lab.parallel.ordered import reduce_scatter


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

    @property
    def start(self) -> int:
        """The first position here."""
        return self.rank * self.local_length

    @cached_property
    def valid_T(self) -> Bool[Tensor, " T"]:
        """Which of the shard's B*l tokens are real."""
        position_l = self.start + torch.arange(self.local_length)
        return (position_l < self.length).repeat(self.batch)

    @cached_property
    def index_T(self) -> Int[Tensor, " T"]:
        """Where each of the shard's tokens lies in the whole batch: batch * L + offset + position; -1 for padding."""
        start_B = torch.arange(self.batch) * self.length
        index_Bl = start_B[:, None] + self.start + torch.arange(self.local_length)
        return torch.where(self.valid_T, index_Bl.flatten(), -1)

    def cut(self, x_BL: Shaped[Tensor, "B L *D"]) -> Shaped[Tensor, "B l *D"]:
        """This rank's shard, zeros where there is no token. `ValueError` for another batch or length."""
        if x_BL.shape[:2] != (self.batch, self.length):
            raise ValueError(f"x is {tuple(x_BL.shape)}: must be ({self.batch}, {self.length}, D)")
        here_BL = x_BL[:, self.start : self.start + self.local_length]
        out_Bl = x_BL.new_zeros(self.batch, self.local_length, *x_BL.shape[2:])
        out_Bl[:, : here_BL.shape[1]] = here_BL
        return out_Bl

    def real(self, x_BlD: Float[Tensor, "B l D"]) -> Float[Tensor, "t D"]:
        """The shard's real tokens, one a row."""
        keep_t, back_T = self._keep(x_BlD.device)
        return permute_rows(x_BlD.flatten(0, 1), keep_t, back_T)

    def padded(self, rows_tD: Float[Tensor, "t D"]) -> Float[Tensor, "B l D"]:
        """Real tokens back in their shard, zeros between."""
        keep_t, back_T = self._keep(rows_tD.device)
        return permute_rows(rows_tD, back_T, keep_t).view(self.batch, self.local_length, rows_tD.shape[1])

    def sees_lL(self, device: torch.device) -> Bool[Tensor, "l L"]:
        """Which positions of the whole sequence each one here may look at: itself and those before."""
        position_l = self.start + torch.arange(self.local_length, device=device)
        return position_l[:, None] >= torch.arange(self.length, device=device)

    def run(self, moe: MoE, x_BlD: Float[Tensor, "B l D"]) -> Float[Tensor, "B l D"]:
        """The layer on this shard; every rank of its mesh calls it, those without a real token too."""
        return self.padded(moe(self.real(x_BlD)))

    def cross_entropy(self, logits_BlV: Float[Tensor, "B l V"], targets_BL: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
        """This rank's part of the loss of whole sequences: its sum, weighted so that ranks' mean is that over tokens.

        Ranks have unequal numbers of tokens where the length does not divide, and may have none.
        """
        targets_t = self.cut(targets_BL).flatten()[self.valid_T.to(targets_BL.device)]
        summed = F.cross_entropy(self.real(logits_BlV).float(), targets_t, reduction="sum")
        return summed / (targets_BL.numel() / self.size)  # of one shard as PyTorch divides a mean, to the bit

    def _keep(self, device: torch.device) -> tuple[Tensor, Tensor]:
        keep_t = self.valid_T.nonzero().flatten()
        back_T = torch.full_like(self.index_T, -1)
        back_T[keep_t] = torch.arange(len(keep_t))
        return keep_t.to(device), back_T.to(device)


@dataclass(frozen=True)
class MeshShard(SequenceShard):
    """A shard whose sequences go on on the ranks of `group`, which all call `gather`.

    `fixed_order`: its gradients are summed in the order of ranks, which backends choose otherwise.
    """

    group: dist.ProcessGroup
    fixed_order: bool = False

    @classmethod
    def of(cls, mesh: DeviceMesh, batch: int, length: int, *, fixed_order: bool = False) -> MeshShard:
        """This rank's part of B sequences of L tokens on a one-dimensional mesh."""
        return cls(batch, length, mesh.size(), mesh.get_local_rank(), mesh.get_group(), fixed_order)

    def gather(self, x_HlD: Float[Tensor, "*H l D"]) -> Float[Tensor, "*H L D"]:
        """All positions of what each rank has of its own. Gradients are summed where the positions are."""
        return _Gather.apply(x_HlD, self)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_HlD: Tensor, shard: MeshShard) -> Tensor:
        ctx.shard = shard
        x_HlD = x_HlD.contiguous()
        parts = [torch.empty_like(x_HlD) for _ in range(shard.size)]
        dist.all_gather(parts, x_HlD, group=shard.group)
        return torch.cat(parts, dim=-2)[..., : shard.length, :]

    @staticmethod
    def backward(ctx: Any, grad_HLD: Tensor) -> tuple[Tensor, None]:
        shard = ctx.shard
        missing = shard.size * shard.local_length - shard.length
        padded_HLD = F.pad(grad_HLD, (0, 0, 0, missing)) if missing else grad_HLD  # padding by nothing would copy
        parts_RHlD = padded_HLD.unflatten(-2, (shard.size, -1)).movedim(-3, 0).contiguous()
        if shard.fixed_order:
            return reduce_scatter(parts_RHlD.flatten(1), shard.group).view(parts_RHlD.shape[1:]), None
        out_HlD = torch.empty_like(parts_RHlD[0])
        dist.reduce_scatter(out_HlD, list(parts_RHlD), group=shard.group)
        return out_HlD, None


def gather_all(shards: Sequence[Float[Tensor, "*H l D"]], length: int) -> tuple[Float[Tensor, "*H L D"], ...]:
    """What `MeshShard.gather` in a fixed order gives every rank, in one process: all positions, once for each."""
    return _ForEach.apply(torch.cat(list(shards), dim=-2)[..., :length, :], len(shards))


class _ForEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for _ in range(size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum(grads[1:], start=grads[0]), None  # autograd of its own would add them in the order that they come


def join(shards: list[Tensor], length: int) -> Tensor:
    """Shards (B, l, D) of all ranks, by rank -> (B, L, D)."""
    return torch.cat(shards, dim=1)[:, :length]
