"""Figures and texts of balancing: drawn from results, and their numbers."""

import numpy as np
import pytest

from moe_lab import RouterConfig, data
from moe_lab.study.balance_runs import BalanceRuns
from moe_lab.study.balancing import METHODS
from moe_lab.study.counterfactual import Setup, learn, outcome
from moe_lab.study.metrics import null_band
from moe_lab.view import balancing
from synthetic import synthetic_trace

SETUP = Setup(ep=4, tokens_per_rank=50, steps=6)
SHOWN = [name for name in METHODS if name != "jitter"]


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(tokens=1000, layers=2, experts=8, top_k=2, router=RouterConfig(), span=100)


def test_outcomes_are_drawn_where_their_numbers_are(trace):
    found = [outcome(trace, name, setup=SETUP, layer=1) for name in SHOWN]
    load, moved, padding = balancing.outcomes(found).axes
    assert [label.get_text() for label in load.get_yticklabels()] == SHOWN
    assert list(load.lines[0].get_xdata()) == [one.load.metrics.max_over_mean for one in found]
    assert list(moved.lines[0].get_xdata()) == [100 * one.rerouted for one in found]
    assert list(moved.lines[1].get_xdata()) == [100 * one.gate_lost for one in found]
    assert list(padding.lines[0].get_xdata()) == [100 * one.padding for one in found]
    text = repr(balancing.OutcomeText(found))
    assert text.startswith("layer 1 · 5 steps of 4 ranks x 50 tokens · chance")
    line = next(line for line in text.splitlines() if line.startswith("capacity, probs")).split()
    one = found[SHOWN.index("capacity, probs")]
    assert line[2:5] == [
        f"{one.load.metrics.max_over_mean:.2f}",
        f"{100 * one.dropped:.1f}",
        f"{100 * one.unserved:.1f}",
    ]
    assert line[-1] == f"{one.exchanged:,}"


def test_steps_are_drawn_over_chance(trace):
    learned = learn(trace, "bias", 0.1, setup=SETUP)
    series = {f"layer {i}": balancing.steps_load(learned, i) for i in (0, 1)}
    counts = learned.counts_SLE[3, 1]
    assert series["layer 1"][3] == pytest.approx(float(counts.max() / counts.double().mean()))
    (axes,) = balancing.over_steps(series, null_band(200, 2, 8), "Title", "a note").axes
    assert np.array_equal(axes.lines[1].get_ydata(), series["layer 1"])
    text = repr(balancing.StepsText(series, every=4))
    assert text.splitlines()[0].split() == ["step", "0", "4", "last", "mean", "of", "last", "10"]
    assert text.splitlines()[1].split()[-1] == f"{series['layer 0'].mean():.2f}"


def test_the_shipped_runs_are_of_every_method_that_can_be_trained():
    runs = BalanceRuns.read(data.result("balance.json"))
    assert runs.methods == tuple(name for name in METHODS if name != "expert choice")
    assert runs.seeds == (0, 1, 2)
    drawn = balancing.trained(runs)
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == list(runs.methods)
    text = repr(balancing.TrainedText(runs)).splitlines()
    assert len(text) == 1 + len(runs.methods)
    assert text[1].split() == ["none", "3", "+0.000", "0.000", "4.30", "0.59", "4.29", "0.0"]
