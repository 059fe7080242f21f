"""Forced balance as an instrument: what a benchmark that routes round robin does not see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.layer.placement import Placement
from moe_lab.study.batches import count_matrix
from moe_lab.study.padding import overhead, ratio
from moe_lab.study.traffic import Traffic, traffic, visits


class ForcedView(NamedTuple):
    """Round robin beside the routing it stands for, over the same micro-batch.

    `idle_ranks` receive nothing under round robin. Straggler factors: rows of the busiest rank over the mean.
    `ranks_per_token`: ranks a token visits, its own included, on average.
    """

    idle_ranks: int
    straggler_factor: float
    forced_straggler_factor: float
    ranks_per_token: float
    forced_ranks_per_token: float
    traffic: Traffic
    forced_traffic: Traffic

    def seen(self, level: str) -> float:
        """Rows that leave ranks under round robin over those of the real routing; `level` is a field of `Traffic`."""
        return ratio(sum(getattr(self.forced_traffic, level)), sum(getattr(self.traffic, level)))


def forced_ids(expert_ids: Sequence[Tensor], num_experts: int) -> list[Tensor]:
    """Round robin in place of each rank's ids: assignment i goes to expert i mod E."""
    return [(torch.arange(ids_TK.numel()) % num_experts).view_as(ids_TK) for ids_TK in expert_ids]


def forced_view(expert_ids: Sequence[Tensor], placement: Placement, *, ranks_per_node: int = 8) -> ForcedView:
    """Compare one micro-batch with round robin over as many assignments."""
    forced = forced_ids(expert_ids, placement.num_experts)
    counts, forced_counts = count_matrix(expert_ids, placement), count_matrix(forced, placement)
    return ForcedView(
        idle_ranks=int((forced_counts.splits_RR.sum(dim=0) == 0).sum()),
        straggler_factor=overhead(counts).straggler_factor,
        forced_straggler_factor=overhead(forced_counts).straggler_factor,
        ranks_per_token=visits(expert_ids, placement),
        forced_ranks_per_token=visits(forced, placement),
        traffic=traffic(expert_ids, placement, ranks_per_node=ranks_per_node),
        forced_traffic=traffic(forced, placement, ranks_per_node=ranks_per_node),
    )
