"""Pairs of experts, stragglers and specialisation as text and figures: by hand, and drawn."""

import dataclasses

import pytest
import torch

from moe_lab import data
from moe_lab.study.ranks import rank_load
from moe_lab.study.structure import specialisation
from moe_lab.view import structure, theme
from synthetic import synthetic_trace
from test_structure import trace_of


def test_onward_is_a_ratio_to_the_next_layers_load():
    # Layer 0 sends tokens to experts 0, 0, 1, 1; layer 1 to 0, 0, 0, 1: of expert 1's tokens half go to each.
    trace = trace_of([[[0], [0], [1], [1]], [[0], [0], [0], [1]]], experts=3)
    got = structure.onward(trace, 0, 1)
    assert got.lift_EE[0, :2].tolist() == pytest.approx([1 / 0.75, 0])
    assert got.lift_EE[1, :2].tolist() == pytest.approx([0.5 / 0.75, 0.5 / 0.25])
    assert got.lift_EE[2].isnan().all()
    assert got.lift_EE[:, 2].isnan().all(), "nobody goes to expert 2: no chance level"
    assert got.strongest(2) == [(1, 1, pytest.approx(2.0)), (0, 0, pytest.approx(4 / 3))]
    assert "layer 0 to layer 1 · 4 tokens" in repr(got)
    assert "strongest: 1 > 1 (2.0), 0 > 0 (1.3)" in repr(got)


def test_a_pair_is_named_once():
    trace = trace_of([[[0, 1], [0, 1], [2, 3], [0, 2]]], experts=4)
    got = structure.together(trace, 0)
    assert [(a, b) for a, b, _ in got.strongest(2)] == [(2, 3), (0, 1)]
    assert "strongest: 2 + 3" in repr(got)
    assert theme.png(structure.pairs(got)).startswith(b"\x89PNG")


def test_stragglers_are_rank_loads_where_the_trace_is_long_enough():
    trace = synthetic_trace(tokens=512)
    got = structure.stragglers(trace, (2, 4), (64, 256))
    assert got.loads[0][1] == rank_load(trace, 4, 64)
    assert got.loads[1][1] is None
    assert [line.split()[-1] for line in got.text().splitlines()[2:]] == [
        f"({got.loads[0][1].chance_mean:.2f})",
        "-",
    ]
    assert theme.title(structure.straggler_lines(got)) == "Straggler factor"


def test_specialisation_beside_chance_of_several_traces():
    traces = {"balanced": data.open("balanced"), "no balancing": data.open("unbalanced")}
    got = structure.Telling(traces)
    share = specialisation(traces["balanced"])
    assert f"{100 * float(share.share_L[0]):.1f} ({100 * float(share.high_L[0]):.1f})" in got.text().splitlines()[1]
    assert theme.png(structure.telling(got)).startswith(b"\x89PNG")
    one = dataclasses.replace(traces["balanced"]).layer(0)
    with pytest.raises(ValueError, match="layers of one"):
        structure.Telling({"balanced": traces["balanced"], "one": one})


def test_figures_of_many_experts_and_ratios_draw():
    pairs = structure.Pairs("next", (0, 1), 9, torch.rand(256, 256, dtype=torch.float64) * 5)
    assert theme.png(structure.pairs(pairs, pairs)).startswith(b"\x89PNG")
