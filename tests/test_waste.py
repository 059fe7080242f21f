"""Every policy over a trace, and synthetic sources."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_lab
from moe_lab import MoE, RouterConfig
from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import CountMatrix
from moe_lab.parallel import VirtualRanks
from moe_lab.study.batches import count_matrix, micro_batches
from moe_lab.study.padding import POLICIES, overhead
from moe_lab.study.popularity import dirichlet, draw_ids, zipf
from moe_lab.study.waste import SETTINGS, waste, waste_of_counts
from test_splits import count_matrices


def test_totals_add_up_micro_batches_of_all_layers():
    trace, placement = moe_lab.data.open("balanced"), Placement.blockwise(32, 4)
    found = waste(trace, placement, 512)
    assert found.settings == tuple(SETTINGS)
    batches = [list(micro_batches(trace, layer, 4, 512)) for layer in trace.info.layers]
    assert found.micro_batches == sum(map(len, batches))
    matrices = [count_matrix(ids, placement) for layer in batches for ids in layer]
    by_hand = [overhead(counts, "equal_split") for counts in matrices]
    total = found.total("equal split")
    assert sum(total.overhead.exchange_zeros_R) == sum(sum(one.exchange_zeros_R) for one in by_hand)
    busiest = sum(int(counts.splits_RR.sum(dim=0).max()) for counts in matrices)
    assert total.straggler_factor == pytest.approx(busiest / sum(int(c.counts_RP.sum()) / 4 for c in matrices))
    assert sum(found.traffic.per_assignment_R) >= sum(found.traffic.per_rank_R) >= sum(found.traffic.per_node_R)


def test_known_total_of_two_micro_batches():
    first = CountMatrix(counts_RP=torch.tensor([[3, 1], [1, 3]]))
    second = CountMatrix(counts_RP=torch.tensor([[4, 0], [4, 0]]))
    total = waste_of_counts({0: [first, second]}).total("equal split")
    assert total.overhead.exchange_zeros_R == (4 + 4, 4 + 12)
    assert total.straggler_factor == (4 + 8) / (4 + 4)
    with pytest.raises(ValueError, match="setting='x' is not known"):
        waste_of_counts({0: [first]}).total("x")


@settings(max_examples=30)
@given(count_matrices(), st.randoms(use_true_random=False))
def test_permuting_ranks_permutes_every_answer(counts, random):
    order = random.sample(range(counts.ep), counts.ep)
    blocks = counts.counts_RP.unflatten(1, (counts.ep, -1))
    other = CountMatrix(counts_RP=blocks[order][:, order].flatten(1))
    for policy in set(POLICIES) - {"forced_balance"}:
        before, after = overhead(counts, policy, multiple=16), overhead(other, policy, multiple=16)
        for of_before, of_after in zip(before[1:], after[1:]):
            assert tuple(of_before[rank] for rank in order) == of_after


@settings(max_examples=30)
@given(count_matrices(), st.floats(0, 3))
def test_adaptive_never_costs_more_than_its_threshold(counts, threshold):
    one = overhead(counts, "adaptive", threshold=threshold)
    assert one.exchange_overhead <= one.worst_exchange_overhead <= threshold


@pytest.mark.parametrize("case", ["adaptive", "drop", "analytic"])
def test_more_policies_equal_what_the_exchange_counts(layer_config, case):
    changes = {
        "adaptive": {"equal_split": "adaptive", "equal_split_threshold": 3.0},
        "drop": {"capacity_factor": 1.0},
        "analytic": {"router": RouterConfig(force_load_balance="round_robin")},
    }[case]
    moe = MoE(layer_config(**changes))
    ranks = VirtualRanks(moe, 4, tokens_per_rank=12 if case == "analytic" else None)
    xs = [torch.randn(12, 16) for _ in range(4)]
    with torch.no_grad():
        asked = [moe.router(x, moe.expert_bias_E).expert_ids_TK for x in xs]
    logs = [exchange.log.watch() for exchange in ranks.mesh.exchanges]
    sent = [log.__enter__() for log in logs]
    ranks(xs)
    policy = {"analytic": "forced_balance"}.get(case, case)
    predicted = overhead(count_matrix(asked, ranks.placement), policy, threshold=3.0, capacity_factor=1.0)
    assert case != "adaptive" or sum(predicted.exchange_zeros_R) > 0
    assert case != "drop" or sum(predicted.dropped_R) > 0
    for rank, calls in enumerate(sent):
        rows = predicted.sent_R[rank] + predicted.rows_R[rank] + predicted.exchange_zeros_R[rank]
        assert sum(call.num_bytes for call in calls) == rows * 16 * 4


def test_popularity_is_what_its_formula_says():
    assert sorted(zipf(4, 1.0).tolist()) == pytest.approx([3 / 25, 4 / 25, 6 / 25, 12 / 25])
    assert zipf(8, 0.0).tolist() == [1 / 8] * 8
    assert float(dirichlet(32, 1e6).max()) == pytest.approx(1 / 32, rel=0.02)
    assert torch.equal(dirichlet(32, 0.5, seed=3), dirichlet(32, 0.5, seed=3))
    (ids_TK,) = draw_ids(shares := zipf(16, 1.0), 1, 20000, 4)
    assert all(len(set(row)) == 4 for row in ids_TK[:50].tolist())
    first = torch.bincount(ids_TK[:, 0], minlength=16) / 20000
    assert float((first - shares).abs().max()) < 0.015  # four standard errors of a share of 0.3
    more = draw_ids(shares, 3, 20000, 4)
    assert torch.equal(more[0], ids_TK)
    with pytest.raises(ValueError, match="top_k=17 must be at most the 16 experts"):
        draw_ids(shares, 1, 1, 17)
    with pytest.raises(ValueError, match="concentration=0 must be above 0"):
        dirichlet(4, 0)


def test_256_experts_on_256_ranks():
    ids = draw_ids(zipf(256, 0.8), 256, 16, 8)
    one = overhead(count_matrix(ids, Placement.blockwise(256, 256)), "equal_split")
    assert sum(one.rows_R) == 256 * 16 * 8
    assert sum(one.exchange_zeros_R) % (2 * 1) == 0 < one.exchange_overhead
