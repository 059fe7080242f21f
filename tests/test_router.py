import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_lab import RouterConfig, TokenChoiceTopKRouter
from moe_lab.layer.choosing import stable_topk
from moe_lab.layer.router import count, limit_groups, route, score

LN = math.log


def logits(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=dtype)


# Scores and gates, by hand


@pytest.mark.parametrize(
    ("score_func", "values", "expected"),
    [
        ("softmax", [0.0, LN(2), LN(5)], [1 / 8, 2 / 8, 5 / 8]),
        ("sigmoid", [0.0, LN(3), -LN(4)], [0.5, 0.75, 0.2]),
        ("sqrt_softplus", [LN(math.e - 1), LN(math.e**4 - 1), LN(math.e**9 - 1)], [1.0, 2.0, 3.0]),
    ],
)
def test_score_functions(score_func, values, expected):
    torch.testing.assert_close(score(logits(values), score_func), logits(expected))
    narrow = score(logits(values).bfloat16(), score_func)
    assert narrow.dtype == torch.float32  # scores are never narrower than float32
    torch.testing.assert_close(narrow, score(logits(values).bfloat16().float(), score_func), rtol=0, atol=0)


def test_gates_are_the_chosen_scores_largest_first():
    routing = route(logits([0.0, LN(5), LN(2)]), RouterConfig(), 2)
    assert routing.expert_ids_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.gates_TK, logits([5 / 8, 2 / 8]))
    torch.testing.assert_close(routing.scores_TE, logits([1 / 8, 5 / 8, 2 / 8]))
    assert routing.counts_E.tolist() == [0, 1, 1]
    assert (routing.gates_TK.dtype, routing.expert_ids_TK.dtype, routing.counts_E.dtype) == (
        torch.float32,
        torch.int64,
        torch.int64,
    )


def test_norm_divides_by_the_sum_of_the_chosen_and_scale_comes_last():
    config = RouterConfig(score_func="sigmoid", route_norm=True, route_scale=2.5)
    routing = route(logits([-LN(4), LN(3), 0.0]), config, 2)
    torch.testing.assert_close(routing.gates_TK, 2.5 * logits([0.75 / 1.25, 0.5 / 1.25]))


def test_norm_of_scores_that_all_vanish_is_zero_not_nan():
    config = RouterConfig(score_func="softmax", route_norm=True, force_load_balance="round_robin")
    assert route(logits([-200.0, -200.0, 0.0]), config, 2).gates_TK.tolist() == [[0.0, 0.0]]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_softmax_of_the_chosen_logits_is_softmax_then_norm(seed, top_k):
    logits_TE = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    routing = route(logits_TE, RouterConfig(route_norm=True), top_k)
    expected_TK = logits_TE.gather(1, routing.expert_ids_TK).softmax(dim=-1)
    torch.testing.assert_close(routing.gates_TK, expected_TK, rtol=1e-14, atol=0)


def test_the_balancing_bias_moves_the_choice_and_not_the_gates():
    logits_TE = logits([0.0, LN(5), LN(2)])
    routing = route(logits_TE, RouterConfig(), 2, expert_bias_E=torch.tensor([0.2, 0.0, 0.0]))
    assert routing.expert_ids_TK.tolist() == [[1, 0]]  # 0.125 + 0.2 beats 0.25
    torch.testing.assert_close(routing.gates_TK, logits([5 / 8, 1 / 8]))
    torch.testing.assert_close(routing.scores_TE, logits([1 / 8, 5 / 8, 2 / 8]))


def test_the_gate_bias_is_in_the_logits():
    router = TokenChoiceTopKRouter(4, 3, 1, RouterConfig(gate_bias=True))
    with torch.no_grad():
        router.gate.weight.zero_()
        router.gate.bias.copy_(torch.tensor([0.0, LN(5), LN(2)]))
    routing = router(torch.ones(1, 4))
    torch.testing.assert_close(routing.gates_TK, logits([5 / 8]))
    assert TokenChoiceTopKRouter(4, 3, 1, RouterConfig()).gate.bias is None


# Groups


@pytest.mark.parametrize(("group_score", "winner"), [("max", 0), ("top2", 1), ("topk_share", 2)])
def test_the_three_group_scores_choose_differently(group_score, winner):
    # Best: 9, 7, 5. Best two: 9, 13, 10. Best K // limited = 3: 9, 13, 15.
    choice_TE = logits([9.0, 0.0, 0.0, 7.0, 6.0, 0.0, 5.0, 5.0, 5.0])
    config = RouterConfig(num_expert_groups=3, num_limited_groups=1, group_score=group_score)
    limited_TE = limit_groups(choice_TE, config, 3)
    kept_E = torch.arange(9) // 3 == winner
    assert torch.equal(limited_TE[0].isfinite(), kept_E)
    assert torch.equal(limited_TE[0, kept_E], choice_TE[0, kept_E])


