"""On a CPU: each token's sum over its rows in one pass, by `embedding_bag`, with float32 rows.

Rows are float32 also where the layer is not: `embedding_bag` would round gates to the rows' dtype. A row after the
last holds zeros, for assignments that were dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.kernels import workspace


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over experts are taken in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def positions(order_R: Tensor, gates_TK: Tensor) -> Tensor:
    """(T, K): the row of each assignment; of a dropped one the row after the last."""
    num_rows = order_R.numel()
    position_N = order_R.new_full((gates_TK.numel(),), num_rows)
    position_N[order_R] = torch.arange(num_rows)
    return position_N.view(gates_TK.shape)


def rows_and_zeros(like: Tensor, num_rows: int) -> Tensor:
    """(num_rows + 1, D), the last row zeros and the others of any content, valid until this thread's next call."""
    rows = workspace.take(like.new_empty(0, dtype=wide(like.dtype)), num_rows + 1, like.shape[1])
    rows[num_rows] = 0
    return rows


def sum_bags(rows_RD: Tensor, position_TK: Tensor, gates_TK: Tensor | None = None) -> Tensor:
    """(T, D): the K rows of each token under their gates, in slot order, in the rows' dtype."""
    weights_TK = None if gates_TK is None else gates_TK.to(rows_RD.dtype)
    return F.embedding_bag(position_TK, rows_RD, per_sample_weights=weights_TK, mode="sum")
