"""The routing sort in Triton: a stable counting sort into tiles, equal to `moe_lab.kernels.tiles.tile_rows_op`.

Count each chunk, scan the counts of each expert, lay the experts out, place each assignment: four short kernels
that read the ids three times and never wait for the host. Few ids take one kernel, every program of which counts all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lab.kernels.tiles import max_tiles

CHUNK = 64  # assignments that one program counts and places
BLOCK = 1024  # assignments that are counted at once where every program counts all
FEW = 2048  # assignments up to which one kernel is faster than four


def tile_rows(expert_ids_TK: Tensor, num_experts: int, height: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`order_P, position_TK, starts_E1, expert_M1` of a `TileRows`."""
    ids_N = expert_ids_TK.reshape(-1)
    num_ids, num_tiles = ids_N.numel(), max_tiles(ids_N.numel(), num_experts, height)
    num_chunks = max(1, triton.cdiv(num_ids, CHUNK))

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=ids_N.device)

    order_P, position_TK = integers(num_tiles * height), integers(*expert_ids_TK.shape)
    starts_E1, expert_M1 = integers(num_experts + 1), integers(num_tiles + 1)
    experts = max(2, triton.next_power_of_2(num_experts + 1))
    if num_ids <= FEW:
        _few_kernel[(num_chunks + num_tiles + 1,)](
            ids_N, order_P, position_TK, starts_E1, expert_M1, num_ids, num_experts, num_chunks, num_tiles,
            experts, height, CHUNK, BLOCK,
        )  # fmt: skip
        return order_P, position_TK, starts_E1, expert_M1
    before_EC, totals_E = integers(num_experts, num_chunks), integers(num_experts)
    chunks = min(1024, max(2, triton.next_power_of_2(num_chunks)))
    _count_kernel[(num_chunks,)](ids_N, before_EC, num_ids, num_experts, experts, CHUNK)
    _scan_kernel[(num_experts,)](before_EC, totals_E, num_chunks, chunks)
    _layout_kernel[(num_tiles + 1,)](totals_E, order_P, starts_E1, expert_M1, num_experts, num_tiles, experts, height)
    _place_kernel[(num_chunks,)](ids_N, before_EC, starts_E1, order_P, position_TK, num_ids, experts, CHUNK)
    return order_P, position_TK, starts_E1, expert_M1


@triton.jit
def _ids(ids_ptr, at, end, EXPERTS: tl.constexpr):
    """Experts of assignments; what is dropped or past the end falls to the last bin, which is no expert's."""
    ids = tl.load(ids_ptr + at, mask=at < end, other=-1).to(tl.int32)
    return tl.where(ids < 0, EXPERTS - 1, ids)


