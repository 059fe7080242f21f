"""The plan against the bytes that gloo ranks hold."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from moe_lab.jobs.memory import measure
from moe_lab.models.lm import MoELM
from moe_lab.parallel import RankPool
from moe_lab.study.planner import Layout, plan, trace_load
from moe_lab.study.recorder import record
from tests.test_lm import TINY

CONFIG = dataclasses.replace(TINY, max_length=64, moe=TINY.moe.replace(dim=64, hidden_dim=16, num_experts=8))
BATCH = 8


@pytest.fixture(scope="module")
def text_BL():
    """Sequences of real text, with the byte after each."""
    length = CONFIG.max_length + 1
    return torch.tensor(list(Path(argparse.__file__).read_bytes()[: 100 * length])).view(100, length)


@pytest.fixture(scope="module")
def trace(text_BL):
    """Of the model that `measure` builds, on text that it does not see."""
    torch.manual_seed(0)
    model = MoELM(CONFIG)
    with record(model) as recorder, torch.no_grad():
        model(text_BL[BATCH:, :-1])
    return recorder.trace()


def check(held, layout, trace, config=CONFIG):
    """At the rows that came, every term to the byte and the peak within 10 %; beforehand, no term is above the plan.

    Beforehand is at the tail of another text's routing, which one ordinary step does not reach.
    """
    tokens = BATCH * layout.sp // layout.ranks * layout.positions(config)
    beforehand = plan(config, layout, tokens, trace_load(trace, layout, tokens))
    for rank in held:
        came = plan(config, layout, tokens, [rows / (tokens * config.moe.top_k) for rows in rank.rows])
        for name in ("activations", "receive", "gathered"):
            assert rank.terms[name] == getattr(came, name), name
        assert rank.peak == pytest.approx(came.peak, rel=0.1)
        for name, counted in rank.terms.items():
            assert counted <= getattr(beforehand, name), name
    for name in ("parameters", "gradients", "optimizer"):
        assert max(rank.terms[name] for rank in held) == getattr(beforehand, name), name


def test_one_process(text_BL, trace):
    check([measure(CONFIG, text_BL[:BATCH], None)], Layout(1), trace)


def test_two_ranks(text_BL, trace):
    uneven = dataclasses.replace(CONFIG, max_length=63)
    with RankPool(2, backend="gloo") as pool:
        check(pool.run(measure, CONFIG, text_BL[:BATCH], 2), Layout(2, 2), trace)
        check(pool.run(measure, CONFIG, text_BL[:BATCH], 1, 2), Layout(2, sp=2), trace)
        fullest = pool.run(measure, uneven, text_BL[:BATCH, :64], 1, 2)[:1]  # the other has padding for a position
        check(fullest, Layout(2, sp=2), trace, uneven)


def test_four_ranks(text_BL, trace):
    with RankPool(4, backend="gloo") as pool:
        for ep, sp in ((1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (1, 2)):
            check(pool.run(measure, CONFIG, text_BL[:BATCH], ep, sp), Layout(4, ep, sp), trace)