def test_topk_share_sums_k_over_limited():
    # K = 4 of 2 groups: the best 2 of each. Sums 9, 13, 10: the first group leaves.
    choice_TE = logits([9.0, 0.0, 0.0, 7.0, 6.0, 0.0, 5.0, 5.0, 5.0])
    config = RouterConfig(num_expert_groups=3, num_limited_groups=2, group_score="topk_share")
    assert limit_groups(choice_TE, config, 4).isfinite().tolist() == [[False] * 3 + [True] * 6]


def test_of_equal_groups_the_first_stay():
    config = RouterConfig(num_expert_groups=4, num_limited_groups=2)
    assert limit_groups(torch.zeros(1, 8), config, 2).isfinite().tolist() == [[True] * 4 + [False] * 4]


def test_excluded_groups_lose_even_against_negative_choices():
    config = RouterConfig(score_func="sigmoid", num_expert_groups=2, num_limited_groups=1)
    bias_E = torch.tensor([-5.0, -5.0, -6.0, -6.0])  # every biased score is below zero
    routing = route(torch.zeros(3, 4), config, 2, expert_bias_E=bias_E)
    assert routing.expert_ids_TK.tolist() == [[0, 1]] * 3


def test_groups_are_chosen_with_the_bias():
    config = RouterConfig(score_func="sigmoid", num_expert_groups=2, num_limited_groups=1, group_score="max")
    biased = route(logits([1.0, 0.0, 0.0, 0.0]), config, 1, expert_bias_E=torch.tensor([0.0, 0.0, 0.0, 0.5]))
    assert biased.expert_ids_TK.tolist() == [[3]]


# Forced balance


@given(st.integers(0, 40), st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))))
def test_round_robin_counts_and_real_gates(num_tokens, sizes):
    num_experts, top_k = sizes
    logits_TE = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    routing = route(logits_TE, RouterConfig(force_load_balance="round_robin"), top_k)
    each, more = divmod(num_tokens * top_k, num_experts)
    assert routing.counts_E.tolist() == [each + (e < more) for e in range(num_experts)]
    assert routing.expert_ids_TK.flatten().tolist() == [i % num_experts for i in range(num_tokens * top_k)]
    assert torch.equal(routing.gates_TK, logits_TE.softmax(-1).gather(1, routing.expert_ids_TK))


def test_random_balance_ignores_the_logits_and_keeps_their_gates():
    config = RouterConfig(force_load_balance="random")
    first, second, third = (
        route(torch.randn(500, 8), config, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.expert_ids_TK, second.expert_ids_TK)
    assert not torch.equal(first.expert_ids_TK, third.expert_ids_TK)
    assert torch.equal(first.gates_TK, first.scores_TE.gather(1, first.expert_ids_TK))
    assert all(len(set(ids_K)) == 3 for ids_K in first.expert_ids_TK.tolist())
    # 1500 assignments over 8 experts: a fair share is 187.5, five standard deviations of chance are 54.
    assert (first.counts_E - 187.5).abs().max() < 54


# Ties and order

SPECIALS = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, -math.inf, math.inf]
floats = st.one_of(st.sampled_from(SPECIALS), st.floats(width=32, allow_nan=False))


