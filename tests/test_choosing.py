"""Sinkhorn and expert choice: by hand, as Megatron-Core computes, and where they may not run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab import MoE, MoEConfig, RouterConfig, TokenChoiceTopKRouter
from moe_lab.layer.capacity import drop_over_capacity
from moe_lab.layer.choosing import expert_choice, sinkhorn
from moe_lab.layer.losses import switch_loss, z_loss
from moe_lab.layer.router import route

# What megatron-core 0.16.1 (`transformer/moe/moe_utils.py`) gives for these logits, float32 on a CPU.
STEP = torch.arange(32, dtype=torch.float64).view(8, 4)
LOGITS = (3 * torch.sin(1.7 * STEP) + 0.5 * torch.arange(4)).float()
MEGATRON_SINKHORN = [  # in thousandths
    [2.331, 102.369, 20.056, 0.249],
    [17.450, 97.497, 8.992, 1.067],
    [72.584, 40.645, 5.709, 6.064],
    [90.436, 7.292, 4.521, 22.751],
    [51.479, 1.425, 7.669, 64.425],
    [13.355, 0.400, 20.897, 90.344],
    [2.155, 0.215, 67.530, 55.096],
    [0.210, 0.158, 114.625, 10.004],
]
MEGATRON_KEPT = [[1, 2], [1], [0, 1], [0], [0, 3], [3], [2, 3], [2]]  # probs, capacity factor 0.75
SINKHORN, EXPERT_CHOICE = RouterConfig(choose_by="sinkhorn"), RouterConfig(choose_by="expert_choice")


def test_sinkhorn_is_that_of_megatron_core():
    torch.testing.assert_close(1e3 * sinkhorn(LOGITS), torch.tensor(MEGATRON_SINKHORN).double(), rtol=1e-5, atol=6e-4)
    routing = route(LOGITS, SINKHORN, 2)
    assert routing.expert_ids_TK.tolist() == [[1, 2], [1, 0], [0, 1], [0, 3], [3, 0], [3, 2], [2, 3], [2, 3]]
    assert routing.counts_E.tolist() == [4, 3, 4, 5]
    assert route(LOGITS, RouterConfig(), 2).counts_E.tolist() == [5, 3, 3, 5]
    assert torch.equal(routing.gates_TK, LOGITS.softmax(dim=1).gather(1, routing.expert_ids_TK))


def test_losses_and_drops_are_those_of_megatron_core():
    routing = route(LOGITS, RouterConfig(), 2)
    scores_TE, ids_TK = routing.scores_TE, routing.expert_ids_TK
    assert switch_loss(scores_TE, ids_TK).item() == pytest.approx(1.0923337936, rel=1e-6)
    halves = [(scores_TE[:4], ids_TK[:4]), (scores_TE[4:], ids_TK[4:])]
    assert [switch_loss(*half).item() for half in halves] == pytest.approx([1.3467845917, 1.8016831875], rel=1e-6)
    over_both = [switch_loss(*half, counts_E=routing.counts_E).item() for half in halves]
    assert over_both == pytest.approx([0.9946264029, 1.1900410652], rel=1e-6)
    assert z_loss(LOGITS).item() == pytest.approx(14.6083755493, rel=1e-6)
    kept = drop_over_capacity(routing, 0.75, "probs").expert_ids_TK
    assert [sorted(e for e in row if e >= 0) for row in kept.tolist()] == MEGATRON_KEPT


@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 8))
def test_sinkhorn_gives_every_token_and_every_expert_its_share(seed, tokens, experts):
    draw = torch.Generator().manual_seed(seed)
    logits_TE = 4 * torch.rand(tokens, experts, generator=draw)  # steeper ones feel the 1e-8 that bounds its divisors
    even_TE = sinkhorn(logits_TE)
    assert even_TE.min() > 0
    torch.testing.assert_close(even_TE.sum(dim=0), torch.full((experts,), 1 / experts).double(), rtol=1e-5, atol=0)
    assert even_TE.sum().item() == pytest.approx(1, rel=1e-5)
    assert (even_TE.sum(dim=1) * tokens - 1).abs().max() < 0.05  # its tolerance, on rows
    moved_TE = sinkhorn(logits_TE + torch.randn(tokens, 1, generator=draw))
    torch.testing.assert_close(moved_TE, even_TE, rtol=1e-4, atol=0)  # what all of a token's logits share is nothing


def test_sinkhorn_takes_logits_that_overflow():
    logits_TE = torch.tensor([[900.0, 897.0], [900.0, 895.0]])
    torch.testing.assert_close(sinkhorn(logits_TE), sinkhorn(logits_TE - 900))
    assert sinkhorn(logits_TE).sum(dim=0).tolist() == pytest.approx([0.5, 0.5])


def test_experts_choose_by_hand():
    scores_TE = torch.tensor([[0.9, 0.1, 0.3], [0.8, 0.7, 0.3], [0.1, 0.6, 0.2], [0.2, 0.5, 0.1]])
    # two each: expert 0 takes tokens 0 and 1, expert 1 tokens 1 and 2, expert 2 tokens 0 and 1 of equal scores
    assert expert_choice(scores_TE, 2).tolist() == [[0, 2, -1], [0, 1, 2], [1, -1, -1], [-1, -1, -1]]
    assert expert_choice(scores_TE, 9).tolist() == [[0, 2, 1], [0, 1, 2], [1, 2, 0], [1, 0, 2]]


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 6), st.data())
def test_every_expert_takes_its_best_tokens(seed, tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    routing = route(logits_TE, EXPERT_CHOICE, top_k)
    room = -(-tokens * top_k // experts)
    assert routing.counts_E.tolist() == [room] * experts
    for expert in range(experts):
        took_T = (routing.expert_ids_TK == expert).any(dim=1)
        left = routing.scores_TE[~took_T, expert]
        assert not len(left) or left.max() <= routing.scores_TE[took_T, expert].min()
    ids_TK, gates_TK = routing.expert_ids_TK, routing.gates_TK
    expected_TK = routing.scores_TE.gather(1, ids_TK.clamp(min=0)) * (ids_TK >= 0)
    assert torch.equal(gates_TK, expected_TK)


def test_gates_of_expert_choice_are_normalised_over_what_a_token_got():
    routing = route(torch.randn(12, 4), RouterConfig(choose_by="expert_choice", route_norm=True), 2)
    got_T = (routing.expert_ids_TK >= 0).any(dim=1)
    torch.testing.assert_close(routing.gates_TK.sum(dim=1), got_T.float())


def test_expert_choice_is_refused_where_tokens_come_one_by_one():
    sizes = {"dim": 4, "hidden_dim": 4, "num_experts": 4, "top_k": 2}
    with pytest.raises(ValueError, match=r"choose_by='expert_choice' is for recorded logits only.*later ones too"):
        MoEConfig(**sizes, router=EXPERT_CHOICE)
    with pytest.raises(ValueError, match="choose_by='expert_choice'"):
        TokenChoiceTopKRouter(4, 4, 2, EXPERT_CHOICE)


def test_a_live_router_evens_in_training_and_routes_each_token_by_itself_in_eval():
    router = TokenChoiceTopKRouter(16, 8, 2, SINKHORN)
    x_TD = torch.randn(64, 16) + torch.randn(16)
    training, evaluated = router(x_TD), router.eval()(x_TD)
    assert torch.equal(training.expert_ids_TK, route(training.logits_TE, SINKHORN, 2).expert_ids_TK)
    assert torch.equal(evaluated.expert_ids_TK, route(training.logits_TE, RouterConfig(), 2).expert_ids_TK)
    assert training.counts_E.max() < evaluated.counts_E.max()
    assert torch.equal(router(x_TD[5:6]).expert_ids_TK, evaluated.expert_ids_TK[5:6])


def test_jitter_multiplies_what_the_router_reads_and_nothing_else():
    moe = MoE(MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=4, router=RouterConfig(jitter=0.2)))
    x_TD = torch.randn(500, 8)
    assert torch.equal(moe.eval().router(x_TD).logits_TE, moe.router.gate(x_TD))
    torch.manual_seed(3)
    noisy_TE = moe.train().router(x_TD).logits_TE
    torch.manual_seed(3)
    noise_TD = torch.empty_like(x_TD).uniform_(0.8, 1.2)
    assert torch.equal(noisy_TE, moe.router.gate(x_TD * noise_TD))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choose_by": "chance"}, "choose_by='chance' is not known"),
        ({"jitter": 1.0}, "jitter=1.0 must be a number from 0 to below 1"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"jitter": float("nan")}, "jitter=nan"),
        ({"choose_by": "sinkhorn", "num_expert_groups": 2, "num_limited_groups": 1}, "num_expert_groups=2"),
        ({"choose_by": "sinkhorn", "force_load_balance": "random"}, "force_load_balance='random'"),
    ],
)
def test_routers_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": SINKHORN, "load_balance_coeff": 0.1}, "load_balance_coeff=0.1 moves nothing"),
        ({"router": SINKHORN, "batch_invariant": True, "backend": "blocked"}, "choose_by='sinkhorn'"),
        ({"router": RouterConfig(jitter=0.1), "batch_invariant": True, "backend": "blocked"}, "jitter=0.1"),
        ({"drop_order": "random"}, "drop_order='random' is not known"),
        ({"bias_centred": "no"}, "bias_centred='no' must be True or False"),
    ],
)
def test_layers_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"dim": 4, "hidden_dim": 4, "num_experts": 4, "top_k": 2} | fields)
