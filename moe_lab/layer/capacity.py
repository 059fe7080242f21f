"""Dropping what an expert has no room for, as GShard and Switch Transformer do."""

from __future__ import annotations

import math

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import DropPolicy, check_choice
from moe_lab.layer.router import Routing, count


def capacity(num_tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Assignments an expert takes of one rank's forward: ceil(T * K / E * capacity_factor)."""
    return math.ceil(num_tokens * top_k / num_experts * capacity_factor)


def drop_over_capacity(
    routing: Routing, capacity_factor: float, policy: DropPolicy = "probs", *, slot_major: bool = False
) -> Routing:
    """The routing that is left when every expert takes `capacity` assignments and no more.

    `probs` keeps the highest final gates (Megatron-Core's default), of equal ones the earliest; `position` keeps the
    earliest. Earlier is a lower token, then a lower slot; with `slot_major` every token's first choice comes before
    any second one (GShard, arXiv:2006.16668). Dropped assignments get id -1 and gate 0; the gates that stay are
    not normalised again. Counts become those that are kept; `requested_E` keeps what was asked for.
    """
    check_choice("policy", policy, ("probs", "position"))
    num_tokens, top_k = routing.expert_ids_TK.shape
    num_experts = routing.counts_E.numel()
    room = capacity(num_tokens, top_k, num_experts, capacity_factor)
    ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
    if slot_major:
        kept_TK = _kept(ids_TK.T, gates_TK.T, policy, room, num_experts).T
    else:
        kept_TK = _kept(ids_TK, gates_TK, policy, room, num_experts)
    ids_TK = ids_TK.masked_fill(~kept_TK, -1)
    return routing._replace(
        gates_TK=gates_TK.masked_fill(~kept_TK, 0),
        expert_ids_TK=ids_TK,
        counts_E=count(ids_TK, num_experts),
        requested_E=routing.counts_E if routing.requested_E is None else routing.requested_E,
    )


def _kept(ids: Int[Tensor, ...], gates: Tensor, policy: str, room: int, num_experts: int) -> Tensor:
    """Which assignments fit, in the order in which they lie."""
    ids_N, gates_N = ids.reshape(-1), gates.detach().reshape(-1)
    order_N = torch.arange(ids_N.numel(), device=ids.device)
    if policy == "probs":
        order_N = gates_N.argsort(descending=True, stable=True)
    order_N = order_N[ids_N[order_N].argsort(stable=True)]  # by expert, and by rank within
    sorted_N = ids_N[order_N]
    place_N = torch.arange(ids_N.numel(), device=ids.device) - torch.searchsorted(sorted_N, sorted_N)
    kept_N = torch.empty_like(ids_N, dtype=torch.bool)
    kept_N[order_N] = (place_N < room) & (sorted_N >= 0)
    return kept_N.view(ids.shape)
