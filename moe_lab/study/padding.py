"""What padding costs and what travels, from integers alone: no activation moves here.

Counts come from a router, a trace or nowhere in particular. The plans are those that the dispatcher executes, so
what is predicted here is what an `Exchange` counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import check_choice, check_int, check_threshold
from moe_lab.layer.padding import round_up
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import count
from moe_lab.layer.splits import CountMatrix, EqualSplits, choose_splits, forced_counts, padding_overhead
from moe_lab.study.load import packing_order
from moe_lab.study.trace import RoutingTrace

Policy = Literal["none", "equal_split", "adaptive", "multiple", "capacity", "padded_bmm", "forced_balance"]
POLICIES: tuple[Policy, ...] = (
    "none",
    "equal_split",
    "adaptive",
    "multiple",
    "capacity",
    "padded_bmm",
    "forced_balance",
)


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
        return _ratio(sum(self.exchange_zeros_R), sum(self.sent_R) + sum(self.rows_R))

    @property
    def expert_overhead(self) -> float:
        """Zero rows over real rows at all experts."""
        return _ratio(sum(self.expert_zeros_R), sum(self.rows_R))

    @property
    def worst_exchange_overhead(self) -> float:
        """That of the worst rank."""
        real = (s + r for s, r in zip(self.sent_R, self.rows_R))
        return max(_ratio(zeros, rows) for zeros, rows in zip(self.exchange_zeros_R, real))

    @property
    def worst_expert_overhead(self) -> float:
        """That of the worst rank."""
        return max(_ratio(zeros, rows) for zeros, rows in zip(self.expert_zeros_R, self.rows_R))

    @property
    def straggler_factor(self) -> float:
        """Rows through the experts of the busiest rank, zeros included, over the mean of real ones."""
        busiest = max(real + zeros for real, zeros in zip(self.rows_R, self.expert_zeros_R))
        return _ratio(busiest * len(self.rows_R), sum(self.rows_R))

    def wasted_flops(self, dim: int, hidden_dim: int) -> int:
        """Forward FLOPs spent on zero rows: three products of 2 D F a row (SwiGLU)."""
        return sum(self.expert_zeros_R) * 6 * dim * hidden_dim

    def wasted_bytes(self, dim: int, itemsize: int = 2) -> int:
        """Bytes of zero rows in both exchanges."""
        return sum(self.exchange_zeros_R) * dim * itemsize


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)


def count_matrix(expert_ids: Sequence[Tensor], placement: Placement) -> CountMatrix:
    """The counts of one micro-batch from each rank's expert ids. `ValueError` for another number of ranks."""
    if len(expert_ids) != placement.ep:
        raise ValueError(f"expert_ids of {len(expert_ids)} ranks: must be of ep={placement.ep}")
    counts = [count(placement.slot_ids(ids_TK.long()), placement.num_slots) for ids_TK in expert_ids]
    return CountMatrix(counts_RP=torch.stack(counts), reason="counted")


def overhead(
    counts: CountMatrix,
    policy: Policy = "none",
    *,
    threshold: float = 0.10,
    multiple: int = 128,
    capacity_factor: float = 1.25,
) -> Overhead:
    """What one policy does to one micro-batch.

    `none`; `equal_split` always, or `adaptive` below `threshold`; `multiple` rows of each local expert;
    `capacity`: each source rank and expert gets C = ceil(mean * capacity_factor) rows, the mean being over this
    rank's experts (T K / E), more are dropped and fewer padded, on the wire and at the experts; `padded_bmm`: a
    rank's experts padded to its largest; `forced_balance`: round robin over as many assignments instead.

    Raises `ValueError` for an unknown policy and settings that make no sense.
    """
    check_choice("policy", policy, POLICIES)
    check_threshold("threshold", threshold)
    check_int("multiple", multiple, 1)
    if policy == "capacity":
        return _capacity(counts, capacity_factor)
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


