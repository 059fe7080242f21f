"""Assignments sorted by expert into whole tiles of rows: the plan of the fused layer.

Every expert's rows are padded to whole tiles, so that a tile of a grouped product belongs to one expert and needs no
mask: a row without an assignment stands for zeros. The height of a tile and the number of rows, a bound, depend on
shapes only, so nothing waits for the counts. Dropped assignments (-1) get no row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int, Int32
from torch import Tensor

HEIGHTS = (16, 32, 64, 128)


class TileRows(NamedTuple):
    """Where every assignment goes: P rows, `height` of them a tile, M tiles, expert by expert.

    `order_P`: the assignment in each row, -1 in padding. `position_TK`: the row of each assignment, -1 where it was
    dropped. `starts_E1`: the first row of each expert, a multiple of the height, and the end of the last one's.
    `expert_M1`: the expert of each tile, -1 past the last used one, and at its end how many are used. Rows of
    unused tiles are never read.
    """

    order_P: Int32[Tensor, " P"]
    position_TK: Int32[Tensor, "T K"]
    starts_E1: Int32[Tensor, " E+1"]
    expert_M1: Int32[Tensor, " M+1"]

    @property
    def height(self) -> int:
        """Rows of a tile; 0 where there is none."""
        return self.order_P.shape[0] // max(1, self.expert_M1.shape[0] - 1)


def tile_height(num_assignments: int, num_experts: int) -> int:
    """Rows of a tile: the lowest height that holds the rows of a mean expert and a third more, else the highest.

    By shapes alone. However skewed the routing is, the lower heights then make fewer tiles than two an expert.
    """
    return next((height for height in HEIGHTS if 4 * num_assignments <= 3 * num_experts * height), HEIGHTS[-1])


def max_tiles(num_assignments: int, num_experts: int, height: int) -> int:
    """Tiles that any choice of experts fits in: each used expert wastes at most height - 1 rows."""
    return (num_assignments + min(num_assignments, num_experts) * (height - 1)) // height


def tile_rows(expert_ids_TK: Int[Tensor, "T K"], num_experts: int) -> TileRows:
    """Sort assignments by expert, stable, each expert's rows padded to whole tiles. Ids lie in -1 .. E-1."""
    return TileRows(*tile_rows_op(expert_ids_TK, num_experts, tile_height(expert_ids_TK.numel(), num_experts)))


@torch.library.custom_op("moe_lab::tile_rows", mutates_args=())
def tile_rows_op(expert_ids_TK: Tensor, num_experts: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`tile_rows` in PyTorch, for any device; on CUDA `moe_lab.kernels.sort` gives the same integers."""
    ids_N = expert_ids_TK.reshape(-1)
    num_tiles = max_tiles(ids_N.numel(), num_experts, height)
    counts_E = torch.bincount(ids_N + 1, minlength=num_experts + 1)[1:]
    tiles_E = -(-counts_E // height)
    starts_E1 = torch.cat([counts_E.new_zeros(1), tiles_E.cumsum(0)]) * height
    before_E = counts_E.cumsum(0) - counts_E
    order_R = ids_N.argsort(stable=True)[int((ids_N < 0).sum()) :]
    row_R = torch.arange(order_R.numel(), device=ids_N.device) + (starts_E1[:-1] - before_E)[ids_N[order_R]]
    order_P = ids_N.new_full((num_tiles * height,), -1)
    order_P[row_R] = order_R
    position_N = torch.full_like(ids_N, -1)
    position_N[order_R] = row_R
    expert_M1 = ids_N.new_full((num_tiles + 1,), -1)
    used = int(tiles_E.sum())
    expert_M1[:used] = torch.arange(num_experts, device=ids_N.device).repeat_interleave(tiles_E)
    expert_M1[-1] = used
    return order_P.int(), position_N.view(expert_ids_TK.shape).int(), starts_E1.int(), expert_M1.int()


@tile_rows_op.register_kernel("cuda")
def _(expert_ids_TK: Tensor, num_experts: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe_lab.kernels import sort

    return sort.tile_rows(expert_ids_TK, num_experts, height)


@tile_rows_op.register_fake
def _(expert_ids_TK: Tensor, num_experts: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tiles = max_tiles(expert_ids_TK.numel(), num_experts, height)
    shapes = (num_tiles * height,), expert_ids_TK.shape, (num_experts + 1,), (num_tiles + 1,)
    order_P, position_TK, starts_E1, expert_M1 = (expert_ids_TK.new_empty(s, dtype=torch.int32) for s in shapes)
    return order_P, position_TK, starts_E1, expert_M1
