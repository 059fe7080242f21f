"""What leaves each rank in a dispatch: a row an assignment, or once for each rank or node that a token visits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.batches import count_matrix


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
    for rank, rank_TK in enumerate(ranks_of(source, placement)):
        node_TK = torch.where(rank_TK < 0, -1, rank_TK.div(ranks_per_node, rounding_mode="floor"))
        per_rank.append(_distinct(rank_TK, rank))
        per_node.append(_distinct(node_TK, rank // ranks_per_node))
    return Traffic(per_assignment_R, tuple(per_rank), tuple(per_node))


def visits(source: Sequence[Tensor], placement: Placement) -> float:
    """Ranks that hold some choice of a token, its own among them, averaged over all tokens; 0 without tokens."""
    visited = sum(_distinct(rank_TK, -1) for rank_TK in ranks_of(source, placement))
    tokens = sum(len(ids_TK) for ids_TK in source)
    return visited / tokens if tokens else 0.0


def ranks_of(source: Sequence[Tensor], placement: Placement) -> Iterator[Int[Tensor, "T K"]]:
    """The rank that each assignment goes to, -1 where it was dropped."""
    for ids_TK in source:
        slot_TK = placement.slot_ids(ids_TK.long())
        yield torch.where(slot_TK < 0, -1, slot_TK.div(placement.slots_per_rank, rounding_mode="floor"))


def _distinct(target_TK: Int[Tensor, "T K"], own: int) -> int:
    """Pairs of a token and a target other than its own, each counted once."""
    sorted_TK = target_TK.sort(dim=1).values
    first_TK = torch.ones_like(sorted_TK, dtype=torch.bool)
    first_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return int((first_TK & (sorted_TK >= 0) & (sorted_TK != own)).sum())
