"""Who sends how much to whom: one matrix of counts, the same on every rank, and the splits it decides.

Every decision here is a function of the matrix and the settings alone, so that ranks cannot disagree. A rank that
decided from its own splits would now and then choose another kind of exchange than its peers, and hang.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import EqualSplit, check_choice, check_int, check_threshold


@dataclass(frozen=True, kw_only=True, eq=False)
class CountMatrix:
    """`counts_RP[s, p]`: rows that rank s sends to slot p, on the CPU; slots lie rank by rank.

    `reason` says where the counts come from.
    """

    counts_RP: Int[Tensor, "R P"]
    reason: str = "gathered"

    @property
    def ep(self) -> int:
        """Ranks of the mesh."""
        return self.counts_RP.shape[0]

    @cached_property
    def splits_RR(self) -> Int[Tensor, "R R"]:
        """Rows that rank s sends to rank r, at [s, r]."""
        return self.counts_RP.unflatten(1, (self.ep, -1)).sum(dim=2)

    def received_by(self, rank: int) -> Int[Tensor, "R e"]:
        """Rows of each source rank and local slot that arrive at `rank`."""
        return self.counts_RP.unflatten(1, (self.ep, -1))[:, rank]

    @cached_property
    def uniform_counts(self) -> tuple[int, ...] | None:
        """Rows of a segment on each rank, if on every rank all segments are equal; else None."""
        counts_RRe = self.counts_RP.unflatten(1, (self.ep, -1)).transpose(0, 1)
        first_R = counts_RRe[:, 0, 0]
        if not torch.equal(counts_RRe, first_R[:, None, None].expand_as(counts_RRe)):
            return None
        return tuple(first_R.tolist())


def forced_counts(num_tokens: int, top_k: int, num_experts: int, ep: int) -> CountMatrix:
    """The matrix of round-robin routing where every rank has `num_tokens` tokens: nothing to exchange.

    Assignment i of N = T*K goes to expert i mod E, so expert x gets N // E, and one more if x < N mod E.
    Experts are placed block-wise, one slot each.
    """
    check_int("num_tokens", num_tokens, 0)
    assignments = num_tokens * top_k
    counts_E = assignments // num_experts + (torch.arange(num_experts) < assignments % num_experts).long()
    reason = f"analytic: {num_tokens} tokens x {top_k} on each rank, round robin over {num_experts} experts"
    return CountMatrix(counts_RP=counts_E.repeat(ep, 1), reason=reason)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnequalSplits:
    """Every segment as long as it is: `splits_RR[s, r]` rows from rank s to rank r."""

    splits_RR: Int[Tensor, "R R"]
    reason: str

    def send(self, rank: int) -> list[int]:
        """Rows to each rank."""
        return self.splits_RR[rank].tolist()

    def receive(self, rank: int) -> list[int]:
        """Rows from each rank."""
        return self.splits_RR[:, rank].tolist()

    def padded_rows(self, rank: int) -> int:
        """Zero rows sent: none."""
        return 0


@dataclass(frozen=True, kw_only=True, eq=False)
class EqualSplits:
    """Every segment padded with zero rows at its end to the mesh-wide largest, so the exchange is an even one.

    `splits_RR[s, r]` rows from rank s to rank r before padding; `size` rows of a padded segment.
    """

    splits_RR: Int[Tensor, "R R"]
    size: int
    reason: str

    def send(self, rank: int) -> None:
        """None, as `torch.distributed` says even splits."""
        return

    def receive(self, rank: int) -> None:
        """None, as `torch.distributed` says even splits."""
        return

    def padded_rows(self, rank: int) -> int:
        """Zero rows that a rank sends."""
        return self.size * len(self.splits_RR) - int(self.splits_RR[rank].sum())


def padding_overhead(splits_RR: Int[Tensor, "R R"]) -> list[float]:
    """Zero rows over real rows, sends and receives together, by rank; infinite where only zeros would travel."""
    size, ep = (int(splits_RR.max()) if splits_RR.numel() else 0), len(splits_RR)
    real_R = (splits_RR.sum(dim=1) + splits_RR.sum(dim=0)).tolist()
    return [(2 * ep * size - real) / real if real else (math.inf if size else 0.0) for real in real_R]


def choose_splits(
    splits_RR: Int[Tensor, "R R"], equal_split: EqualSplit = "off", threshold: float = 0.10
) -> UnequalSplits | EqualSplits:
    """Pad or not, from the whole mesh's splits.

    `adaptive` pads when the worst rank's overhead (see `padding_overhead`) is at most `threshold`. A mesh without
    any real row never pads. `ValueError` for an unknown kind, or a threshold that is NaN or negative.
    """
    check_choice("equal_split", equal_split, ("off", "adaptive", "force"))
    check_threshold("equal_split_threshold", threshold)
    size = int(splits_RR.max()) if splits_RR.numel() else 0
    if equal_split == "off":
        return UnequalSplits(splits_RR=splits_RR, reason="equal_split='off'")
    if size == 0:
        return UnequalSplits(splits_RR=splits_RR, reason="no rows in the whole mesh")
    worst = max(padding_overhead(splits_RR))
    if equal_split == "force":
        return EqualSplits(splits_RR=splits_RR, size=size, reason=f"forced: worst overhead {worst:.3f}")
    if worst <= threshold:
        reason = f"adaptive: worst overhead {worst:.3f} <= {threshold:.3f}"
        return EqualSplits(splits_RR=splits_RR, size=size, reason=reason)
    return UnequalSplits(splits_RR=splits_RR, reason=f"adaptive: worst overhead {worst:.3f} > {threshold:.3f}")