def _capacity(counts: CountMatrix, factor: float) -> Overhead:
    check_threshold("capacity_factor", factor)
    ep, num_slots = counts.counts_RP.shape
    size_R = (counts.counts_RP.sum(dim=1).double() * factor / num_slots).ceil().long()
    kept_RP = counts.counts_RP.minimum(size_R[:, None])
    empty_RP = size_R[:, None] - kept_RP
    empty_RR = empty_RP.unflatten(1, (ep, -1)).sum(dim=2)
    kept_RR = kept_RP.unflatten(1, (ep, -1)).sum(dim=2)
    zeros_R = empty_RR.sum(dim=0)
    dropped_R = (counts.counts_RP - kept_RP).sum(dim=1)
    return _overhead(
        "capacity", kept_RR.sum(dim=0), kept_RR.sum(dim=1), empty_RR.sum(dim=1) + zeros_R, zeros_R, dropped_R
    )


def _forced_like(counts: CountMatrix) -> CountMatrix:
    """Round robin over as many assignments as each rank has."""
    rows = [forced_counts(int(n), 1, counts.counts_RP.shape[1], 1).counts_RP for n in counts.counts_RP.sum(dim=1)]
    return CountMatrix(counts_RP=torch.cat(rows), reason="forced")


def _overhead(policy: str, *by_rank: Tensor) -> Overhead:
    rows_R, sent_R, exchange_zeros_R, expert_zeros_R, *dropped = (tuple(t.tolist()) for t in by_rank)
    return Overhead(policy, rows_R, sent_R, exchange_zeros_R, expert_zeros_R, (dropped or [(0,) * len(rows_R)])[0])


class Traffic(NamedTuple):
    """Rows that leave each rank in one dispatch.

    `per_assignment_R`: one row for each assignment to another rank, as an all-to-all sends them. De-duplicated:
    `per_rank_R` one row for each pair of a token and another rank, `per_node_R` for each pair of a token and
    another node; None where ids are not known.
    """

    per_assignment_R: tuple[int, ...]
    per_rank_R: tuple[int, ...] | None
    per_node_R: tuple[int, ...] | None


