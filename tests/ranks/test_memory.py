"""The plan against the bytes that gloo ranks hold."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from moe_lab.jobs.memory import measure
from moe_lab.models.lm import MoELM
from moe_lab.parallel import RankPool
from moe_lab.study.planner import Layout, activations, plan, trace_load
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


def check(held, layout, trace):
    """To the byte at the rows that came; within 10 % planned beforehand, from the tail of another text's routing.

    Buffers planned for that tail are larger than those of one ordinary step, by what the tail is above it.
    """
    tokens = BATCH // layout.ranks * CONFIG.max_length
    planned = plan(CONFIG, layout, tokens, trace_load(trace, layout, tokens))
    for name in ("parameters", "gradients", "optimizer", "gathered"):
        assert max(rank.terms[name] for rank in held) == getattr(planned, name), name
    for rank in held:
        by_layer = [activations(CONFIG, tokens, rows) for rows in rank.rows]
        assert rank.terms["activations"] == sum(by_layer) / len(by_layer)
        assert rank.terms["receive"] == (4 * max(rank.rows) * CONFIG.moe.dim if layout.ep > 1 else 0)
        assert rank.terms["receive"] <= planned.receive
    assert planned.activations == pytest.approx(max(rank.terms["activations"] for rank in held), rel=0.1)
    assert planned.peak == pytest.approx(max(rank.peak for rank in held), rel=0.1)


def test_one_process(text_BL, trace):
    check([measure(CONFIG, text_BL[:BATCH], None)], Layout(1), trace)


def test_two_ranks(text_BL, trace):
    with RankPool(2, backend="gloo") as pool:
        check(pool.run(measure, CONFIG, text_BL[:BATCH], 2), Layout(2, 2), trace)


def test_four_ranks(text_BL, trace):
    with RankPool(4, backend="gloo") as pool:
        for ep in (1, 2, 4):
            check(pool.run(measure, CONFIG, text_BL[:BATCH], ep), Layout(4, ep), trace)
