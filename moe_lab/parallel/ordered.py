"""Sums over ranks in a known order, rank 0's part first: backends choose an order of their own, by size and network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


def gather(x: Shaped[Tensor, "*shape"], group: dist.ProcessGroup | None = None) -> list[Shaped[Tensor, "*shape"]]:
    """What every rank has, by rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def reduce_scatter(x_RN: Float[Tensor, "R N"], group: dist.ProcessGroup) -> Float[Tensor, " N"]:
    """This rank's row of the sum over ranks: every rank is sent its row of each, and adds them in their order."""
    received_RN = torch.empty_like(x_RN)
    dist.all_to_all_single(received_RN, x_RN, group=group)
    total_N = received_RN[0]
    for part_N in received_RN[1:]:
        total_N += part_N
    return total_N


class OrderedReduceScatter:
    """FSDP's reduction of gradients by `reduce_scatter`, for `FSDPModule.set_custom_reduce_scatter`.

    As many bytes are sent as by a ring; what a rank receives takes as much memory as what it sends.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer to send from or to reduce into."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any) -> None:
        """The sum, which is all that `shard_moe` asks for."""
        output_tensor.copy_(reduce_scatter(input_tensor.view(group.size(), -1), group))
