import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.layer.plan import plan_local
from moe_lab.layer.router import count


@st.composite
def assignments(draw, dropped):
    """Expert ids (T, K), repeats within a token allowed, and the number of experts."""
    num_experts = draw(st.sampled_from([1, 2, 7, 255, 256, 40_000]))
    num_tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 4))
    used = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=5)) + [-1] * dropped
    ids = draw(st.lists(st.sampled_from(used), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(ids, dtype=torch.int64).view(num_tokens, top_k), num_experts


def check(plan, ids_TK):
    """What every plan promises, in words of plain Python."""
    num_tokens, top_k = ids_TK.shape
    ids = ids_TK.flatten().tolist()
    kept = [i for i, expert in enumerate(ids) if expert >= 0]
    order, positions = plan.order_R.tolist(), plan.position_TK.flatten().tolist()
    assert order == sorted(kept, key=lambda i: (ids[i], i))  # by expert, stable
    assert positions == [order.index(i) if i in kept else -1 for i in range(len(ids))]  # the inverse
    counts = [0] * plan.num_experts
    for i in kept:
        counts[ids[i]] += 1
    assert plan.counts_E.tolist() == counts
    assert torch.equal(plan.ends_E.long(), plan.counts_E.cumsum(0))
    assert plan.token_R.tolist() == [i // top_k for i in order]
    assert plan.num_rows == len(kept)
    assert plan.may_drop == (len(kept) < num_tokens * top_k)
    assert (plan.counts_E.dtype, plan.ends_E.dtype) == (torch.int64, torch.int32)
    assert (plan.order_R.dtype, plan.position_TK.dtype) == (torch.int64, torch.int64)


@settings(max_examples=60)
@given(assignments(dropped=False))
def test_every_assignment_gets_one_row_sorted_by_expert(case):
    ids_TK, num_experts = case
    check(plan_local(ids_TK, num_experts), ids_TK)
    check(plan_local(ids_TK, num_experts, dropless=False), ids_TK)


@settings(max_examples=60)
@given(assignments(dropped=True))
def test_dropped_assignments_get_no_row(case):
    ids_TK, num_experts = case
    check(plan_local(ids_TK, num_experts, dropless=False), ids_TK)


def test_a_plan_by_hand():
    plan = plan_local(torch.tensor([[2, 0], [0, 2], [2, 1]]), 4)
    assert plan.order_R.tolist() == [1, 2, 5, 0, 3, 4]
    assert plan.position_TK.tolist() == [[3, 0], [1, 4], [5, 2]]
    assert plan.token_R.tolist() == [0, 1, 2, 0, 1, 2]
    assert plan.counts_E.tolist() == [2, 1, 3, 0]
    assert plan.ends_E.tolist() == [2, 3, 6, 6]


def test_counts_that_the_router_has_are_taken_as_they_are():
    ids_TK = torch.tensor([[2, 0], [0, 2]])
    counts_E = count(ids_TK, 3)
    assert plan_local(ids_TK, 3, counts_E=counts_E).counts_E is counts_E


def test_a_plan_leaves_its_ids_alone():
    ids_TK = torch.tensor([[1, 0], [-1, 1]])
    before = ids_TK.clone()
    plan_local(ids_TK, 2, dropless=False)
    assert torch.equal(ids_TK, before)


@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("bad", [-2, 4])
def test_ids_outside_the_layout_are_refused(bad, dropless):
    with pytest.raises(ValueError, match=rf"expert_ids_TK holds id {bad}: allowed are 0\.\.3, and -1"):
        plan_local(torch.tensor([[0, 1], [bad, 2]]), 4, dropless=dropless)


def test_dropped_ids_are_refused_where_every_assignment_must_have_a_row():
    with pytest.raises(ValueError, match=r"expert_ids_TK holds 2 dropped assignments \(-1\).*dropless=False"):
        plan_local(torch.tensor([[0, -1], [-1, 2]]), 4)


def test_wrong_counts_are_caught_by_debug_contracts(monkeypatch):
    monkeypatch.setenv("MOE_LAB_DEBUG_CONTRACTS", "1")
    ids_TK = torch.tensor([[2, 0], [0, 2]])
    plan_local(ids_TK, 3, counts_E=torch.tensor([2, 0, 2]))
    with pytest.raises(ValueError, match=r"counts_E=\[2, 1, 1\]"):
        plan_local(ids_TK, 3, counts_E=torch.tensor([2, 1, 1]))
