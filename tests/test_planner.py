import dataclasses
from types import SimpleNamespace

import pytest
import torch

from moe_lab import data
from moe_lab.config import RouterConfig
from moe_lab.models.lm import SMALL
from moe_lab.study.load import packing_order
from moe_lab.study.planner import Footprint, Layout, Step, beforehand, plan, shard, weights
from moe_lab.study.trace import RoutingTrace
from tests.synthetic import synthetic_trace
from tests.test_lm import TINY

DENSE = dataclasses.replace(TINY, moe=TINY.moe.replace(dim=64, hidden_dim=32, top_k=4))
WIDE = dataclasses.replace(TINY, moe=TINY.moe.replace(num_experts=64, hidden_dim=64))


def test_tiny_by_hand():
    """D 16, F 8, E 4, K 2, 2 heads, 2 layers, 32 positions, one shared expert, on (dp 1, ep 2), 64 tokens a rank."""
    block = 48 * 16 + 16 * 16 + 4 * 16 + 3 * 8 * 16 + 2 * 16  # attention, gate, shared expert, norms
    experts = 4 * 3 * 8 * 16
    ends = 256 * 16 * 2 + 16
    parameters = 4 * (2 * (block + experts) + ends) // 2
    rows = 160  # 64 * 2 * 1.25
    kept = 4 * (2 * 64 * 49 + 64 * (112 + 6) + 64 * 6 + rows * 48 + 128 * 16 + 4 * 64 * 8) + 24 * 128
    kept_at_ends = 4 * (64 * 49 + 64 * 256 + 32 * 8 + 1) + 8 * (128 + 2)
    assert plan(TINY, Layout(2, 2), 64, 1.25) == Footprint(
        parameters=parameters,
        gradients=parameters,
        optimizer=2 * parameters + 4 * 25,
        activations=2 * kept + kept_at_ends,
        receive=4 * rows * 16,
        gathered=4 * (block - 4 * 16 + experts // 2 + ends),
        logits=4 * 2 * 64 * 256,
        peak=3 * parameters + 4 * 25 + 2 * kept + kept_at_ends + 4 * ends + 4 * 2 * 64 * 256,
    )


def test_one_process_gathers_and_receives_nothing():
    planned = plan(SMALL, Layout(1), 2048)
    assert (planned.parameters, planned.receive, planned.gathered) == (4 * 11_488_512, 0, 0)


def test_the_peak_is_where_backward_begins_while_logits_are_most():
    few = plan(TINY, Layout(2), 32)
    assert few.peak == few.parameters + few.optimizer + few.activations + 4 * (2 * 256 * 16 + 16) + few.logits


MANY = {"num_experts": 64, "hidden_dim": 64}
MANY_CHOSEN = {"num_experts": 16, "top_k": 16, "hidden_dim": 32, "dim": 128}
WIDE_CHOSEN = {"num_experts": 16, "top_k": 16, "hidden_dim": 96, "dim": 128}
FEW = {"num_experts": 4, "hidden_dim": 4, "top_k": 1, "dim": 128}


@pytest.mark.parametrize(
    ("moe", "layout", "tokens", "load", "block", "moment"),
    [
        (WIDE_CHOSEN, (2,), 640, 1, 1, lambda of: 2 * of.outputs + of.experts + of.dense),
        (MANY_CHOSEN, (2,), 32, 1, 1, lambda of: 3 * of.rows - 3 * of.hidden - of.outputs + 2 * of.experts + of.dense),
        (
            MANY_CHOSEN,
            (4, 2),
            32,
            2,
            1,
            lambda of: 3 * of.rows - 3 * of.hidden - of.outputs + 2 * of.experts + of.dense,
        ),
        (WIDE_CHOSEN, (4, 2), 640, 2, 1, lambda of: 2 * of.rows - of.outputs + of.experts + of.dense),
        (MANY, (1,), 32, 1, 0, lambda of: of.rows - of.undone + of.found + 4 * of.experts // 3),
        (MANY, (2,), 32, 1, 0, lambda of: of.found + of.dense - of.undone + 17 * of.experts // 6),
        (MANY, (4, 2), 32, 1, 0, lambda of: of.found + of.dense - of.undone + 17 * of.experts // 6),
        (WIDE_CHOSEN, (2, 1, 2), 640, 1, 1, lambda of: 2 * of.outputs + of.stream + of.experts + of.dense),
        (FEW, (2,), 32, 1, 1, lambda of: of.found - of.rows - of.undone + 3 * of.experts // 2 + 3 * of.dense),
    ],
)
def test_the_peak_may_be_in_a_block(moe, layout, tokens, load, block, moment):
    """Combine or an expert undone, all experts undone, gradients summed, the block before gathered: two layers."""
    config, layout = dataclasses.replace(TINY, moe=TINY.moe.replace(**moe)), Layout(*layout)
    D, F, E, K = config.moe.dim, config.moe.hidden_dim, config.moe.num_experts, config.moe.top_k
    rows, stream, shared = tokens * K * load, 4 * tokens * D, 4 * F
    of = SimpleNamespace(
        outputs=4 * tokens * K * D,
        rows=4 * rows * D,
        hidden=4 * rows * F,
        undone=4 * tokens * K * D + 4 * 4 * rows * F + 4 * tokens * shared,  # outputs, and what leads to them
        found=3 * shared * D + stream,  # gradients of shared experts and of the block's input
        stream=stream,
        experts=4 * E * 3 * F * D // layout.ep,
        dense=4 * (4 * D * D + 3 * F * D + 2 * D + E * D),
    )
    planned = plan(config, layout, tokens, load)
    outside = 4 * (2 * 256 * D + D) if layout.ranks > 1 else 0
    rotary = 4 * layout.positions(config) * D // config.num_heads
    expected = planned.parameters + planned.optimizer + outside + 4 * 256 * D + stream + 8 * tokens + rotary
    expected += (1 + block) * Step(config, layout, tokens).block_activations(rows)
    if not block:  # the other one's gradients are there, cut
        expected += of.experts // layout.replicas + of.dense // layout.ranks
    assert planned.peak == expected + moment(of)


def test_recompute_keeps_inputs_and_one_block_at_its_peak():
    """Each block keeps 64 x 64 inputs and 5056 bytes; run again, its experts' outputs go home beside shared ones."""
    whole, again = (plan(DENSE, Layout(2, 2), 64, 1.25, checkpointing=flag) for flag in (False, True))
    block, kept = Step(DENSE, Layout(2, 2), 64).block_activations(320), 4 * 64 * 64 + 5056
    assert again.activations == whole.activations - 2 * block + 2 * kept
    assert again._replace(activations=0, peak=0) == whole._replace(activations=0, peak=0)
    gate, experts = 4 * 4 * 64, 4 * 2 * 3 * 32 * 64
    dense = 4 * (192 * 64 + 64 * 64 + 4 * 64 + 3 * 32 * 64 + 2 * 64)
    always = 4 * (2 * 256 * 64 + 64) + 8 * 64 + 4 * 32 * 32 + 4 * (256 + 64) * 64
    moving = 4 * (2 * 320 + 64) * 64 + 4 * 64 * 4 + 5056  # outputs, logits of the router, random numbers
    done = experts + dense // 2 + dense - gate  # of the other block, cut and still whole
    first = always + kept + block - 4 * 64 * 64 + experts + dense + done + moving
    assert again.peak == again.parameters + again.optimizer + first


def test_bfloat16_by_hand():
    """As `test_tiny_by_hand`, with two bytes for weights at hand and rows, and copies in float32."""
    low = plan(TINY, Layout(2, 2), 64, 1.25, dtype=torch.bfloat16)
    high = plan(TINY, Layout(2, 2), 64, 1.25)
    assert (low.parameters, low.gradients, low.optimizer, low.logits) == (*high[:3], high.logits)
    assert (low.receive, low.gathered) == (high.receive // 2, high.gathered // 2)
    rows = 160
    float32 = 2 * 64 * 33 + 64 * (3 * 2 + 4 + 2) + 64 * 3 * 16  # norms, scales and scores, copies
    kept = 4 * float32 + 2 * (64 * (2 * 16 + 7 * 16) + rows * 48 + 128 * 16 + 4 * 64 * 8) + 24 * 128
    kept_at_ends = 4 * (64 * 33 + 64 * 256 + 32 * 8 + 1) + 2 * 64 * 16 + 8 * (128 + 2)
    assert low.activations == 2 * kept + kept_at_ends
    both = plan(TINY, Layout(2, 2), 64, 1.25, dtype=torch.bfloat16, checkpointing=True)
    assert both.activations == kept_at_ends + 2 * (2 * 64 * 16 + 5056)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_combine_is_undone_in_float32(dtype, copies):
    """Two products of 128 outputs of D 16, and the outputs themselves where they are in fewer bits."""
    stages = Step(TINY, Layout(2, 2), 64, dtype).in_block([160, 160])
    assert stages["combine"] - stages["gather"] == 4 * copies * 128 * 16


def test_each_layer_may_have_a_load_of_its_own():
    even, uneven = plan(TINY, Layout(2, 2), 64, [1.0, 1.0]), plan(TINY, Layout(2, 2), 64, [0.5, 1.5])
    assert even == plan(TINY, Layout(2, 2), 64)
    assert uneven.activations == even.activations
    assert uneven.receive == 1.5 * even.receive


def test_positions_cut_over_ranks_by_hand():
    """On (dp 1, sp 2), 64 tokens a rank: 16 positions of 4 sequences, beside 32 of 2 on dp 2.

    More are the others' keys and values, a mask of 16 x 32, and integers that say which positions are real.
    """
    whole, cut = plan(TINY, Layout(2), 64), plan(TINY, Layout(2, sp=2), 64)
    in_a_block = 4 * (2 * 2 * 64 * 16 - 64 * 16 + 16 * 32) + 8 * 4 * 64
    at_the_ends = 4 * (16 - 32) * 8 + 8 * (2 * 64 - 2)
    assert cut == whole._replace(
        activations=whole.activations + 2 * in_a_block + at_the_ends, peak=whole.peak + 2 * in_a_block + at_the_ends
    )


@pytest.mark.parametrize(("length", "copies"), [(32, 3), (31, 4)])
def test_the_peak_may_be_where_gradients_of_keys_and_values_go_home(length, copies):
    """Over sp 16 and 2 positions a rank; where the length does not divide padding copies them once more."""
    config = dataclasses.replace(TINY, max_length=length)
    planned = plan(config, Layout(16, sp=16), 128)
    dense, experts = 4 * (48 * 16 + 16 * 16 + 4 * 16 + 3 * 8 * 16 + 2 * 16), 4 * 4 * 3 * 8 * 16
    kept = Step(config, Layout(16, sp=16), 128).block_activations(256) + 4 * 128 * (8 * 16 + 1 + 2 * 2)
    gradients = 4 * 256 * 16 + dense + experts // 16
    moving = copies * 4 * 2 * 16 * 128 * 16
    always = planned.parameters + planned.optimizer + 4 * (2 * 256 * 16 + 16) + 8 * 128 + 4 * 2 * 8
    assert planned.peak == always + kept + gradients + dense + moving


def test_uneven_positions_are_those_of_the_fullest_rank():
    uneven = dataclasses.replace(TINY, max_length=31)
    assert [Layout(4, sp=4).positions(one) for one in (TINY, uneven)] == [8, 8]
    assert plan(uneven, Layout(4, sp=4), 32).activations == plan(TINY, Layout(4, sp=4), 32).activations - 2 * 4 * 8


def test_a_shard_is_the_largest_part():
    shapes = weights(TINY)
    assert shard(TINY, Layout(8, 2), "blocks.0.moe.experts.w1_EFD", shapes["blocks.0.moe.experts.w1_EFD"]) == 2 * 2 * 16
    assert shard(TINY, Layout(3), "blocks.0.moe.experts.w1_EFD", shapes["blocks.0.moe.experts.w1_EFD"]) == 2 * 8 * 16
    assert shard(TINY, Layout(3), "norm.weight", shapes["norm.weight"]) == 6


@pytest.mark.parametrize(("tokens", "forwards"), [(4, 2500), (1024, 9)])
def test_beforehand_is_the_tail_of_forwards_played_one_by_one(tokens, forwards):
    """Rows counted from ids: of thousands of forwards all but one in a thousand, of few the fullest."""
    trace = synthetic_trace(tokens=40_000, layers=1, experts=32, bias=False)
    config = dataclasses.replace(SMALL, num_layers=1, max_length=4)
    ids_TK = trace.expert_ids_LTK[0, packing_order(trace)].long() // 8  # 32 experts, 8 a rank
    played = ids_TK[: forwards * 4 * tokens].view(forwards, -1)
    most = sorted(int(torch.bincount(ranks, minlength=4).max()) for ranks in played)
    rows = most[-3] if tokens == 4 else most[-1]
    assert beforehand(config, Layout(8, 4), tokens, trace) == plan(config, Layout(8, 4), tokens, rows / (tokens * 4))


def test_beforehand_takes_the_layers_of_a_forward_together():
    """Two layers that fill the first of two ranks by turns, each in half of the forwards, never both."""
    one_rank, both = torch.tensor([2.0, 1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 1.0, 0.0])
    first, second = one_rank.expand(640, 4), both.expand(640, 4)
    trace = RoutingTrace.from_router_logits([torch.cat([first, second]), torch.cat([second, first])], RouterConfig(), 2)
    by_turns = [plan(TINY, Layout(2, 2), 32, loads) for loads in ([2.0, 1.0], [1.0, 2.0])]
    found = beforehand(TINY, Layout(2, 2), 32, trace)
    assert found == Footprint(*map(max, zip(*by_turns)))
    assert found.peak < plan(TINY, Layout(2, 2), 32, 2.0).peak


def test_beforehand_depends_on_routing_only_where_experts_are_spread():
    trace = data.open("balanced")
    assert beforehand(SMALL, Layout(4), 1024, trace) == plan(SMALL, Layout(4), 1024)
    mean, most = plan(SMALL, Layout(4, 4), 1024), beforehand(SMALL, Layout(4, 4), 1024, trace)
    assert mean.receive < most.receive < 2 * mean.receive
    assert mean.activations < most.activations
    assert mean.parameters == most.parameters


def test_a_trace_shorter_than_a_forward_is_one():
    trace = data.open("balanced").select(layer=0)
    rows = torch.bincount(trace.expert_ids_LTK[0].flatten().long() // 8, minlength=4).max()
    tokens = trace.num_tokens  # a quarter of them a rank
    planned = beforehand(dataclasses.replace(SMALL, num_layers=1), Layout(4, 4), tokens, trace)
    assert planned.receive == 4 * 4 * rows * SMALL.moe.dim


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the trace has 6 layers of 32 experts, top 4, the model 2 of 4, top 2"):
        beforehand(TINY, Layout(2, 2), 32, data.open("balanced"))


@pytest.mark.parametrize(
    ("layout", "tokens", "load", "message"),
    [
        ((3, 2), 32, 1, "ep=2 must divide the 3 ranks"),
        ((2, 2, 2), 32, 1, "sp=2 must divide the 1 ranks beside ep=2"),
        ((2, 2), 32, 2.5, "load=2.5"),
        ((2, 2), 33, 1, "tokens=33 must be 32 positions of each of some sequences of 32 over sp=1"),
        ((2, 1, 2), 24, 1, "tokens=24 must be 16 positions of each of some sequences of 32 over sp=2"),
    ],
)
def test_what_cannot_be_planned_is_named(layout, tokens, load, message):
    with pytest.raises(ValueError, match=message):
        plan(TINY, Layout(*layout), tokens, load)


def test_only_what_the_formulas_cover_is_planned():
    with pytest.raises(ValueError, match="one process is planned in float32 without checkpointing"):
        plan(TINY, Layout(1), 32, checkpointing=True)
    with pytest.raises(ValueError, match="float16 must be"):
        plan(TINY, Layout(2), 32, dtype=torch.float16)
    grouped = dataclasses.replace(TINY, moe=TINY.moe.replace(backend="grouped"))
    with pytest.raises(ValueError, match="backend='loop'"):
        plan(grouped, Layout(1), 32)
