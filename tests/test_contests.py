import math

import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.jobs import contests, peers
from moe_lab.jobs.bench_inputs import make_inputs, reference, relative_error
from moe_lab.jobs.bench_run import Settings, fields_of, timed
from moe_lab.jobs.contests import Arm, Field, hold, refusal

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(MoEConfig(dim=32, hidden_dim=16, num_experts=4, top_k=2), 12, CPU, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("what", contests.FIELDS)
def test_arms_compute_the_same_and_give_gradients(inputs, what):
    contest = hold(what, inputs)
    assert contest.arms
    for arm in contest.arms.values():
        leaves = [leaf.clone().requires_grad_() for leaf in contest.leaves]
        arm.run(*leaves).sum().backward()
        assert all(leaf.grad is not None and leaf.grad.any() for leaf in (*leaves, *arm.weights))
        for weight in arm.weights:
            weight.grad = None


def test_the_reference_is_a_sum_over_chosen_experts(inputs):
    expert, token = int(inputs.expert_ids_TK[3, 0]), 3
    only = inputs._replace(
        gates_TK=torch.zeros_like(inputs.gates_TK).index_put_((torch.tensor(3), torch.tensor(0)), torch.tensor(2.0))
    )
    w1, w2, w3 = (weight[expert].double() for weight in inputs[3:])
    x = inputs.x_TD[token].double()
    gate, up = w1 @ x, w3 @ x
    expected = 2 * (w2 @ (gate * torch.sigmoid(gate) * up))
    assert reference(only).dtype == torch.float64
    torch.testing.assert_close(reference(only)[token], expected)
    assert not reference(only)[torch.arange(12) != token].any()


def test_what_cannot_run_says_why(inputs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    contest = hold("layer", inputs, ["fused", "loop"])
    assert list(contest.arms) == ["loop"]
    assert contest.missing["fused"].startswith("backend='fused' needs CUDA")


def test_an_arm_that_computes_something_else_is_refused_with_the_numbers(inputs, monkeypatch):
    right = contests.FIELDS["layer"].backends["loop"]

    def wrong(given):
        arm = right(given)
        return Arm(lambda x, gates: arm.run(x, gates) * 1.00001, arm.weights)

    monkeypatch.setitem(contests.FIELDS, "layer", Field({"loop": right, "wrong": wrong}, {}, "loop"))
    contest = hold("layer", inputs)
    assert list(contest.arms) == ["loop"]
    assert contest.missing["wrong"].startswith("not equal: error 1.0")
    budget = 2 * relative_error(right(inputs).run(*contest.leaves).detach(), reference(inputs))
    assert contest.missing["wrong"].endswith(f"is above the budget {budget:.2e}, twice that of 'loop'")


def test_the_budget_is_met_or_not():
    assert refusal(2.0, 2.0, "loop") is None
    assert refusal(0.0, 0.0, "loop") is None
    assert refusal(2.1, 2.0, "loop") is not None
    assert refusal(math.nan, 2.0, "loop") is not None


def test_weights_copied_for_each_assignment_must_fit(inputs):
    many = torch.zeros(1, dtype=torch.int64).expand(2**40)
    with pytest.raises(ValueError, match="GiB, more than half of"):
        peers._check_fits("copies:", many.numel(), inputs.w1_EFD)


def test_least_bytes():
    found = make_inputs(MoEConfig(dim=4, hidden_dim=3, num_experts=2, top_k=2), 5, CPU, torch.float32)
    row = 4 * 4
    weights = 3 * 2 * 3 * 4 * 4
    one = found._replace(expert_ids_TK=torch.ones(5, 1, dtype=torch.int64), gates_TK=torch.ones(5, 1))
    assert hold("layer", one, ["loop"]).num_bytes[0] == 2 * 5 * row + weights / 2, "an expert without a token"
    assert hold("layer", found, ["loop"]).num_bytes == (2 * 5 * row + weights, 3 * (2 * 5 * row + weights))
    assert hold("dispatch", found).num_bytes == (20 * row, 35 * row)
    assert hold("combine", found).num_bytes == (15 * row, 40 * row)


def test_rows_name_the_contest_and_compare_within_rounds(inputs):
    contest = hold("combine", inputs, ["gather"])
    settings = Settings(rounds=3, directions=("forward",), keep=True, block_ms=0.0)
    (rows,) = timed(contest, settings, fields_of("combine", "tiny", inputs, 0.5, "this CPU"))
    copy, gather = rows
    assert (copy.arm, gather.arm, gather.skew, gather.tokens, gather.top_k) == ("copy", "gather", 0.5, 12, 2)
    ratios = sorted(a / b for a, b in zip(gather.repeats, copy.repeats))
    assert gather.ratio == ratios[1]
    assert gather.bytes_ms == pytest.approx(copy.median)