@triton.jit
def _counted(ids_ptr, end, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """The assignments of each expert before `end`."""
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for first in range(0, end, BLOCK):
        counts += tl.histogram(_ids(ids_ptr, first + tl.arange(0, BLOCK), end, EXPERTS), EXPERTS)
    return tl.where(tl.arange(0, EXPERTS) < EXPERTS - 1, counts, 0)


@triton.jit
def _rank(ids_ptr, ids, chunk, num_ids, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """How many earlier assignments of a chunk have the expert of each."""
    lane = tl.arange(0, CHUNK)
    rank = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, CHUNK, 32):
        other = first + tl.arange(0, 32)
        other_ids = _ids(ids_ptr, chunk * CHUNK + other, num_ids, EXPERTS)
        earlier = (ids[:, None] == other_ids[None, :]) & (other[None, :] < lane[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    return rank


@triton.jit(do_not_specialize=["num_ids", "num_chunks", "num_tiles"])
def _few_kernel(
    ids_ptr, order_ptr, position_ptr, starts_ptr, expert_ptr, num_ids, num_experts, num_chunks, num_tiles,
    EXPERTS: tl.constexpr, HEIGHT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program a chunk places its assignments; one a tile says whose it is and empties its padding; the last one
    writes where the experts start. Each counts all ids, so that none waits for another.
    """
    program = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    counts = _counted(ids_ptr, num_ids, EXPERTS, BLOCK)
    tiles = tl.cdiv(counts, HEIGHT)
    ends = tl.cumsum(tiles)
    used = tl.sum(tiles)
    tile = program - num_chunks
    if program < num_chunks:
        at = program * CHUNK + tl.arange(0, CHUNK)
        ids = _ids(ids_ptr, at, num_ids, EXPERTS)
        first = (ends - tiles) * HEIGHT + _counted(ids_ptr, program * CHUNK, EXPERTS, BLOCK)
        row = tl.gather(first, ids, 0) + _rank(ids_ptr, ids, program, num_ids, EXPERTS, CHUNK)
        kept = ids < EXPERTS - 1
        tl.store(position_ptr + at, tl.where(kept, row, -1), mask=at < num_ids)
        tl.store(order_ptr + row, at, mask=kept)
    elif tile < num_tiles:
        owner = tl.sum((ends <= tile).to(tl.int32))
        tl.store(expert_ptr + tile, tl.where(tile < used, owner, -1))
        mine = expert == owner  # of none in a tile that is not used
        end = tl.sum(tl.where(mine, (ends - tiles) * HEIGHT + counts, 0))
        row = tile * HEIGHT + tl.arange(0, HEIGHT)
        tl.store(order_ptr + row, tl.full((HEIGHT,), -1, tl.int32), mask=row >= end)
    else:
        tl.store(expert_ptr + tile, used)
        tl.store(starts_ptr + expert, (ends - tiles) * HEIGHT, mask=expert <= num_experts)


@triton.jit(do_not_specialize=["num_ids"])
def _count_kernel(ids_ptr, counts_ptr, num_ids, num_experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """The assignments of each expert in one chunk."""
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    counts = tl.histogram(_ids(ids_ptr, at, num_ids, EXPERTS), EXPERTS)
    expert = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + expert * tl.num_programs(0) + tl.program_id(0), counts, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_kernel(counts_ptr, totals_ptr, num_chunks, CHUNKS: tl.constexpr):
    """One expert: the count of each chunk becomes the number in earlier chunks; the sum is the expert's total."""
    counts_ptr += tl.program_id(0) * num_chunks
    total = 0
    for first in range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        counts = tl.load(counts_ptr + chunk, mask=chunk < num_chunks, other=0)
        tl.store(counts_ptr + chunk, total + tl.cumsum(counts) - counts, mask=chunk < num_chunks)
        total += tl.sum(counts)
    tl.store(totals_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["num_tiles"])
def _layout_kernel(
    totals_ptr, order_ptr, starts_ptr, expert_ptr, num_experts, num_tiles, EXPERTS: tl.constexpr, HEIGHT: tl.constexpr
):
    """One tile: whose it is, its rows emptied. The program past the last tile writes where the experts start."""
    tile = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    tiles = tl.cdiv(tl.load(totals_ptr + expert, mask=expert < num_experts, other=0), HEIGHT)
    ends = tl.cumsum(tiles)
    used = tl.sum(tiles)
    if tile < num_tiles:
        owner = tl.sum((ends <= tile).to(tl.int32))
        tl.store(expert_ptr + tile, tl.where(tile < used, owner, -1))
        tl.store(order_ptr + tile * HEIGHT + tl.arange(0, HEIGHT), tl.full((HEIGHT,), -1, tl.int32))
    else:
        tl.store(expert_ptr + tile, used)
        tl.store(starts_ptr + expert, (ends - tiles) * HEIGHT, mask=expert <= num_experts)


@triton.jit(do_not_specialize=["num_ids"])
def _place_kernel(
    ids_ptr, before_ptr, starts_ptr, order_ptr, position_ptr, num_ids, EXPERTS: tl.constexpr, CHUNK: tl.constexpr
):
    """One chunk: an assignment goes behind its expert's in earlier chunks and its earlier equals in this one."""
    chunk = tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = _ids(ids_ptr, at, num_ids, EXPERTS)
    kept = ids < EXPERTS - 1
    start = tl.load(starts_ptr + ids, mask=kept, other=0)
    before = tl.load(before_ptr + ids * tl.num_programs(0) + chunk, mask=kept, other=0)
    row = start + before + _rank(ids_ptr, ids, chunk, num_ids, EXPERTS, CHUNK)
    tl.store(position_ptr + at, tl.where(kept, row, -1), mask=at < num_ids)
    tl.store(order_ptr + row, at, mask=kept)
