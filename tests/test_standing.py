import dataclasses

import pytest

from moe_lab.study.measurements import measured
from moe_lab.study.standing import standings, summary

OF = {"bench": "layer", "tokens": 4, "dim": 8, "hidden_dim": 8, "num_experts": 2, "top_k": 1, "device": "this CPU"}


def row(arm, rounds, **of):
    dense = ("dense", [[5.0], [10.0], [4.0]])
    of = {"layer": "a", "dtype": "float32"} | of
    return measured([[ms] for ms in rounds], to=dense, keep=True, arm=arm, **OF, **of)


ROWS = [
    row("dense", [5.0, 10.0, 4.0]),
    row("ours", [6.0, 12.0, 6.0]),
    row("slow", [60.0, 12.0, 24.0]),
    row("fast", [10.0, 24.0, 8.0]),
    row("ours", [9.0, 9.0, 9.0], layer="b"),
    row("fast", [6.0, 6.0, 6.0], layer="b"),
    row("ours", [9.0, 9.0, 9.0], layer="c"),
]


def test_ratios_are_of_rounds_and_to_the_peer_of_the_least_median():
    first, second = standings(ROWS, "ours", ("slow", "fast"))
    assert (first.layer, first.peer, first.ms) == ("a", "fast", 6.0)
    assert first.ratio.median == pytest.approx(0.6)  # of 0.6, 0.5 and 0.75; that of the medians would be 0.6 too
    assert (first.ratio.low, first.ratio.high) == (0.5, 0.75)
    assert first.dense == pytest.approx(1.2)
    assert (second.layer, second.ratio.median) == ("b", 1.5)


def test_the_summary_has_medians_and_the_worst():
    found = standings(ROWS, "ours", ("fast",))
    assert summary(found) == pytest.approx({"median": 1.05, "largest": 1.5, "dense median": 1.5, "dense largest": 1.8})
    assert set(summary([one._replace(dense=None) for one in found])) == {"median", "largest"}


def test_rows_without_rounds_have_no_standing():
    rows = [dataclasses.replace(r, repeats=None) for r in ROWS]
    assert standings(rows, "ours", ("fast",)) == []