def traffic(
    source: CountMatrix | Sequence[Tensor],
    placement: Placement,
    *,
    ranks_per_node: int = 8,
    distinct: bool = True,
) -> Traffic:
    """What leaves each rank, from each rank's expert ids (T, K); dropped ones (-1) do not travel.

    From counts alone only with `distinct=False`: which assignments share a token is not in them (`ValueError`).
    Nodes hold consecutive ranks.
    """
    check_int("ranks_per_node", ranks_per_node, 1)
    counts = source if isinstance(source, CountMatrix) else count_matrix(source, placement)
    leaving_R = counts.splits_RR.sum(dim=1) - counts.splits_RR.diagonal()
    per_assignment_R = tuple(leaving_R.tolist())
    if not distinct:
        return Traffic(per_assignment_R, None, None)
    if isinstance(source, CountMatrix):
        raise ValueError("distinct=True needs expert ids: counts do not tell which assignments share a token")
    per_rank, per_node = [], []
    for rank, ids_TK in enumerate(source):
        slot_TK = placement.slot_ids(ids_TK.long())
        rank_TK = torch.where(slot_TK < 0, -1, slot_TK.div(placement.slots_per_rank, rounding_mode="floor"))
        node_TK = torch.where(rank_TK < 0, -1, rank_TK.div(ranks_per_node, rounding_mode="floor"))
        per_rank.append(_distinct(rank_TK, rank))
        per_node.append(_distinct(node_TK, rank // ranks_per_node))
    return Traffic(per_assignment_R, tuple(per_rank), tuple(per_node))


def _distinct(target_TK: Int[Tensor, "T K"], own: int) -> int:
    """Pairs of a token and a target other than its own, each counted once."""
    sorted_TK = target_TK.sort(dim=1).values
    first_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
    first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return int((first_TK & (sorted_TK >= 0) & (sorted_TK != own)).sum())


def micro_batches(
    trace: RoutingTrace, layer: int, ep: int, tokens_per_rank: int, *, shuffle: bool = True
) -> Iterator[list[Tensor]]:
    """Each rank's expert ids, one micro-batch after another, a rest left out.

    Documents are packed in a shuffled order, as training does; `shuffle=False` keeps the recorded order, whose
    runs of one domain put skew on ranks that no training run would see. `ValueError` for an unknown layer and
    when the trace does not fill one micro-batch.
    """
    check_choice("layer", layer, trace.info.layers)
    check_int("ep", ep, 1)
    check_int("tokens_per_rank", tokens_per_rank, 1)
    order_T = packing_order(trace) if shuffle else torch.arange(trace.num_tokens)
    order_T = order_T[trace.valid_T[order_T]]
    size = ep * tokens_per_rank
    if len(order_T) < size:
        raise ValueError(
            f"tokens_per_rank={tokens_per_rank} on ep={ep} ranks is {size:,} tokens: this trace has {len(order_T):,}"
        )
    ids_TK = trace.expert_ids_LTK[trace.info.layers.index(layer)]
    for start in range(0, len(order_T) - size + 1, size):
        yield list(ids_TK[order_T[start : start + size]].long().split(tokens_per_rank))


class ThresholdPoint(NamedTuple):
    """One adaptive threshold over many micro-batches: how many ran padded, and the zero rows that took."""

    threshold: float
    micro_batches: int
    padded: int
    overhead: float

    @property
    def share_padded(self) -> float:
        """Share of micro-batches that ran with even splits."""
        return self.padded / self.micro_batches


def sweep_threshold(matrices: Sequence[CountMatrix], thresholds: Sequence[float]) -> list[ThresholdPoint]:
    """How often each threshold pads, and zero rows over real rows in all exchanges. `ValueError` without matrices."""
    if not matrices:
        raise ValueError("matrices is empty: a sweep needs at least one micro-batch")
    points = []
    for threshold in thresholds:
        found = [overhead(counts, "adaptive", threshold=threshold) for counts in matrices]
        padded = sum(
            isinstance(choose_splits(counts.splits_RR, "adaptive", threshold), EqualSplits) for counts in matrices
        )
        zeros = sum(sum(one.exchange_zeros_R) for one in found)
        real = sum(sum(one.sent_R) + sum(one.rows_R) for one in found)
        points.append(ThresholdPoint(threshold, len(matrices), padded, _ratio(zeros, real)))
    return points


class ForcedView(NamedTuple):
    """Forced balance beside the routing it stands for, over the same micro-batch.

    `idle_ranks` receive nothing under round robin. Straggler factors: rows of the busiest rank over the mean.
    Ranks a token visits (itself included), on average: what a de-duplicating exchange would send.
    """

    idle_ranks: int
    straggler_factor: float
    forced_straggler_factor: float
    ranks_per_token: float
    forced_ranks_per_token: float


def forced_view(expert_ids: Sequence[Tensor], placement: Placement) -> ForcedView:
    """What an instrument that forces balance does not see."""
    forced = [(torch.arange(ids_TK.numel()) % placement.num_experts).view_as(ids_TK) for ids_TK in expert_ids]
    real_counts, forced_matrix = count_matrix(expert_ids, placement), count_matrix(forced, placement)
    tokens = sum(len(ids_TK) for ids_TK in expert_ids)

    def visited(ids: Sequence[Tensor]) -> float:
        slots = [placement.slot_ids(ids_TK.long()) for ids_TK in ids]
        ranks = [torch.where(s < 0, -1, s.div(placement.slots_per_rank, rounding_mode="floor")) for s in slots]
        return _ratio(sum(_distinct(rank_TK, -1) for rank_TK in ranks), tokens)

    return ForcedView(
        idle_ranks=int((forced_matrix.splits_RR.sum(dim=0) == 0).sum()),
        straggler_factor=overhead(real_counts).straggler_factor,
        forced_straggler_factor=overhead(forced_matrix).straggler_factor,
        ranks_per_token=visited(expert_ids),
        forced_ranks_per_token=visited(forced),
    )


def worst_overhead(counts: CountMatrix) -> float:
    """The worst rank's overhead of even splits: what `adaptive` compares with its threshold."""
    return max(padding_overhead(counts.splits_RR))
