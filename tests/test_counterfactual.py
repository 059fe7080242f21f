"""Methods on recorded logits: by hand, against the layer's own functions, and what each may move."""

import dataclasses

import pytest
import torch

from moe_lab import RouterConfig
from moe_lab.layer.balance import bias_delta
from moe_lab.layer.capacity import drop_over_capacity
from moe_lab.layer.losses import switch_loss, transformers_loss, z_loss
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import count, route
from moe_lab.study.balancing import METHODS, method
from moe_lab.study.batches import count_matrix
from moe_lab.study.counterfactual import Setup, apply, learn, outcome, packed_logits
from moe_lab.study.load import packing_order
from moe_lab.study.metrics import null_band
from moe_lab.study.padding import overhead
from synthetic import synthetic_trace

SETUP = Setup(ep=4, tokens_per_rank=50, steps=6)
SHOWN = [name for name in METHODS if name != "jitter"]


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(tokens=1000, layers=2, experts=8, top_k=2, router=RouterConfig(), span=100)


def logits_of(trace, step, layer=1):
    """One step's logits, cut here from the trace."""
    order_T = packing_order(trace)[200 * step : 200 * step + 200]
    return trace.logits_LTE[layer, order_T].double()


def test_the_bias_learns_step_by_step(trace):
    learned = learn(trace, "bias, not centred", 0.02, setup=SETUP, layer=1)
    bias_E = torch.zeros(8, dtype=torch.float64)
    for step in range(6):  # the sixth is the first text again
        counts_E = route(logits_of(trace, step % 5), RouterConfig(), 2, expert_bias_E=bias_E).counts_E
        assert torch.equal(learned.counts_SLE[step, 0], counts_E)
        bias_E = bias_E + bias_delta(counts_E, 0.02, centred=False)
    assert torch.equal(learned.state_LE[0], bias_E)
    assert learned.loss_S.isnan().all()
    centred = learn(trace, "bias", 0.02, setup=SETUP, layer=1)
    assert abs(float(centred.state_LE.sum())) < 1e-6 < abs(float(bias_E.sum()))
    assert torch.equal(centred.counts_SLE, learned.counts_SLE)  # what all have in common moves no choice


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("switch, global", lambda r, parts: switch_loss(r.scores_TE, r.expert_ids_TK)),
        (
            "switch, micro-batch",
            lambda r, parts: sum(switch_loss(r.scores_TE[p], r.expert_ids_TK[p]) for p in parts) / 4,
        ),
        (
            "switch, sequence",
            lambda r, parts: (
                sum(switch_loss(r.scores_TE[s], r.expert_ids_TK[s]) for s in (slice(0, 100), slice(100, 200))) / 2
            ),
        ),
        ("z-loss", lambda r, parts: z_loss(r.logits_TE)),
    ],
)
def test_an_offset_goes_down_the_loss_of_its_reduction(trace, name, loss):
    learned = learn(trace, name, 0.1, setup=dataclasses.replace(SETUP, steps=2), layer=1)
    parts = [slice(i, i + 50) for i in range(0, 200, 50)]
    offset_E = torch.zeros(8, dtype=torch.float64)
    for step in range(2):
        routing = route(logits_of(trace, step) + offset_E, RouterConfig(), 2)
        value = loss(routing, parts)
        assert float(learned.loss_S[step]) == pytest.approx(float(value))
        assert torch.equal(learned.counts_SLE[step, 0], routing.counts_E)
        ids_TK, gradient = routing.expert_ids_TK, []
        for e in range(8):  # by differences: which experts are chosen does not move
            values = []
            for sign in (1, -1):
                moved_TE = logits_of(trace, step) + offset_E + sign * 1e-6 * torch.eye(8).double()[e]
                values.append(loss(routing._replace(scores_TE=moved_TE.softmax(1), logits_TE=moved_TE), parts))
            gradient.append(float(values[0] - values[1]) / 2e-6)
        gradient_E = torch.tensor(gradient, dtype=torch.float64)
        assert torch.equal(count(ids_TK, 8), routing.counts_E)
        offset_E = offset_E - 0.1 * gradient_E / gradient_E.square().mean().sqrt()
    torch.testing.assert_close(learned.state_LE[0], offset_E, rtol=1e-5, atol=1e-7)


def test_pooled_layers_learn_together_whichever_is_asked_for(trace):
    both = learn(trace, "switch, hf", 0.1, setup=SETUP)
    for place in (0, 1):
        one = learn(trace, "switch, hf", 0.1, setup=SETUP, layer=place)
        assert torch.equal(one.state_LE[0], both.state_LE[place])
        assert torch.equal(one.counts_SLE[:, 0], both.counts_SLE[:, place])
    first = transformers_loss([logits_of(trace, 0, layer) for layer in (0, 1)], 2)
    assert float(both.loss_S[0]) == pytest.approx(float(first))


