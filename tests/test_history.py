"""Load over steps, dead experts, churn: by hand."""

import pytest
import torch

from moe_lab.study.counts import CountsTrace
from moe_lab.study.history import (
    chance_dead,
    churn,
    count_imbalance,
    dead_experts,
    step_counts,
    trajectories,
    window_counts,
)
from moe_lab.study.load import imbalance
from moe_lab.study.metrics import load_imbalance
from synthetic import synthetic_trace
from test_structure import trace_of

COUNTS = CountsTrace.from_tensor(
    torch.tensor([[[4, 0, 2]], [[0, 0, 6]], [[0, 3, 3]], [[0, 0, 0]]]), ("step", "layer", "expert")
)


def test_trajectories_are_the_metrics_of_each_step():
    got = trajectories(COUNTS)
    assert got.steps == (0, 1, 2, 3)
    for step, counts_E in enumerate([[4, 0, 2], [0, 0, 6], [0, 3, 3]]):
        assert got.metrics_SLM[step, 0].tolist() == pytest.approx(list(load_imbalance(counts_E)))
    assert got.metric("max_over_mean")[:3, 0].tolist() == pytest.approx([2.0, 3.0, 1.5])
    assert got.metrics_SLM[3].isnan().all()
    with pytest.raises(ValueError, match="metric='kurtosis' is not known: choose one of max_over_mean"):
        got.metric("kurtosis")


def test_ranks_are_added_before_anything_is_measured():
    split = CountsTrace.from_tensor(torch.tensor([[[[4, 0], [0, 4]]]]), ("step", "layer", "rank", "expert"))
    assert trajectories(split).metric("max_over_mean").item() == 1.0
    assert dead_experts(split).dead_SL.item() == 0


def test_dead_experts_by_hand():
    got = dead_experts(COUNTS)
    assert got.dead_SL.tolist() == [[1], [2], [1], [3]]
    assert got.longest_LE.tolist() == [[3, 2, 1]]
    assert chance_dead(1, 1, 4) == 3.0
    assert chance_dead(2, 2, 4) == pytest.approx(4 * 0.25)


def test_a_trace_becomes_steps():
    trace = synthetic_trace(tokens=1000, bias=False)
    counts = window_counts(trace, 300, shuffle=False)
    assert counts.counts_SLRE.shape == (3, 3, 1, 16)
    for step, window in enumerate(trace.windows(300)):
        assert torch.equal(counts.counts_SLRE[step, :, 0], window.counts_LE)
    assert int(window_counts(trace, 1000).counts_SLRE.sum()) == 1000 * 4 * 3
    with pytest.raises(ValueError, match="tokens=1001"):
        window_counts(trace, 1001)


def test_counts_have_a_load_beside_chance():
    trace = synthetic_trace(tokens=1200, bias=False)
    of_trace = imbalance(trace, 400, shuffle=False)
    of_counts = count_imbalance(window_counts(trace, 400, shuffle=False), trace.top_k)
    for layer in range(3):
        expected, got = of_trace.load(layer), of_counts.load(layer)
        assert got.metrics == expected.metrics
        assert got.null == expected.null
        assert (got.tokens, got.windows) == (400, 3)
        assert torch.equal(got.shares_E, expected.shares_E)
    ranks = CountsTrace.from_tensor(torch.tensor([[[4, 0], [0, 4]], [[2, 2], [0, 4]]]), ("step", "rank", "expert"))
    assert count_imbalance(ranks, 1).domains == ("all ranks", "rank 0", "rank 1")
    assert count_imbalance(ranks, 1).load(0, "rank 0").metrics.max_over_mean == pytest.approx((2 + 1) / 2)
    with pytest.raises(ValueError, match="no chance level"):
        count_imbalance(COUNTS, 2)


def test_churn_by_hand():
    steps = [trace_of([[[0, 1], [2, 3]]], 4), trace_of([[[1, 0], [2, 0]]], 4), trace_of([[[2, 3], [2, 0]]], 4)]
    assert churn(steps).tolist() == [[0.25], [0.5]]
    with pytest.raises(ValueError, match="churn needs at least two"):
        churn(steps[:1])


def test_independent_routings_churn_as_chance_does():
    first, second = (trace_of(torch.rand(1, 20_000, 16).topk(4).indices, 16) for _ in range(2))
    assert churn([first, second]).item() == pytest.approx(1 - 4 / 16, abs=0.01)


def test_steps_are_those_that_documents_name():
    with pytest.raises(ValueError, match="documents of this trace name no step"):
        step_counts(synthetic_trace())
