"""Grouped matrix products in Triton, for rows that lie in whole tiles by expert (`moe_lab.kernels.tiles`).

Products of rows are persistent: a program or two a multiprocessor walk over output tiles, HEIGHT x COLUMNS, and the
compiler flattens that walk and the sum over the inner dimension into one loop, so that the loads of the next tile run
under the last products and the stores of this one. Operands come through tensor maps (the copy engine of Hopper), which
also bound them: columns past the end read as zeros and are not written. Gathered rows come through pointers.
Accumulation is in float32, rounded once. The order of every sum is fixed, and the same for tiles of every height: two
runs agree to the bit, and a row's bits do not depend on how many rows there are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_lab.kernels import combine
from moe_lab.kernels.swiglu import silu
from moe_lab.kernels.tiles import HEIGHTS, TileRows


class _Tiling(NamedTuple):
    """Columns of an output tile and its warps; steps of the inner dimension in flight; programs a multiprocessor."""

    columns: int
    warps: int
    stages: int
    programs: int


HIGH = tl.constexpr(HEIGHTS[-1])  # tiles of fewer rows are low
HIGH_TILING = _Tiling(256, 8, 4, 1)
LOW_TILING = _Tiling(64, 4, 5, 2)  # these wait for weights: narrow tiles give every multiprocessor some to load
GRAD_ROWS, GRAD_COLUMNS = 128, 256  # a tile of a weight's gradient
GROUP = 8  # row tiles that share a column tile while it is in the cache
GATHER_ONCE = 1024  # hidden width from which high tiles gathered before the product are as fast (measured on an H100)
COUNTS = ["num_tiles", "num_columns", "num_m", "num_n", "top_k"]  # a kernel serves all their values


def up(x_TD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, rows: TileRows, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up product of each row's token, (P, F), empty unless `save`; and hidden = silu(gate) * up, (P, F).

    The gather, both products and SwiGLU are one kernel. Where rows are read so often (once for every tile of columns)
    that loads through pointers cost more than a copy, the copy engine reads rows gathered before.
    """
    num_rows, (_, hidden_dim, dim) = rows.order_P.numel(), w1_EFD.shape
    hidden_PF = x_TD.new_empty(num_rows, hidden_dim)
    gate_PF, up_PF = (x_TD.new_empty(num_rows if save else 0, hidden_dim) for _ in range(2))
    if num_rows:
        depth, tiling = _depth(x_TD), _tiling(rows)
        gathered = hidden_dim < GATHER_ONCE or tiling is LOW_TILING
        if gathered and tiling is HIGH_TILING:
            tiling = tiling._replace(stages=3)
        x = x_TD if gathered else _map(combine.gather(x_TD, rows), rows.height, depth)
        half = tiling.columns // 2
        w13, swap = _both(w1_EFD, w3_EFD, [2, 1, half, depth])
        hidden = _map(hidden_PF, rows.height, half)
        gate, up = (_map(product, rows.height, half) if save else None for product in (gate_PF, up_PF))
        _launch(_up_kernel, rows, 2 * hidden_dim, tiling)(
            x, rows.order_P, w13, gate, up, hidden, dim, rows.position_TK.shape[1],
            gathered, swap, dim % depth == 0, depth,
        )  # fmt: skip
    return gate_PF, up_PF, hidden_PF


