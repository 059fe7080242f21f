"""Rows out to tiles and back to tokens, in Triton: one pass over the bytes each.

They equal `gather_rows` and `combine_gather` of `moe_lab.kernels.rows`, for the rows of `moe_lab.kernels.tiles`:
padding (-1 in `order_P`) is zeros, dropped slots (-1 in `position_TK`) add nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_lab.kernels.tiles import TileRows

BLOCK = 4096  # columns that one program moves at most, sixteen to a thread


def gather(x_TD: Tensor, rows: TileRows) -> Tensor:
    """(P, D): x[order // K], zeros in padding."""
    return gather_from(x_TD, rows.order_P, rows.position_TK.shape[1])


def gather_from(x_TD: Tensor, order_P: Tensor, top_k: int = 1) -> Tensor:
    """`gather` by the assignment of each row alone, in any integer type."""
    num_rows, dim = order_P.numel(), x_TD.shape[1]
    rows_PD = x_TD.new_empty(num_rows, dim)
    if num_rows:
        block = min(BLOCK, triton.next_power_of_2(dim))
        _gather_kernel[(num_rows, triton.cdiv(dim, block))](
            x_TD, order_P, rows_PD, dim, top_k, block, num_warps=max(1, block // 512)
        )
    return rows_PD


def combine(rows_PD: Tensor, gates_TK: Tensor | None, rows: TileRows) -> Tensor:
    """(T, D): each token's K rows summed under its gates (None: by one), in float32 in slot order, rounded once."""
    return sum_rows(rows_PD, gates_TK, rows.position_TK)


def sum_rows(rows_PD: Tensor, gates_TK: Tensor | None, position_TK: Tensor) -> Tensor:
    """`combine` by the row of each slot alone, in any integer type."""
    (num_tokens, top_k), dim = position_TK.shape, rows_PD.shape[1]
    out_TD = rows_PD.new_empty(num_tokens, dim)
    if num_tokens:
        block = min(BLOCK, triton.next_power_of_2(dim))
        _combine_kernel[(num_tokens, triton.cdiv(dim, block))](
            rows_PD, rows_PD if gates_TK is None else gates_TK, position_TK, out_TD, dim,
            top_k, gates_TK is not None, block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return out_TD


@triton.jit(do_not_specialize=["top_k"])
def _gather_kernel(x_ptr, order_ptr, rows_ptr, dim, top_k, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pick = tl.load(order_ptr + row).to(tl.int64)
    x = tl.load(x_ptr + pick // top_k * dim + col, mask=(col < dim) & (pick >= 0), other=0.0)
    tl.store(rows_ptr + row * dim + col, x, mask=col < dim)


@triton.jit
def _combine_kernel(
    rows_ptr, gates_ptr, position_ptr, out_ptr, dim, K: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(position_ptr + token * K + k).to(tl.int64)
        picked = tl.load(rows_ptr + row * dim + col, mask=(col < dim) & (row >= 0), other=0.0).to(tl.float32)
        if GATED:
            picked *= tl.load(gates_ptr + token * K + k)
        total += picked
    tl.store(out_ptr + token * dim + col, total.to(out_ptr.dtype.element_ty), mask=col < dim)
