"""The plan against the bytes that gloo ranks hold."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from moe_lab.jobs.layouts import at_these_rows, memory, other_trace
from moe_lab.jobs.memory import measure, watch_steps
from moe_lab.models.lm import MoELM
from moe_lab.parallel import RankPool
from moe_lab.study.planner import Layout, plan
from tests.test_lm import TINY

CONFIG = dataclasses.replace(TINY, max_length=64, moe=TINY.moe.replace(dim=64, hidden_dim=16, num_experts=8))
HEAVY = dataclasses.replace(CONFIG, max_length=32, moe=CONFIG.moe.replace(num_experts=32, hidden_dim=64))
UNEVEN = dataclasses.replace(CONFIG, max_length=63)
BATCH, STEPS = 8, 100


def model_of(config):
    torch.manual_seed(0)
    return MoELM(config)


def drawn_steps(config):
    """Batches of real text, drawn at random, (S, B, max_length + 1)."""
    length = config.max_length + 1
    text_NL = torch.tensor(list(Path(argparse.__file__).read_bytes())).unfold(0, length, length)
    return text_NL[torch.randint(len(text_NL), (STEPS, BATCH), generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def trace():
    """Of text that no step sees."""
    return other_trace(model_of(CONFIG))


def check_each_rank(held, layout, config=CONFIG, **options):
    """At the rows that came to it, what depends on them to the byte, and the peak within 10 %."""
    tokens = BATCH * layout.sp // layout.ranks * layout.positions(config)
    for rank in held:
        came = plan(config, layout, tokens, [rows / (tokens * config.moe.top_k) for rows in rank.rows], **options)
        for name in ("activations", "receive", "gathered"):
            assert rank.terms[name] == getattr(came, name), name
        assert rank.peak == pytest.approx(came.peak, rel=0.1)


def check_fullest(found):
    """What was used at most in all steps, as planned at its rows and as planned beforehand from other text."""
    counted, came, before = found["counted"], found["planned"], found["beforehand"]
    for name in ("parameters", "gradients", "optimizer", "activations", "receive", "gathered"):
        assert counted[name] == came[name], name
    for name in counted:
        assert before[name] == pytest.approx(counted[name], rel=0.1), name


def test_one_process(trace):
    model, steps = model_of(CONFIG), drawn_steps(CONFIG)
    check_each_rank([measure(model, steps[0], None)], Layout(1))
    check_fullest(memory(model, Layout(1), steps, trace))


def test_gradients_count_where_they_outweigh_activations():
    held = measure(model_of(HEAVY), drawn_steps(HEAVY)[0][:1], None)
    planned = plan(HEAVY, Layout(1), HEAVY.max_length)
    assert held.terms["activations"] == planned.activations
    assert held.peak == pytest.approx(planned.peak, rel=0.01)  # without processes nothing is freed late


def test_two_ranks(trace):
    model, steps = model_of(CONFIG), drawn_steps(CONFIG)
    with RankPool(2, backend="gloo") as pool:
        check_each_rank(pool.run(measure, model, steps[0], 2), Layout(2, 2))
        check_fullest(memory(model, Layout(2, 2), steps, trace, pool))
        check_fullest(memory(model, Layout(2, sp=2), steps, trace, pool))
        held = pool.run(measure, model_of(UNEVEN), drawn_steps(UNEVEN)[0], 1, 2)
        check_each_rank(held[:1], Layout(2, sp=2), UNEVEN)  # the other has padding for a position


@pytest.mark.parametrize(("ep", "sp"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (1, 2)])
def test_four_ranks(four, trace, ep, sp):
    model, steps = model_of(CONFIG), drawn_steps(CONFIG)
    check_each_rank(four.run(measure, model, steps[0], ep, sp), Layout(4, ep, sp))
    if (ep, sp) in {(4, 1), (2, 2), (1, 1)}:  # seconds each
        check_fullest(memory(model, Layout(4, ep, sp), steps, trace, four))


@pytest.mark.parametrize(
    ("ep", "sp", "config", "options"),
    [
        (2, 1, CONFIG, {"dtype": torch.bfloat16}),
        (1, 4, UNEVEN, {"dtype": torch.bfloat16}),
        (4, 1, CONFIG, {"checkpointing": True}),
        (1, 2, CONFIG, {"checkpointing": True}),
        (1, 1, HEAVY, {"dtype": torch.bfloat16, "checkpointing": True}),
        (2, 2, CONFIG, {"dtype": torch.bfloat16, "checkpointing": True}),
    ],
)
def test_bfloat16_and_recompute(four, ep, sp, config, options):
    """Shards of weights, their gradients and moments are float32 in bfloat16 too."""
    held = four.run(measure, model_of(config), drawn_steps(config)[0], ep, sp, **options)
    layout = Layout(4, ep, sp)
    full = held[: 1 if config is UNEVEN else 4]  # the last has padding for a position
    check_each_rank(full, layout, config, **options)
    planned = plan(config, layout, layout.positions(config) * BATCH, **options)
    for name in ("parameters", "gradients", "optimizer"):
        assert max(rank.terms[name] for rank in held) == getattr(planned, name), name


def test_without_shared_experts_bfloat16_keeps_no_norm_for_them(four):
    config = dataclasses.replace(CONFIG, moe=CONFIG.moe.replace(num_shared_experts=0))
    held = four.run(measure, model_of(config), drawn_steps(config)[0], 2, dtype=torch.bfloat16)
    check_each_rank(held, Layout(4, 2), config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def four():
    with RankPool(4, backend="gloo") as pool:
        yield pool


def test_what_comes_is_counted_step_by_step(four):
    """All assignments of a step come to some rank, and the largest buffer is that of the layer with most rows."""
    steps = drawn_steps(CONFIG)[:3]
    came_RS = four.run(watch_steps, model_of(CONFIG), steps, 4)
    for step in range(3):
        rows_RL = torch.tensor([came_S[step].rows for came_S in came_RS])
        assert rows_RL.sum(0).tolist() == [BATCH * CONFIG.max_length * CONFIG.moe.top_k] * CONFIG.num_layers
        assert [came_S[step].receive for came_S in came_RS] == (4 * 64 * rows_RL.amax(1)).tolist()
    first = four.run(measure, model_of(CONFIG), steps[0], 4)
    assert [rank.rows for rank in first] == [came_S[0].rows for came_S in came_RS]


def test_the_fullest_of_all_steps_is_counted(four, trace):
    """Here the last, where rows received for one layer are most in another."""
    model, steps, layout = model_of(CONFIG), drawn_steps(CONFIG)[15:19], Layout(4, 4)
    tokens = BATCH * CONFIG.max_length // 4
    came = [step for came_S in four.run(watch_steps, model, steps, 4) for step in came_S]
    planned = [at_these_rows(CONFIG, layout, tokens, step.rows)["activations"] for step in came]
    received = [max(step.receive for step in came[n::4]) for n in range(4)]
    assert (planned.index(max(planned)) % 4, received.index(max(received))) == (3, 1)
    found = memory(model, layout, steps, trace, four)
    assert found["counted"]["activations"] == max(planned)
    assert found["counted"]["receive"] == found["planned"]["receive"] == max(received)


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize(
    ("layers", "length", "moe"),
    [
        (3, 32, {"dim": 256, "num_experts": 4, "top_k": 1}),  # weights are most: sums and gathers
        (3, 32, {"dim": 256, "hidden_dim": 64}),
        (1, 64, {"hidden_dim": 192}),  # large experts
        (2, 64, {"hidden_dim": 256, "num_experts": 4, "top_k": 1}),
        (2, 128, {"hidden_dim": 32, "num_experts": 32, "top_k": 6, "num_shared_experts": 2}),  # outputs are most
        (3, 64, {"dim": 128, "hidden_dim": 64, "num_experts": 16, "top_k": 1, "num_shared_experts": 0}),
    ],
)
def test_other_shapes(four, layers, length, moe, ep):
    config = dataclasses.replace(CONFIG, num_layers=layers, max_length=length, moe=CONFIG.moe.replace(**moe))
    check_each_rank(four.run(measure, model_of(config), drawn_steps(config)[0], ep), Layout(4, ep), config)
