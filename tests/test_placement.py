import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.layer.placement import Placement
from moe_lab.layer.router import count


def test_blockwise_gives_each_rank_a_block():
    placement = Placement.blockwise(12, 4)
    assert [placement.experts_of(rank) for rank in range(4)] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    assert placement.is_identity
    assert not placement.has_replicas


def test_indivisible_experts_are_refused_with_both_numbers_and_the_choices():
    message = (
        "num_experts=36 cannot be spread over ep=8 ranks (36 % 8 = 4): choose ep from 1, 2, 3, 4, 6, 9, 12, 18, 36, "
        "or a placement with replicas"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Placement.blockwise(36, 8)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((0, 1, 2), "expert_of_slot has 3 slots, which ep=2 does not divide"),
        ((0, 1, 1, 0), r"leaves out experts \[2\] and names \[\]"),
        ((0, 1, 2, 3), r"leaves out experts \[\] and names \[3\]"),
    ],
)
def test_slots_must_hold_every_expert_and_divide(slots, message):
    with pytest.raises(ValueError, match=message):
        Placement(3, 2, slots)


def test_replicas_take_turns_by_assignment():
    placement = Placement(3, 2, (0, 1, 2, 0))  # expert 0 in slots 0 and 3
    ids_TK = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 0]])
    # Assignments of expert 0 are 0, 2, 5 and 7: even ones to its first replica, odd ones to its second.
    assert placement.slot_ids(ids_TK).tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]


def test_replicas_of_busy_experts_even_out_the_ranks():
    # Two ranks of three slots: spare ones to expert 0 (12, then 6 a replica) and, of 6 and 8, to expert 1 (4 each).
    # Fullest first: 0 on both ranks; 1 on both, now 10 | 10; 2 (2 rows) on rank 0, 3 (1 row) where room is left.
    placement = Placement.replicated([12, 8, 2, 1], 2)
    assert [placement.experts_of(rank) for rank in range(2)] == [(0, 1, 2), (0, 1, 3)]


def test_replicas_let_any_number_of_ranks_share_the_experts():
    placement = Placement.replicated([1] * 36, 8)
    assert (placement.num_slots, placement.slots_per_rank) == (40, 5)
    assert Placement.replicated([1, 2], 1).experts_of(0) == (0, 1, 1)
    assert all(len(set(placement.experts_of(rank))) == 5 for rank in range(8))


@st.composite
def placements(draw):
    num_experts, ep = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    extra = draw(st.lists(st.integers(0, num_experts - 1), max_size=6))
    slots = [*range(num_experts), *extra]
    slots += [0] * (-len(slots) % ep)
    return num_experts, ep, tuple(draw(st.permutations(slots)))


@settings(max_examples=50)
@given(placements(), st.lists(st.integers(-1, 5), max_size=24))
def test_every_assignment_goes_to_a_slot_of_its_expert(slots_of, ids):
    placement = Placement(*slots_of)
    ids_TK = torch.tensor(ids, dtype=torch.int64).clamp(max=placement.num_experts - 1).view(-1, 1)
    slots = placement.slot_ids(ids_TK).flatten().tolist()
    for i, (slot, expert) in enumerate(zip(slots, ids_TK.flatten().tolist())):
        replicas = [p for p, x in enumerate(placement.expert_of_slot) if x == expert]
        assert slot == (replicas[i % len(replicas)] if expert >= 0 else -1)
    counts_P = count(torch.tensor(slots, dtype=torch.int64).view(-1, 1), placement.num_slots)
    assert torch.equal(placement.logical_counts(counts_P), count(ids_TK, placement.num_experts))
