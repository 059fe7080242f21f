import pytest
import torch

from moe_lab import LocalTokenDispatcher, RouterConfig, fastpaths
from moe_lab.config import CombineArm
from moe_lab.layer.combine import COMBINE_ARMS
from moe_lab.layer.router import Routing, count, route
from reference import relative_error

ARMS = pytest.mark.parametrize("combine", COMBINE_ARMS)
BEFORE = pytest.mark.parametrize("before", [False, True], ids=["after", "before"])


def routed(num_tokens=20, num_experts=6, top_k=3, dtype=torch.float32):
    return route(torch.randn(num_tokens, num_experts, dtype=dtype), RouterConfig(), top_k)


def test_every_arm_of_the_config_is_here():
    assert tuple(COMBINE_ARMS) == CombineArm.__args__


def test_rows_lie_expert_by_expert_in_token_order():
    ids_TK = torch.tensor([[2, 0], [0, 2], [2, 1]])
    routing = Routing(torch.ones(3, 2), ids_TK, torch.ones(3, 4), torch.ones(3, 4), count(ids_TK, 4))
    x_TD = torch.arange(3.0)[:, None].expand(3, 2)
    rows_RD, plan = LocalTokenDispatcher(4).dispatch(x_TD, routing)
    assert rows_RD[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert plan.ends_E.tolist() == [2, 3, 6, 6]
    assert plan.counts_E is routing.counts_E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_before_experts_multiply_rows_wide_and_round_once(dtype):
    routing, x_TD = routed(), torch.randn(20, 8).to(dtype)  # float32 gates, as a trace holds them
    rows_RD, plan = LocalTokenDispatcher(6, score_before_experts=True).dispatch(x_TD, routing)
    wide = torch.promote_types(dtype, torch.float32)
    gate_R = routing.gates_TK.flatten()[plan.order_R].to(wide)
    assert torch.equal(rows_RD, (x_TD[plan.token_R].to(wide) * gate_R[:, None]).to(dtype))


@ARMS
@BEFORE
@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_there_and_back_is_the_sum_of_the_gates(combine, before, num_tokens):
    routing = routed(num_tokens, dtype=torch.float64)
    x_TD = torch.randn(num_tokens, 8, dtype=torch.float64)
    dispatcher = LocalTokenDispatcher(6, combine=combine, score_before_experts=before)
    rows_RD, plan = dispatcher.dispatch(x_TD, routing)
    out_TD = dispatcher.combine(rows_RD, routing, plan)
    torch.testing.assert_close(out_TD, x_TD * routing.gates_TK.sum(dim=1, keepdim=True), rtol=1e-15, atol=1e-15)


@ARMS
@BEFORE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_input_and_gates(combine, before, dtype):
    routing, x_TD, probe_TD = routed(200), torch.randn(200, 8).to(dtype), torch.randn(200, 8).to(dtype)
    dispatcher = LocalTokenDispatcher(6, combine=combine, score_before_experts=before)
    leaves = [t.detach().requires_grad_() for t in (x_TD, routing.gates_TK)]
    rows_RD, plan = dispatcher.dispatch(leaves[0], routing._replace(gates_TK=leaves[1]))
    out_TD = dispatcher.combine(rows_RD.tanh(), routing._replace(gates_TK=leaves[1]), plan)
    got = torch.autograd.grad(out_TD, leaves, probe_TD)

    def loop(dtype):
        """Slot by slot, in the order of slots; rows in `dtype`, gates and sums in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        x, gates = x_TD.to(wide).requires_grad_(), routing.gates_TK.to(wide).requires_grad_()
        out = torch.zeros_like(x)
        for gate in gates.split(1, dim=1):
            row = (x.to(dtype) * (gate if before else 1)).to(dtype).tanh()
            out = out + row.to(wide) * (1 if before else gate)
        return [g.to(leaf.dtype) for g, leaf in zip(torch.autograd.grad(out, (x, gates), probe_TD.to(wide)), leaves)]

    low = loop(dtype)
    leaves = [t.double() for t in leaves]
    for g, own, exact in zip(got, low, loop(torch.float64)):
        assert relative_error(g, exact) <= 2 * relative_error(own, exact)


@BEFORE
def test_arms_agree_in_float64(before):
    routing, rows = routed(dtype=torch.float64), []
    for combine in COMBINE_ARMS:
        dispatcher = LocalTokenDispatcher(6, combine=combine, score_before_experts=before)
        rows_RD, plan = dispatcher.dispatch(torch.ones(20, 8, dtype=torch.float64), routing)
        rows.append(dispatcher.combine(rows_RD * torch.arange(1.0, 61)[:, None], routing, plan))
    torch.testing.assert_close(*rows, rtol=1e-14, atol=0)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=r"^combine='atomic' is not known: choose one of 'gather', 'scatter_add'"):
        LocalTokenDispatcher(4, combine="atomic")


def test_dropped_assignments_are_refused():
    routing = routed(3)
    routing.expert_ids_TK[1, 0] = -1
    with pytest.raises(ValueError, match=r"expert_ids_TK holds 1 dropped assignments"):
        LocalTokenDispatcher(6).dispatch(torch.zeros(3, 8), routing)


@pytest.mark.parametrize(
    ("dtype", "before", "name"),
    [
        (torch.float32, False, "score_after_experts"),
        (torch.bfloat16, False, "score_after_experts_bf16"),
        (torch.bfloat16, True, "score_before_experts"),
    ],
)
def test_where_scores_are_applied_is_on_the_record(dtype, before, name):
    dispatcher, routing = LocalTokenDispatcher(6, score_before_experts=before), routed()
    with fastpaths.record() as record:
        rows_RD, plan = dispatcher.dispatch(torch.zeros(20, 8, dtype=dtype), routing)
        dispatcher.combine(rows_RD, routing, plan)
    assert {name: entry.count for name, entry in record.entries.items()} == {name: 1}
