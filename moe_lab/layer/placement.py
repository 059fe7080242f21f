"""Where experts live: which logical expert is in each physical slot, and which rank holds the slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import check_int


@dataclass(frozen=True)
class Placement:
    """Slot p holds logical expert `expert_of_slot[p]` and lives on rank p // slots_per_rank.

    An expert in several slots is replicated: assignment (t, k) goes to its replica (t*K + k) mod replicas, in the
    order of slots. Raises `ValueError` unless the slots divide over the ranks and every expert has one.
    """

    num_experts: int
    ep: int
    expert_of_slot: tuple[int, ...]

    def __post_init__(self) -> None:
        check_int("num_experts", self.num_experts, 1)
        check_int("ep", self.ep, 1)
        if len(self.expert_of_slot) % self.ep:
            raise ValueError(f"expert_of_slot has {len(self.expert_of_slot)} slots, which ep={self.ep} does not divide")
        missing = sorted(set(range(self.num_experts)) - set(self.expert_of_slot))
        unknown = sorted(set(self.expert_of_slot) - set(range(self.num_experts)))
        if missing or unknown:
            raise ValueError(
                f"expert_of_slot leaves out experts {missing} and names {unknown}, which do not exist: "
                f"each of 0..{self.num_experts - 1} needs a slot"
            )

    @classmethod
    def blockwise(cls, num_experts: int, ep: int) -> Placement:
        """Expert x on rank x // (E / EP), one slot an expert. `ValueError` unless E % EP == 0."""
        check_int("num_experts", num_experts, 1)
        check_int("ep", ep, 1)
        if num_experts % ep:
            divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
            raise ValueError(
                f"num_experts={num_experts} cannot be spread over ep={ep} ranks ({num_experts} % {ep} = "
                f"{num_experts % ep}): choose ep from {', '.join(map(str, divisors))}, or a placement with replicas"
            )
        return cls(num_experts, ep, tuple(range(num_experts)))

    @classmethod
    def replicated(cls, counts_E: Sequence[int], ep: int) -> Placement:
        """E // EP + 1 slots a rank, the spare ones for replicas of busy experts: any number of ranks will do.

        Each spare slot goes to the expert with most rows a replica. Then replicas are placed, fullest first, on the
        emptiest rank with room (Graham 1969, "Bounds on Multiprocessing Timing Anomalies"), twice on one rank only if
        no other has room. `counts_E`: rows of each expert, of which its replicas take equal parts.
        """
        room, experts = len(counts_E) // ep + 1, range(len(counts_E))
        replicas = [1] * len(counts_E)
        for _ in range(ep * room - len(counts_E)):
            replicas[max(experts, key=lambda expert: counts_E[expert] / replicas[expert])] += 1
        ranks: list[list[int]] = [[] for _ in range(ep)]
        load_R = [0.0] * ep
        for expert in sorted(experts, key=lambda expert: -counts_E[expert] / replicas[expert]):
            for _ in range(replicas[expert]):
                free = [rank for rank in range(ep) if len(ranks[rank]) < room]
                rank = min(free, key=lambda rank: (expert in ranks[rank], load_R[rank]))
                ranks[rank].append(expert)
                load_R[rank] += counts_E[expert] / replicas[expert]
        return cls(len(counts_E), ep, tuple(expert for local in ranks for expert in sorted(local)))

    @property
    def num_slots(self) -> int:
        """Physical slots over all ranks, P."""
        return len(self.expert_of_slot)

    @property
    def slots_per_rank(self) -> int:
        """Local experts of a rank, e."""
        return self.num_slots // self.ep

    @property
    def is_identity(self) -> bool:
        """Whether slot p is expert p."""
        return self.expert_of_slot == tuple(range(self.num_experts))

    @property
    def has_replicas(self) -> bool:
        """Whether some expert has more than one slot."""
        return self.num_slots > self.num_experts

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """The logical experts in a rank's slots, in slot order."""
        return self.expert_of_slot[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor]:
        """(E, most replicas) slots of each expert, first ones repeated to fill, and (E,) replicas."""
        slots: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.expert_of_slot):
            slots[expert].append(slot)
        most = max(map(len, slots))
        return torch.tensor([s + [0] * (most - len(s)) for s in slots]), torch.tensor([len(s) for s in slots])

    def slot_ids(self, expert_ids_TK: Int[Tensor, "T K"]) -> Int[Tensor, "T K"]:
        """The slot of every assignment; -1 stays -1."""
        if self.is_identity:
            return expert_ids_TK
        slots, replicas_E = (t.to(expert_ids_TK.device) for t in self._slots)
        expert_TK = expert_ids_TK.clamp(min=0)
        assignment_TK = torch.arange(expert_TK.numel(), device=expert_TK.device).view_as(expert_TK)
        slot_TK = slots[expert_TK, assignment_TK % replicas_E[expert_TK]]
        return torch.where(expert_ids_TK < 0, -1, slot_TK)

    def logical_counts(self, counts_xP: Int[Tensor, "*ranks P"]) -> Int[Tensor, "*ranks E"]:
        """Counts by logical expert from counts by physical slot."""
        if self.is_identity:
            return counts_xP
        expert_P = torch.tensor(self.expert_of_slot, device=counts_xP.device)
        return counts_xP.new_zeros(*counts_xP.shape[:-1], self.num_experts).index_add_(-1, expert_P, counts_xP)