@pytest.mark.parametrize("name", ["none", "bias", "switch, global", "sinkhorn", "capacity, probs"])
def test_layers_alone_and_together_learn_the_same(trace, name):
    both = learn(trace, name, setup=SETUP)
    for place in (0, 1):
        one = learn(trace, name, setup=SETUP, layer=place)
        assert torch.equal(one.counts_SLE[:, 0], both.counts_SLE[:, place])
        torch.testing.assert_close(one.state_LE[0], both.state_LE[place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SHOWN)
def test_an_outcome_counts_what_its_own_routing_says(trace, name):
    found = outcome(trace, name, setup=SETUP, layer=1)
    way, state_E = method(name), learn(trace, name, setup=SETUP, layer=1).state_LE[0]
    logits_TE = packed_logits(trace)[1]
    ranks = [apply(way, trace.info.router, 2, part, state_E) for part in logits_TE.split(50)]
    free = route(logits_TE, RouterConfig(), 2)
    ids = [r.expert_ids_TK.tolist() for r in ranks]
    made = [{e for e in row if e >= 0} for part in ids for row in part]
    wanted = [set(row) for row in free.expert_ids_TK.tolist()]
    assert found.rerouted == pytest.approx(sum(len(w - m) for w, m in zip(wanted, made)) / 2000)
    assert found.unserved == sum(not m for m in made) / 1000
    assert found.dropped == (pytest.approx(1 - sum(map(len, made)) / 2000) if way.acts == "drops" else 0)
    gates = [dict(zip(*pair)) for r in ranks for pair in zip(r.expert_ids_TK.tolist(), r.gates_TK.tolist())]
    lost = sum(
        max(0.0, gate - got.get(e, 0.0))
        for got, row, weights in zip(gates, free.expert_ids_TK.tolist(), free.gates_TK.tolist())
        for e, gate in zip(row, weights)
    )
    assert found.gate_lost == pytest.approx(lost / float(free.gates_TK.sum()))
    steps = [[r.expert_ids_TK for r in ranks[i : i + 4]] for i in range(0, 20, 4)]
    matrices = [count_matrix(step, Placement.blockwise(8, 4)) for step in steps]
    plain, even = ([overhead(m, policy) for m in matrices] for policy in ("none", "equal_split"))
    busiest = sum(max(o.rows_R) for o in plain)
    assert found.straggler_factor == pytest.approx(busiest * 4 / sum(sum(o.rows_R) for o in plain))
    zeros, real = (sum(sum(getattr(o, f)) for o in even) for f in ("exchange_zeros_R", "rows_R"))
    assert found.padding == pytest.approx(zeros / (2 * real))
    home = sum(int(m.splits_RR.diagonal().sum()) for m in matrices)
    assert found.exchanged == real - home
    counts = [sum(count(ids_TK, 8) for ids_TK in step) for step in steps]
    assert found.load.metrics.max_over_mean == pytest.approx(
        sum(float(c.max() / c.double().mean()) for c in counts) / 5
    )
    assert found.load.null == null_band(200, 2, 8, windows=5)


def test_methods_move_what_they_are_said_to(trace):
    found = {name: outcome(trace, name, setup=SETUP, layer=1) for name in SHOWN}
    load = {name: one.load.metrics.max_over_mean for name, one in found.items()}
    assert found["none"][4:8] == (0, 0, 0, 0)
    assert load["expert choice"] == 1
    assert load["sinkhorn"] < load["none"]
    assert found["bias"].gate_lost < found["bias"].rerouted
    assert found["capacity, token-major"].unserved >= found["capacity, slot-major"].unserved
    room = [drop_over_capacity(route(p, RouterConfig(), 2), 1.25, "probs") for p in packed_logits(trace)[1].split(50)]
    assert found["capacity, probs"].dropped == pytest.approx(sum(r.num_dropped for r in room) / 2000)


def test_what_cannot_be_asked_is_refused(trace):
    with pytest.raises(ValueError, match="jitter multiplies the router's input"):
        learn(trace, "jitter", setup=SETUP)
    with pytest.raises(ValueError, match="tokens_per_rank=600 on ep=4 ranks is 2,400 tokens: this trace has 1,000"):
        learn(trace, "bias", setup=Setup(ep=4, tokens_per_rank=600))
    with pytest.raises(ValueError, match="layer=7"):
        learn(trace, "bias", setup=SETUP, layer=7)
    with pytest.raises(ValueError, match="needs logits"):
        packed_logits(dataclasses.replace(trace, logits_LTE=None))
    with pytest.raises(ValueError, match="steps=0"):
        Setup(steps=0)


@pytest.mark.parametrize("name", ["sinkhorn", "expert choice", "capacity, probs"])
def test_a_choice_that_hangs_on_its_micro_batch_is_made_rank_by_rank(trace, name):
    learned = learn(trace, name, setup=SETUP, layer=1)
    logits_TE, none_E = logits_of(trace, 0), torch.zeros(8, dtype=torch.float64)
    parts = [apply(method(name), RouterConfig(), 2, part, none_E, None).counts_E for part in logits_TE.chunk(4)]
    whole_E = apply(method(name), RouterConfig(), 2, logits_TE, none_E, None).counts_E
    assert torch.equal(learned.counts_SLE[0, 0], sum(parts))
    assert not torch.equal(sum(parts), whole_E)
