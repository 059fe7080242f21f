"""What padding costs and what travels, from integers alone: no activation moves here.

Counts come from a router, a trace or nowhere in particular. The plans are those that the dispatcher executes, so
what is predicted here is what an `Exchange` counts.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_lab.config import check_choice, check_int, check_threshold
from moe_lab.layer.capacity import capacity
from moe_lab.layer.padding import round_up
from moe_lab.layer.splits import CountMatrix, EqualSplits, choose_splits, forced_counts, padding_overhead

Policy = Literal["none", "equal_split", "adaptive", "multiple", "drop", "capacity", "padded_bmm", "forced_balance"]
POLICIES: tuple[Policy, ...] = (
    "none",
    "equal_split",
    "adaptive",
    "multiple",
    "drop",
    "capacity",
    "padded_bmm",
    "forced_balance",
)
CAPACITY = 1.25  # rows that an expert has room for, over its fair share


class Overhead(NamedTuple):
    """Rows of one micro-batch under one policy, by rank.

    `rows_R` real rows at each rank's experts; `sent_R` real rows that each rank sends, its own included;
    `exchange_zeros_R` zero rows in both of a rank's sends, dispatch and combine; `expert_zeros_R` zero rows that
    go through its experts; `dropped_R` assignments that it drops.
    """

    policy: str
    rows_R: tuple[int, ...]
    sent_R: tuple[int, ...]
    exchange_zeros_R: tuple[int, ...]
    expert_zeros_R: tuple[int, ...]
    dropped_R: tuple[int, ...]

    @property
    def exchange_overhead(self) -> float:
        """Zero rows over real rows in all exchanges, both ways."""
        return ratio(sum(self.exchange_zeros_R), sum(self.sent_R) + sum(self.rows_R))

    @property
    def expert_overhead(self) -> float:
        """Zero rows over real rows at all experts."""
        return ratio(sum(self.expert_zeros_R), sum(self.rows_R))

    @property
    def worst_exchange_overhead(self) -> float:
        """That of the worst rank."""
        real = (s + r for s, r in zip(self.sent_R, self.rows_R))
        return max(ratio(zeros, rows) for zeros, rows in zip(self.exchange_zeros_R, real))

    @property
    def worst_expert_overhead(self) -> float:
        """That of the worst rank."""
        return max(ratio(zeros, rows) for zeros, rows in zip(self.expert_zeros_R, self.rows_R))

    @property
    def straggler_factor(self) -> float:
        """Rows through the experts of the busiest rank, zeros included, over the mean of real ones."""
        busiest = max(real + zeros for real, zeros in zip(self.rows_R, self.expert_zeros_R))
        return ratio(busiest * len(self.rows_R), sum(self.rows_R))

    def wasted_flops(self, dim: int, hidden_dim: int) -> int:
        """Forward FLOPs spent on zero rows: three products of 2 D F a row (SwiGLU)."""
        return sum(self.expert_zeros_R) * 6 * dim * hidden_dim

    def wasted_bytes(self, dim: int, itemsize: int = 2) -> int:
        """Bytes of zero rows in both exchanges."""
        return sum(self.exchange_zeros_R) * dim * itemsize


def ratio(part: float, whole: float) -> float:
    """Part over whole; 0 of nothing is 0, something of nothing is infinite."""
    return part / whole if whole else (math.inf if part else 0.0)


def overhead(
    counts: CountMatrix,
    policy: Policy = "none",
    *,
    threshold: float = 0.10,
    multiple: int = 128,
    capacity_factor: float = CAPACITY,
) -> Overhead:
    """What one policy does to one micro-batch.

    `none`; `equal_split` always, or `adaptive` up to `threshold`; `multiple` rows of each local expert; `drop`:
    each source rank and expert gets C = ceil(T K / E * capacity_factor) rows, more are dropped, as the layer's own
    `capacity_factor` does; `capacity`: the same, and fewer are padded, on the wire and at the experts (GShard);
    `padded_bmm`: a rank's experts padded to its largest; `forced_balance`: round robin over as many assignments.

    Raises `ValueError` for an unknown policy and settings that make no sense.
    """
    check_choice("policy", policy, POLICIES)
    check_threshold("threshold", threshold)
    check_int("multiple", multiple, 1)
    if policy in ("drop", "capacity"):
        return _capacity(policy, counts, capacity_factor)
    if policy == "forced_balance":
        counts = _forced_like(counts)
    mode = {"equal_split": "force", "adaptive": "adaptive"}.get(policy, "off")
    splits = choose_splits(counts.splits_RR, mode, threshold)  # type: ignore[arg-type]
    sent_R, rows_R = splits.splits_RR.sum(dim=1), splits.splits_RR.sum(dim=0)
    exchange_zeros_R = torch.zeros_like(sent_R)
    if isinstance(splits, EqualSplits):
        exchange_zeros_R = 2 * splits.size * counts.ep - sent_R - rows_R
    counts_Re = counts.counts_RP.sum(dim=0).view(counts.ep, -1)
    sizes_Re = counts_Re
    if policy == "multiple":
        sizes_Re = round_up(counts_Re.flatten(), multiple).view_as(counts_Re)
    elif policy == "padded_bmm":
        sizes_Re = counts_Re.amax(dim=1, keepdim=True).expand_as(counts_Re)
    return _overhead(policy, rows_R, sent_R, exchange_zeros_R, (sizes_Re - counts_Re).sum(dim=1))


def _capacity(policy: Policy, counts: CountMatrix, factor: float) -> Overhead:
    check_threshold("capacity_factor", factor)
    ep, num_slots = counts.counts_RP.shape
    # as `layer.capacity.capacity` counts it, whose tokens and top_k are assignments here
    size_R = torch.tensor([capacity(int(n), 1, num_slots, factor) for n in counts.counts_RP.sum(dim=1)])
    kept_RP = counts.counts_RP.minimum(size_R[:, None])
    dropped_R = (counts.counts_RP - kept_RP).sum(dim=1)
    kept_RR = kept_RP.unflatten(1, (ep, -1)).sum(dim=2)
    empty_RR = (size_R[:, None] - kept_RP).unflatten(1, (ep, -1)).sum(dim=2) * (policy == "capacity")
    zeros_R = empty_RR.sum(dim=0)
    by_rank = (kept_RR.sum(dim=0), kept_RR.sum(dim=1), empty_RR.sum(dim=1) + zeros_R, zeros_R, dropped_R)
    return _overhead(policy, *by_rank)


def _forced_like(counts: CountMatrix) -> CountMatrix:
    """Round robin over as many assignments as each rank has."""
    rows = [forced_counts(int(n), 1, counts.counts_RP.shape[1], 1).counts_RP for n in counts.counts_RP.sum(dim=1)]
    return CountMatrix(counts_RP=torch.cat(rows), reason="forced")


def _overhead(policy: str, *by_rank: Tensor) -> Overhead:
    rows_R, sent_R, exchange_zeros_R, expert_zeros_R, *dropped = (tuple(t.tolist()) for t in by_rank)
    return Overhead(policy, rows_R, sent_R, exchange_zeros_R, expert_zeros_R, (dropped or [(0,) * len(rows_R)])[0])


def worst_overhead(counts: CountMatrix) -> float:
    """The worst rank's overhead of even splits: what `adaptive` compares with its threshold."""
    return max(padding_overhead(counts.splits_RR))
