"""The integers of a dispatch over many ranks: own order, everybody's counts, splits, reordering and padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Int, Int32
from torch import Tensor

from moe_lab import fastpaths
from moe_lab.config import MoEConfig
from moe_lab.layer.padding import RowPadding, round_up
from moe_lab.layer.placement import Placement
from moe_lab.layer.plan import DispatchPlan, plan_local
from moe_lab.layer.reorder import EqualCountReorder, IndexReorder, SegmentCatReorder, choose_reorder
from moe_lab.layer.splits import CountMatrix, EqualSplits, UnequalSplits, choose_splits, forced_counts


@dataclass(frozen=True, kw_only=True, eq=False)
class ExchangePlan:
    """Where every assignment of one rank goes in the mesh, and what comes to its experts.

    `local`: this rank's assignments sorted by slot, which is the order they are sent in; `counts`: the matrix that
    decided the rest; `counts_E`: this rank's assignments by logical expert.
    """

    rank: int
    local: DispatchPlan
    counts: CountMatrix
    counts_E: Int[Tensor, " E"]
    splits: UnequalSplits | EqualSplits
    reorder: IndexReorder | EqualCountReorder | SegmentCatReorder
    pad_multiple: int
    device: torch.device

    @property
    def send_splits(self) -> list[int] | None:
        """Rows to each rank, padding included; None when even."""
        return self.splits.send(self.rank)

    @property
    def receive_splits(self) -> list[int] | None:
        """Rows from each rank, padding included; None when even."""
        return self.splits.receive(self.rank)

    @cached_property
    def received_e(self) -> Int[Tensor, " e"]:
        """Real rows that arrive for each local slot."""
        return self.counts.received_by(self.rank).sum(dim=0)

    @cached_property
    def ends_E(self) -> Int32[Tensor, " e"]:
        """Row after each local slot's last, padding included, on the device of the rows."""
        return round_up(self.received_e, self.pad_multiple).cumsum(0).int().to(self.device)

    @cached_property
    def send_padding(self) -> RowPadding | None:
        """Zero rows at the end of each segment that is sent."""
        return self._segment_padding(self.splits.splits_RR[self.rank])

    @cached_property
    def receive_padding(self) -> RowPadding | None:
        """Zero rows at the end of each segment that is received."""
        return self._segment_padding(self.splits.splits_RR[:, self.rank])

    def _segment_padding(self, rows_R: Tensor) -> RowPadding | None:
        if not isinstance(self.splits, EqualSplits):
            return None
        return RowPadding.of(rows_R, torch.full_like(rows_R, self.splits.size), self.device)

    @cached_property
    def expert_padding(self) -> RowPadding | None:
        """Zero rows at the end of each local expert's rows."""
        return RowPadding.of(self.received_e, round_up(self.received_e, self.pad_multiple), self.device)


def make_plan(
    rank: int,
    local: DispatchPlan,
    counts: CountMatrix,
    counts_E: Int[Tensor, " E"],
    *,
    config: MoEConfig,
) -> ExchangePlan:
    """Everything that follows from one rank's order and the mesh's counts. Pure, but for the record of decisions."""
    splits = choose_splits(counts.splits_RR, config.equal_split, config.equal_split_threshold)
    return ExchangePlan(
        rank=rank,
        local=local,
        counts=counts,
        counts_E=counts_E,
        splits=splits,
        reorder=choose_reorder(counts, rank, config.reorder, local.order_R.device),
        pad_multiple=config.pad_multiple,
        device=local.order_R.device,
    )


def direct_reason(config: MoEConfig, placement: Placement) -> str | None:
    """Why token t can be sent to rank t mod EP by strided slices, or None: see `direct_refusal`.

    With round robin and as many choices as a rank has experts, E = EP * K, token t's K choices are the K experts of
    one rank.
    """
    if direct_refusal(config, placement) is not None:
        return None
    return f"top_k={config.top_k} is the number of local experts: token t goes to rank t mod {placement.ep}"


def direct_refusal(config: MoEConfig, placement: Placement) -> str | None:
    """Why strided slices would not do, or None. Rows scaled before the experts need their gates, and so their order."""
    if config.score_before_experts:
        return "rows are scaled before the experts"
    if not placement.is_identity:
        return "experts are not placed block-wise, one slot each"
    if config.top_k != placement.slots_per_rank:
        return f"top_k={config.top_k}, but a rank has {placement.slots_per_rank} experts"
    return None


@lru_cache(maxsize=8)
def forced_order(num_tokens: int, top_k: int, num_experts: int, device: torch.device) -> DispatchPlan:
    """The sort of round-robin assignments, once a shape."""
    ids_N = torch.arange(num_tokens * top_k, device=device) % num_experts
    return plan_local(ids_N.view(num_tokens, top_k), num_experts)


def forced_matrix(num_tokens: int, config: MoEConfig, placement: Placement) -> CountMatrix:
    """`forced_counts` in slots, where every expert has one."""
    counts = forced_counts(num_tokens, config.top_k, config.num_experts, placement.ep)
    if placement.is_identity:
        return counts
    return CountMatrix(counts_RP=counts.counts_RP[:, list(placement.expert_of_slot)], reason=counts.reason)


def note_padding(plan: ExchangePlan, config: MoEConfig, *, analytic: bool, direction: str) -> None:
    """Put the choice of splits, its padded rows and its overhead (in basis points) on the record."""
    kind = "equal_a2a_padding" if analytic else "normal_equal_a2a_padding"
    if config.equal_split == "adaptive" and not analytic and direction == "dispatch":
        suffix = "dispatch" if isinstance(plan.splits, EqualSplits) else "skip"
        fastpaths.note(f"{kind}_adaptive_{suffix}", plan.splits.reason)
    if isinstance(plan.splits, EqualSplits):
        fastpaths.note(f"{kind}_{direction}", plan.splits.reason)
        sent_R = plan.splits.splits_RR[plan.rank] if direction == "dispatch" else plan.splits.splits_RR[:, plan.rank]
        real = int(sent_R.sum())  # combine sends back what dispatch received
        padded = plan.splits.size * len(sent_R) - real
        fastpaths.note("padded_rows", direction, padded)
        if real:
            fastpaths.note("padding_overhead_bp", direction, round(10_000 * padded / real))
