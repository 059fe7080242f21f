"""Agreement of two traces, by hand and against what was changed."""

import math

import pytest
import torch

from moe_lab import RouterConfig, RoutingTrace
from moe_lab.study.compare import agreement, reproduced, rounded
from synthetic import synthetic_trace


def by_hand(logits, **fields):
    return RoutingTrace.from_router_logits([torch.tensor(logits)], RouterConfig(), 2, **fields)


def test_agreement_by_hand():
    # Three tokens of four experts: the same, one expert of two changed, both changed.
    a = by_hand([[4.0, 3.0, 1.0, 0.0], [4.0, 3.0, 2.5, 0.0], [4.0, 3.0, 2.75, 2.5]])
    b = by_hand([[4.0, 3.0, 1.0, 0.0], [4.0, 2.0, 2.5, 0.0], [2.0, 1.0, 2.75, 2.5]])
    got = agreement(a, b)
    assert got.tokens == 3
    assert got.assignments_L.tolist() == pytest.approx([(2 + 1 + 0) / 6])
    assert got.tokens_L.tolist() == pytest.approx([1 / 3])
    p = [torch.tensor(row).softmax(0).tolist() for row in ([4.0, 3, 1, 0], [4.0, 3, 2.5, 0], [4.0, 3, 2.75, 2.5])]
    q = [torch.tensor(row).softmax(0).tolist() for row in ([4.0, 2, 2.5, 0], [2.0, 1, 2.75, 2.5])]
    second = (abs(p[1][0] - q[0][0]) + p[1][1] + q[0][2]) / 2
    third = (p[2][0] + p[2][1] + q[1][2] + q[1][3]) / 2
    assert got.gate_difference_L.tolist() == pytest.approx([(second + third) / 3], rel=2e-3)
    assert got.margin_same_L.tolist() == pytest.approx([p[0][1] - p[0][2]], rel=2e-3)
    changed = sorted(row[1] - row[2] for row in p[1:])
    assert got.margin_changed_L.tolist() == pytest.approx([changed[0]], rel=2e-2)  # the lower of two medians


def test_a_trace_agrees_with_itself_and_reproduces_itself():
    trace = synthetic_trace(tokens=500)
    same = agreement(trace, trace)
    assert same.assignments_L.tolist() == [1.0] * 3
    assert same.tokens_L.tolist() == [1.0] * 3
    assert same.gate_difference_L.tolist() == [0.0] * 3
    assert all(math.isnan(margin) for margin in same.margin_changed_L.tolist())
    assert reproduced(trace).tolist() == [1.0] * 3


def test_what_changes_lies_at_small_margins():
    trace = synthetic_trace(tokens=2000, bias=False)
    noise = 0.05 * torch.randn(trace.logits_LTE.shape)
    noisy = RoutingTrace.from_router_logits(
        [x.float() + n for x, n in zip(trace.logits_LTE, noise)], trace.info.router, trace.top_k
    )
    noisy = noisy.unchecked(info=trace.info, document_T=trace.document_T, position_T=trace.position_T)
    got = agreement(trace, noisy)
    assert (got.tokens_L < 1).all()
    assert (got.assignments_L > got.tokens_L).all()
    assert (got.margin_changed_L < got.margin_same_L / 3).all()


def test_padding_and_dropped_assignments_do_not_count():
    a = by_hand([[4.0, 3.0, 1.0, 0.0], [4.0, 3.0, 1.0, 0.0]], valid=torch.tensor([1, 0]))
    b = by_hand([[4.0, 3.0, 1.0, 0.0], [0.0, 1.0, 3.0, 4.0]])
    assert agreement(a, b).tokens_L.tolist() == [1.0]
    ids_LTK = b.expert_ids_LTK.to(torch.int16)
    ids_LTK[0, 0, 1] = -1
    dropped = b.unchecked(expert_ids_LTK=ids_LTK, gates_LTK=None, logits_LTE=None)
    got = agreement(dropped, b)
    assert got.assignments_L.tolist() == [1.0]
    assert got.tokens_L.tolist() == [0.5]
    assert math.isnan(got.gate_difference_L)
    assert math.isnan(got.margin_same_L)


def test_a_wrong_configuration_reproduces_less():
    trace = synthetic_trace(tokens=500, bias=True)
    without = trace.unchecked(expert_bias_LE=None)
    assert (reproduced(without) < 1).all()
    assert (reproduced(without) > 0.3).all()


def test_what_cannot_be_compared_is_refused():
    trace = synthetic_trace(tokens=500)
    for other, message in [
        (synthetic_trace(tokens=400), "not of the same tokens"),
        (synthetic_trace(tokens=500, span=100), "not of the same tokens"),
        (synthetic_trace(tokens=500, experts=8), "num_experts of traces differ"),
        (trace.layer(1), "layers of traces differ"),
        (trace.unchecked(valid_T=torch.zeros(500, dtype=torch.bool)), "no token is valid in both"),
    ]:
        with pytest.raises(ValueError, match=message):
            agreement(trace, other)
    with pytest.raises(ValueError, match="no logits_LTE"):
        reproduced(synthetic_trace(tokens=500, logits=False))


def test_rounded_logits_change_what_nearly_ties():
    trace = synthetic_trace(tokens=1000, bias=True)
    exact = rounded(trace, torch.float16)
    assert torch.equal(exact.logits_LTE, trace.logits_LTE)
    assert torch.equal(exact.expert_ids_LTK.long(), trace.expert_ids_LTK.long())
    coarse = [agreement(exact, rounded(trace, dtype)).tokens_L for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    assert (coarse[1] < coarse[0]).all()
    assert (coarse[0] < 1).all()
    with pytest.raises(ValueError, match="nothing to round"):
        rounded(synthetic_trace(tokens=100, logits=False), torch.bfloat16)
