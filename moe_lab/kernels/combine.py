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
    """(P, D): x[order // K], zeros in padding; rows of unused tiles are not written.

    A token is read once and written to its K rows: (1 + K) / 2K of the bytes that a read for every row would take.
    """
    (num_tokens, top_k), num_experts = rows.position_TK.shape, rows.starts_E1.numel() - 1
    rows_PD = x_TD.new_empty(rows.order_P.numel(), x_TD.shape[1])
    if num_tokens:
        block, grid = _blocks(num_tokens + num_experts * rows.height, x_TD)
        _spread_kernel[grid](
            x_TD, rows.position_TK, rows.order_P, rows.starts_E1, rows_PD, num_tokens, x_TD.shape[1],
            top_k, rows.height, block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return rows_PD


def gather_from(x_TD: Tensor, source_P: Tensor) -> Tensor:
    """(P, D): x[source], zeros where that is negative, in any integer type."""
    rows_PD = x_TD.new_empty(source_P.numel(), x_TD.shape[1])
    if rows_PD.numel():
        block, grid = _blocks(source_P.numel(), x_TD)
        _gather_kernel[grid](x_TD, source_P, rows_PD, x_TD.shape[1], block, num_warps=max(1, block // 512))
    return rows_PD


def combine(rows_PD: Tensor, gates_TK: Tensor | None, rows: TileRows) -> Tensor:
    """(T, D): each token's K rows summed under its gates (None: by one), in float32 in slot order, rounded once."""
    return sum_rows(rows_PD, gates_TK, rows.position_TK)


def sum_rows(rows_PD: Tensor, gates_TK: Tensor | None, position_TK: Tensor) -> Tensor:
    """`combine` by the row of each slot alone, in any integer type."""
    (num_tokens, top_k), dim = position_TK.shape, rows_PD.shape[1]
    out_TD = rows_PD.new_empty(num_tokens, dim)
    if num_tokens:
        block, grid = _blocks(num_tokens, rows_PD)
        _combine_kernel[grid](
            rows_PD, rows_PD if gates_TK is None else gates_TK, position_TK, out_TD, dim,
            top_k, gates_TK is not None, block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return out_TD


def _blocks(num_programs: int, rows: Tensor) -> tuple[int, tuple[int, int]]:
    """Columns of one program, and the grid: a row each, in as many blocks as it takes."""
    block = min(BLOCK, triton.next_power_of_2(rows.shape[1]))
    return block, (num_programs, triton.cdiv(rows.shape[1], block))


@triton.jit(do_not_specialize=["num_tokens"])
def _spread_kernel(
    x_ptr, position_ptr, order_ptr, starts_ptr, rows_ptr, num_tokens, dim,
    K: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token to its rows; programs past the last token each look at one row that may be an expert's padding."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if program < num_tokens:
        x = tl.load(x_ptr + program * dim + col, mask=col < dim, other=0.0)
        for k in tl.static_range(K):
            row = tl.load(position_ptr + program * K + k).to(tl.int64)
            tl.store(rows_ptr + row * dim + col, x, mask=(col < dim) & (row >= 0))
    else:
        starts_ptr += (program - num_tokens) // HEIGHT
        row = tl.load(starts_ptr + 1).to(tl.int64) - 1 - (program - num_tokens) % HEIGHT
        if tl.load(order_ptr + row, mask=row >= tl.load(starts_ptr), other=0) < 0:
            tl.store(rows_ptr + row * dim + col, tl.zeros((BLOCK,), rows_ptr.dtype.element_ty), mask=col < dim)


@triton.jit
def _gather_kernel(x_ptr, source_ptr, rows_ptr, dim, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pick = tl.load(source_ptr + row).to(tl.int64)
    x = tl.load(x_ptr + pick * dim + col, mask=(col < dim) & (pick >= 0), other=0.0)
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