@settings(max_examples=200)
@given(hnp.arrays("float32", hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=floats), st.data())
@example(torch.zeros(3, 5).numpy(), None)
def test_choice_equals_a_stable_sort_in_float64(values, data):
    values_TE = torch.from_numpy(values)
    k = data.draw(st.integers(1, values.shape[1])) if data else 4
    expected_TK = values_TE.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(stable_topk(values_TE, k), expected_TK)
    assert torch.equal(stable_topk(values_TE.double(), k), expected_TK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_scores_the_lowest_index_wins(dtype):
    assert stable_topk(torch.full((2, 300), 0.25, dtype=dtype), 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    zeros_TE = torch.tensor([[-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -1.0]], dtype=dtype)
    assert stable_topk(zeros_TE, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_choice_of_no_tokens():
    routing = route(torch.zeros(0, 4), RouterConfig(num_expert_groups=2, num_limited_groups=1), 2)
    assert routing.gates_TK.shape == routing.expert_ids_TK.shape == (0, 2)
    assert routing.counts_E.tolist() == [0, 0, 0, 0]


# Counting


def test_counts_are_of_assignments_and_leave_dropped_ones_out():
    ids_TK = torch.tensor([[0, 0], [2, -1], [-1, -1], [0, 2]])
    assert count(ids_TK, 4).tolist() == [3, 0, 2, 0]
    routing = route(torch.zeros(4, 4), RouterConfig(), 2)._replace(expert_ids_TK=ids_TK, counts_E=count(ids_TK, 4))
    assert routing.num_dropped == 3


# Bad logits


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_token_without_finite_logits_is_named(bad, dtype):
    logits_TE = torch.zeros(6, 4, dtype=dtype)
    logits_TE[2, 1] = logits_TE[5, 0] = bad
    with pytest.raises(ValueError, match=r"logits of token 2 are not finite \(2 of 6 tokens"):
        route(logits_TE, RouterConfig(), 2)


def test_infinities_of_both_signs_do_not_cancel():
    with pytest.raises(ValueError, match="logits of token 0"):
        route(logits([math.inf, -math.inf, 0.0]), RouterConfig(), 1)


def test_huge_logits_are_not_bad():
    assert route(torch.full((2, 3), 1.7e308, dtype=torch.float64), RouterConfig(), 1).counts_E.tolist() == [2, 0, 0]


def test_settings_that_cannot_choose_are_refused():
    with pytest.raises(ValueError, match="top_k=5 must be an integer from 1 to 4"):
        route(torch.zeros(2, 4), RouterConfig(), 5)
    with pytest.raises(ValueError, match="num_expert_groups=3 does not divide num_experts=4"):
        TokenChoiceTopKRouter(8, 4, 2, RouterConfig(num_expert_groups=3, num_limited_groups=1))


# Gradients


@pytest.mark.parametrize("route_norm", [False, True])
@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrt_softplus"])
def test_gates_are_differentiable_in_the_logits(score_func, route_norm):
    config = RouterConfig(score_func=score_func, route_norm=route_norm, route_scale=1.5)
    logits_TE = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, config, 2).gates_TK, logits_TE)
    assert torch.autograd.gradcheck(lambda x: route(x, config, 2).scores_TE, logits_TE)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "sqrt_softplus"])
def test_far_logits_have_finite_gradients(score_func):
    logits_TE = logits([-300.0, -104.0, -90.0, 0.0, 90.0, 300.0]).requires_grad_()
    routing = route(logits_TE, RouterConfig(score_func=score_func, route_norm=True), 2)
    (routing.gates_TK * torch.tensor([1.0, 2.0])).sum().backward()
    assert routing.scores_TE.isfinite().all()
    assert logits_TE.grad.isfinite().all()


# The module


def test_logits_are_float32_or_in_the_dtype_of_the_input():
    torch.manual_seed(0)
    x_TD = torch.randn(64, 32).bfloat16()
    router = TokenChoiceTopKRouter(32, 16, 2, RouterConfig()).bfloat16()
    exact_TE = x_TD.double() @ router.gate.weight.double().T
    wide = router(x_TD).logits_TE
    assert wide.dtype == torch.float32
    assert (wide - exact_TE).abs().max() < 1e-5
    router.config = RouterConfig(gate_dtype="input")
    narrow = router(x_TD)
    assert narrow.logits_TE.dtype == torch.bfloat16
    assert narrow.scores_TE.dtype == narrow.gates_TK.dtype == torch.float32
    assert not torch.equal(narrow.logits_TE.float(), wide)


def test_autocast_leaves_the_logits_in_float32():
    router = TokenChoiceTopKRouter(32, 16, 2, RouterConfig())
    x_TD = torch.randn(8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert torch.equal(routing.logits_TE, router(x_TD).logits_TE)


def test_a_forward_hook_sees_the_routing():
    router, seen = TokenChoiceTopKRouter(8, 4, 2, RouterConfig()), []
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    routing = router(torch.randn(3, 8), torch.zeros(4))
    assert seen[0] is routing


def test_saturated_sigmoids_are_ties():
    logits_TE = torch.tensor([[17.4, 19.0, 18.0, 3.0]])
    assert route(logits_TE, RouterConfig(score_func="sigmoid"), 2).expert_ids_TK.tolist() == [[0, 1]]
    assert route(logits_TE - 9, RouterConfig(score_func="sigmoid"), 2).expert_ids_TK.tolist() == [[1, 2]]
