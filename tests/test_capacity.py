"""Drops: who stays, what their gates are, and that the layer leaves the rest out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab import MoE, MoEConfig, RouterConfig
from moe_lab.layer.capacity import capacity, drop_over_capacity
from moe_lab.layer.router import Routing, count, route


def routing_of(ids_TK, gates_TK, experts):
    ids_TK, gates_TK = torch.tensor(ids_TK), torch.tensor(gates_TK)
    nothing_TE = torch.zeros(len(ids_TK), experts)
    return Routing(gates_TK, ids_TK, nothing_TE, nothing_TE, count(ids_TK, experts))


def test_capacity_by_hand():
    assert capacity(4, 2, 3, 1.0) == 3  # ceil(8 / 3)
    assert capacity(4, 2, 4, 1.25) == 3  # ceil(2.5)
    assert capacity(4, 2, 4, 0.5) == 1


def test_who_stays_by_hand():
    ids_TK = [[0, 1], [1, 0], [0, 2], [0, 1]]
    gates_TK = [[0.5, 0.4], [0.6, 0.3], [0.7, 0.2], [0.5, 0.1]]
    routing = routing_of(ids_TK, gates_TK, 4)  # capacity 2
    probs = drop_over_capacity(routing, 1.0, "probs")
    assert routing.requested_E is None
    assert probs.requested_E.tolist() == [4, 3, 1, 0]
    assert drop_over_capacity(probs, 0.5, "probs").requested_E.tolist() == [4, 3, 1, 0]
    assert int((probs.requested_E - probs.counts_E).sum()) == probs.num_dropped
    assert probs.expert_ids_TK.tolist() == [[0, 1], [1, -1], [0, 2], [-1, -1]]  # of two gates 0.5 the earlier stays
    assert torch.equal(probs.gates_TK, torch.tensor([[0.5, 0.4], [0.6, 0], [0.7, 0.2], [0, 0]]))
    assert probs.counts_E.tolist() == [2, 2, 1, 0]
    assert probs.num_dropped == 3
    by_token = drop_over_capacity(routing, 1.0, "position")
    assert by_token.expert_ids_TK.tolist() == [[0, 1], [1, 0], [-1, 2], [-1, -1]]
    by_slot = drop_over_capacity(routing, 1.0, "position", slot_major=True)
    assert by_slot.expert_ids_TK.tolist() == [[0, 1], [1, -1], [0, 2], [-1, -1]]


@given(
    seed=st.integers(0, 1000),
    factor=st.floats(0.1, 3),
    policy=st.sampled_from(["probs", "position"]),
    slot_major=st.booleans(),
)
def test_no_expert_has_more_than_its_room_and_none_is_left_unused(seed, factor, policy, slot_major):
    logits_TE = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    routing = route(logits_TE, RouterConfig(), 2)
    kept = drop_over_capacity(routing, factor, policy, slot_major=slot_major)
    room = capacity(20, 2, 5, factor)
    assert kept.counts_E.tolist() == routing.counts_E.clamp(max=room).tolist()
    assert torch.equal(count(kept.expert_ids_TK, 5), kept.counts_E)
    stays = kept.expert_ids_TK >= 0
    assert torch.equal(kept.expert_ids_TK[stays], routing.expert_ids_TK[stays])
    assert torch.equal(kept.gates_TK, routing.gates_TK * stays)
    if policy == "probs":
        for expert in range(5):
            of_expert = routing.expert_ids_TK == expert
            dropped, kept_gates = routing.gates_TK[of_expert & ~stays], routing.gates_TK[of_expert & stays]
            assert not len(dropped) or dropped.max() <= kept_gates.min()


@pytest.mark.parametrize("combine", ["gather", "scatter_add"])
@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_the_layer_leaves_out_what_was_dropped(backend, combine, before):
    config = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2, capacity_factor=0.6, score_before_experts=before)
    moe = MoE(config.replace(backend=backend, combine=combine))
    x_TD = torch.randn(20, 16, requires_grad=True)
    out_TD = moe(x_TD)
    routing = moe.router(x_TD)
    kept = drop_over_capacity(routing, 0.6)
    assert 0 < kept.num_dropped < 40
    expected_TD = torch.zeros(20, 16)
    for t in range(20):
        for k in range(2):
            if (e := int(kept.expert_ids_TK[t, k])) >= 0:
                gate = kept.gates_TK[t, k]
                w1, w2, w3 = (getattr(moe.experts, n)[e] for n in ("w1_EFD", "w2_EDF", "w3_EFD"))
                row = gate * x_TD[t] if before else x_TD[t]
                out = w2 @ (torch.nn.functional.silu(w1 @ row) * (w3 @ row))
                expected_TD = expected_TD.index_add(0, torch.tensor([t]), (out if before else gate * out)[None])
    torch.testing.assert_close(out_TD, expected_TD)
    gradients = [torch.autograd.grad(o.square().sum(), x_TD, retain_graph=True)[0] for o in (out_TD, expected_TD)]
    torch.testing.assert_close(*gradients)
    assert moe.tokens_per_expert_E.tolist() == routing.counts_E.tolist()  # what was asked for


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("order", ["token_major", "slot_major"])
def test_the_layer_drops_by_its_policy_in_its_order(policy, order):
    config = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2, capacity_factor=0.6)
    moe, plain = MoE(config.replace(drop_policy=policy, drop_order=order)), MoE(config)
    plain.load_state_dict(moe.state_dict())
    x_TD = torch.randn(40, 16)
    kept = drop_over_capacity(moe.router(x_TD), 0.6, policy, slot_major=order == "slot_major")
    assert torch.equal(moe(x_TD), moe._computed(x_TD, kept))
    same = torch.equal(moe(x_TD), plain(x_TD))
    assert same == (policy == "probs")  # by gate, the order matters between equal gates only


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity_factor": 0}, "capacity_factor=0 must be a positive number"),
        ({"capacity_factor": True}, "capacity_factor=True must be a positive number"),
        ({"drop_policy": "random"}, "drop_policy='random' is not known"),
        ({"capacity_factor": 1.0, "backend": "fused"}, "backend='fused' drops nothing"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(dim=4, hidden_dim=4, num_experts=2, top_k=1, **fields)