def rows_product(a_PI: Tensor, weight_E: Tensor, rows: TileRows, *, transposed: bool) -> Tensor:
    """(P, O): each row times its expert's weight, (E, I, O), or (E, O, I) if `transposed`."""
    inner, outer = weight_E.shape[:0:-1] if transposed else weight_E.shape[1:]
    out_PO = a_PI.new_empty(a_PI.shape[0], outer)
    if out_PO.numel():
        depth, tiling = _depth(a_PI), _tiling(rows)
        block = [1, tiling.columns, depth] if transposed else [1, depth, tiling.columns]
        a, out = _map(a_PI, rows.height, depth), _map(out_PO, rows.height, tiling.columns // 2)
        _launch(_rows_kernel, rows, outer, tiling)(a, _map(weight_E, *block), out, inner, transposed, depth)
    return out_PO


def input_grad(grad_gate_PF: Tensor, grad_up_PF: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, rows: TileRows) -> Tensor:
    """(P, D): dGate times w1 plus dUp times w3, one sum over 2F."""
    _, hidden_dim, dim = w1_EFD.shape
    grad_PD = grad_gate_PF.new_empty(rows.order_P.numel(), dim)
    if grad_PD.numel():
        depth, tiling = _depth(grad_PD), _tiling(rows)
        w13, swap_weights = _both(w1_EFD, w3_EFD, [1, 1, depth, tiling.columns])
        grads, swap_grads = _both(grad_gate_PF, grad_up_PF, [1, rows.height, depth])
        out = _map(grad_PD, rows.height, tiling.columns // 2)
        _launch(_input_grad_kernel, rows, dim, tiling)(grads, w13, out, hidden_dim, swap_grads, swap_weights, depth)
    return grad_PD


def weight_grad(a_PM: Tensor, b_PN: Tensor, rows: TileRows) -> Tensor:
    """(E, M, N): each expert's rows of `a` transposed times its rows of `b`; exactly 0 where it has none."""
    num_experts = rows.starts_E1.numel() - 1
    grad_EMN = a_PM.new_empty(num_experts, a_PM.shape[1], b_PN.shape[1])
    if not a_PM.shape[0]:
        return grad_EMN.zero_()
    depth = min(_depth(a_PM), rows.height)  # an expert's rows are whole steps
    num_m, num_n = triton.cdiv(a_PM.shape[1], GRAD_ROWS), triton.cdiv(b_PN.shape[1], GRAD_COLUMNS)
    _weight_grad_kernel[(num_experts * num_m * num_n,)](
        _map(a_PM, depth, GRAD_ROWS), _map(b_PN, depth, GRAD_COLUMNS), _map(grad_EMN, 1, GRAD_ROWS, GRAD_COLUMNS),
        rows.starts_E1, num_m, num_n, GRAD_ROWS, GRAD_COLUMNS, depth, GROUP, num_warps=8, num_stages=4,
    )  # fmt: skip
    return grad_EMN


def _depth(a: Tensor) -> int:
    """Of the inner dimension, what fills 128 bytes: a row of a swizzled tile in shared memory."""
    return 128 // a.element_size()


def _map(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))


def _both(a: Tensor, b: Tensor, block: list[int]) -> tuple[TensorDescriptor, bool]:
    """One tensor map over two tensors of one shape, and whether `b` comes first in it.

    A map may have any stride, so its outermost is the distance between the two: one load fetches a tile of each
    and one product multiplies both, without a copy. (Two products in one loop wait for each other.)
    """
    swap = b.data_ptr() < a.data_ptr()
    first, second = (b, a) if swap else (a, b)
    distance = second.data_ptr() - first.data_ptr()
    if distance >= 2**40:  # the largest stride of a tensor map, in bytes
        pair = torch.stack((first, second))
        first, distance = pair[0], pair[0].numel() * pair.element_size()
    strides = [distance // first.element_size(), *first.stride()]
    return TensorDescriptor(first, [2, *first.shape], strides, block), swap


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # in the interpreter, more than one to walk together
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tiling(rows: TileRows) -> _Tiling:
    return HIGH_TILING if rows.height == HIGH.value else LOW_TILING


def _launch(kernel, rows: TileRows, width: int, tiling: _Tiling):
    """The kernel over all tiles of a (P, width) result, to be called with the arguments of its own."""
    num_tiles, num_columns = rows.expert_M1.numel() - 1, triton.cdiv(width, tiling.columns)
    programs = tiling.programs * _multiprocessors(rows.order_P.device)
    grid = (min(num_tiles * num_columns, programs),)

    def call(*args) -> None:
        kernel[grid](
            rows.expert_M1, num_tiles, num_columns, *args, rows.height, tiling.columns, GROUP,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip

    return call


@triton.jit
def _tile_at(index, num_tiles, num_columns, GROUP: tl.constexpr):
    """Which tile comes at `index`: GROUP row tiles share a column tile before the next, so both stay in the cache."""
    width = GROUP * num_columns
    first = index // width * GROUP
    high = min(num_tiles - first, GROUP)
    return first + index % width % high, index % width // high


@triton.jit
def _gathered(a_ptr, order_ptr, tile, inner, top_k, HEIGHT: tl.constexpr, DEPTH: tl.constexpr):
    """Pointers to the first DEPTH values of each row's token, and which rows have one."""
    pick = tl.load(order_ptr + tile * HEIGHT + tl.arange(0, HEIGHT))
    kept = pick >= 0
    token = (tl.where(kept, pick, 0) // top_k).to(tl.int64)
    return a_ptr + token[:, None] * inner + tl.arange(0, DEPTH)[None, :], kept[:, None]


@triton.jit
def _zeros(HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    """A sum to begin with, for `_add`."""
    if HEIGHT < HIGH:
        return tl.zeros((COLUMNS, HEIGHT), dtype=tl.float32)
    else:
        return tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)


@triton.jit
def _add(acc, rows, weight, HEIGHT: tl.constexpr):
    """The sum plus rows @ weight. The first operand of a product has 64 rows at least, the second may have few columns:
    low tiles come second, both as transposes. Every element is the same sum in the same order.
    """
    if HEIGHT < HIGH:
        return tl.dot(weight.T, rows.T, acc, input_precision="ieee")
    else:
        return tl.dot(rows, weight, acc, input_precision="ieee")


@triton.jit
def _tile_of(acc, HEIGHT: tl.constexpr):
    """The (HEIGHT, COLUMNS) tile that a sum by `_add` is of."""
    if HEIGHT < HIGH:
        return acc.T
    else:
        return acc


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _store(out_map, tile, column, acc, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    """In two halves, to leave shared memory to the next operands."""
    left, right = _halves(acc)
    out_map.store([tile * HEIGHT, column * COLUMNS], left.to(out_map.dtype))
    out_map.store([tile * HEIGHT, column * COLUMNS + COLUMNS // 2], right.to(out_map.dtype))


@triton.jit(do_not_specialize=COUNTS)
def _up_kernel(
    expert_ptr, num_tiles, num_columns, x, order_ptr, w13_map, gate_map, up_map, hidden_map, dim, top_k,
    GATHERED: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of COLUMNS holds COLUMNS / 2 columns of the gate product beside the same of the up product."""
    HALF: tl.constexpr = COLUMNS // 2
    used = tl.load(expert_ptr + num_tiles)
    for index in tl.range(tl.program_id(0), used * num_columns, tl.num_programs(0), flatten=True):
        tile, column = _tile_at(index, used, num_columns, GROUP)
        expert = tl.load(expert_ptr + tile)
        if GATHERED:
            x_ptrs, kept = _gathered(x, order_ptr, tile, dim, top_k, HEIGHT, DEPTH)
        acc = _zeros(HEIGHT, COLUMNS)
        for k in range(0, dim, DEPTH):
            if GATHERED:
                mask = kept if EVEN else kept & (tl.arange(0, DEPTH) < dim - k)[None, :]
                rows = tl.load(x_ptrs + k, mask=mask, other=0.0)
            else:
                rows = x.load([tile * HEIGHT, k])
            w13 = w13_map.load([0, expert, column * HALF, k]).reshape(COLUMNS, DEPTH)
            acc = _add(acc, rows, w13.T, HEIGHT)
        gate, up = _halves(_tile_of(acc, HEIGHT))
        if SWAP:
            gate, up = up, gate
        if gate_map is not None:
            gate_map.store([tile * HEIGHT, column * HALF], gate.to(gate_map.dtype))
            up_map.store([tile * HEIGHT, column * HALF], up.to(up_map.dtype))
        hidden_map.store([tile * HEIGHT, column * HALF], (silu(gate) * up).to(hidden_map.dtype))


@triton.jit(do_not_specialize=COUNTS)
def _rows_kernel(
    expert_ptr, num_tiles, num_columns, a_map, weight_map, out_map, inner,
    TRANSPOSED: tl.constexpr, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    used = tl.load(expert_ptr + num_tiles)
    for index in tl.range(tl.program_id(0), used * num_columns, tl.num_programs(0), flatten=True):
        tile, column = _tile_at(index, used, num_columns, GROUP)
        expert = tl.load(expert_ptr + tile)
        acc = _zeros(HEIGHT, COLUMNS)
        for k in range(0, inner, DEPTH):
            if TRANSPOSED:
                weight = weight_map.load([expert, column * COLUMNS, k]).reshape(COLUMNS, DEPTH).T
            else:
                weight = weight_map.load([expert, k, column * COLUMNS]).reshape(DEPTH, COLUMNS)
            acc = _add(acc, a_map.load([tile * HEIGHT, k]), weight, HEIGHT)
        _store(out_map, tile, column, _tile_of(acc, HEIGHT), HEIGHT, COLUMNS)


@triton.jit(do_not_specialize=COUNTS)
def _input_grad_kernel(
    expert_ptr, num_tiles, num_columns, grads_map, w13_map, out_map, hidden_dim,
    SWAP_GRADS: tl.constexpr, SWAP_WEIGHTS: tl.constexpr, DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    used = tl.load(expert_ptr + num_tiles)
    steps = tl.cdiv(hidden_dim, DEPTH)
    for index in tl.range(tl.program_id(0), used * num_columns, tl.num_programs(0), flatten=True):
        tile, column = _tile_at(index, used, num_columns, GROUP)
        expert = tl.load(expert_ptr + tile)
        acc = _zeros(HEIGHT, COLUMNS)
        for step in range(2 * steps):
            part = step // steps  # 0: gate with w1, 1: up with w3
            k = (step - part * steps) * DEPTH
            grad = grads_map.load([1 - part if SWAP_GRADS else part, tile * HEIGHT, k]).reshape(HEIGHT, DEPTH)
            place = 1 - part if SWAP_WEIGHTS else part
            weight = w13_map.load([place, expert, k, column * COLUMNS]).reshape(DEPTH, COLUMNS)
            acc = _add(acc, grad, weight, HEIGHT)
        _store(out_map, tile, column, _tile_of(acc, HEIGHT), HEIGHT, COLUMNS)


@triton.jit(do_not_specialize=COUNTS)
def _weight_grad_kernel(
    a_map, b_map, out_map, starts_ptr, num_m, num_n,
    GRAD_ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One output tile of one expert: its sum is as long as the expert has rows, so nothing is known ahead."""
    expert = tl.program_id(0) // (num_m * num_n)
    m, n = _tile_at(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP)
    acc = tl.zeros((GRAD_ROWS, COLUMNS), dtype=tl.float32)
    for row in range(tl.load(starts_ptr + expert), tl.load(starts_ptr + expert + 1), DEPTH):
        acc = tl.dot(a_map.load([row, m * GRAD_ROWS]).T, b_map.load([row, n * COLUMNS]), acc, input_precision="ieee")
    out_map.store([expert, m * GRAD_ROWS, n * COLUMNS], acc.to(out_map.dtype).reshape(1, GRAD_ROWS, COLUMNS))
