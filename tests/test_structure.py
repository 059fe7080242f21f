"""Pairs, transitions and specialisation: by hand, and 1 or 0 by chance."""

import dataclasses
import math

import pytest
import torch

from moe_lab import RouterConfig, RoutingTrace
from moe_lab.study.structure import co_activation, specialisation, transition
from moe_lab.study.trace import Document
from synthetic import synthetic_trace


def trace_of(ids_LTK, experts):
    """A trace with these experts chosen."""
    ids_LTK = torch.as_tensor(ids_LTK)
    logits = [torch.randn(ids_LTK.shape[1], experts) for _ in ids_LTK]
    trace = RoutingTrace.from_router_logits(logits, RouterConfig(), ids_LTK.shape[2])
    return trace.unchecked(expert_ids_LTK=ids_LTK.to(torch.int16), gates_LTK=None, logits_LTE=None)


def test_pairs_by_hand():
    trace = trace_of([[[0, 1], [1, 0], [0, 2], [3, -1]]], 5)
    got = co_activation(trace, 0)
    assert got.counts_EE.tolist() == [
        [3, 2, 1, 0, 0],
        [2, 2, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    chance = (2 - 1) * 5 / (2 * (5 - 1))
    assert float(got.lift_EE[0, 1]) == pytest.approx(2 * 4 / (3 * 2) / chance)
    assert float(got.lift_EE[0, 3]) == 0
    assert math.isnan(got.lift_EE[0, 0])
    assert math.isnan(got.lift_EE[0, 4])


def test_random_pairs_have_a_lift_of_one():
    ids_TK = torch.rand(40_000, 8).topk(4).indices
    lift_EE = co_activation(trace_of(ids_TK[None], 8), 0).lift_EE
    off = lift_EE[~torch.eye(8, dtype=torch.bool)]
    assert float((off - 1).abs().max()) < 0.03  # 17,000 tokens an expert, 8,600 a pair: five deviations


def test_transitions_by_hand():
    ids_LTK = [[[0, 1], [0, 2], [1, 2]], [[3, 0], [3, 1], [0, 1]]]
    shares_EE = transition(trace_of(ids_LTK, 4), 0, 1)
    assert shares_EE[0].tolist() == [0.25, 0.25, 0, 0.5]  # tokens 0 and 1
    assert shares_EE[1].tolist() == [0.5, 0.25, 0, 0.25]  # tokens 0 and 2
    assert shares_EE[3].isnan().all()


def test_padding_counts_nowhere():
    trace = trace_of([[[0, 1], [1, 2], [2, 0]]] * 2, 3).unchecked(valid_T=torch.tensor([True, False, True]))
    assert co_activation(trace, 0).counts_EE.diagonal().tolist() == [2, 1, 1]
    assert transition(trace, 0, 1)[1].tolist() == [0.5, 0.5, 0.0]


def test_experts_that_each_know_a_domain_tell_everything():
    documents = tuple(Document(f"doc {i}", "ab"[i % 2], "", 0, 10) for i in range(12))
    document_T = torch.arange(120) // 10
    ids_LTK = torch.stack([(document_T % 2)[:, None] * 2 + torch.arange(2), torch.rand(120, 4).topk(2).indices])
    trace = trace_of(ids_LTK, 4)
    trace = trace.unchecked(
        info=dataclasses.replace(trace.info, documents=documents),
        document_T=document_T.int(),
        position_T=(torch.arange(120) % 10).int(),
    )
    got = specialisation(trace)
    assert float(got.share_L[0]) == pytest.approx(1)
    assert got.chance_L[0] < got.high_L[0] < 1
    assert got.share_L[1] < 2 * got.high_L[1] < 0.2  # random experts: within what documents differ by


def test_domains_of_a_synthetic_trace_are_told_above_chance():
    got = specialisation(synthetic_trace(tokens=3000, span=50, bias=False))
    assert (got.share_L > got.high_L).all()
    flat = specialisation(synthetic_trace(tokens=3000, span=50, skew=0.0, bias=False))
    assert (flat.share_L < 3 * flat.high_L).all()
    assert (flat.share_L < got.share_L / 3).all()


def test_what_has_no_structure_is_refused():
    with pytest.raises(ValueError, match="top_k=1"):
        co_activation(trace_of([[[0], [1]]], 3), 0)
    with pytest.raises(ValueError, match="specialisation needs two"):
        specialisation(trace_of([[[0, 1]]], 3))
    with pytest.raises(ValueError, match="layer=5 was not recorded"):
        transition(trace_of([[[0, 1]]], 3), 0, 5)
