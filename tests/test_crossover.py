import dataclasses

import pytest

from moe_lab.study.crossover import Point, winners
from moe_lab.study.measurements import Measurements, measured

HERE = {"device": "this CPU"}
OF = {"bench": "sweep", "layer": "tiny", "dim": 8, "hidden_dim": 4, "dtype": "float32", "device": "this CPU"}
AT = OF | {"tokens": 16, "num_experts": 4, "top_k": 2, "skew": 0.0}


def row(arm, times, **changes):
    return measured([[t] for t in times], keep=True, **AT | {"arm": arm, "error": 1e-7} | changes)


def test_the_smallest_median_wins_and_rounds_are_paired():
    rows = (row("loop", [2.0, 20.0, 8.0]), row("grouped", [1.0, 10.0, 4.0]), row("padded", [9.0, 90.0, 36.0]))
    (won,) = winners(Measurements(HERE, rows))
    assert won.point == Point(16, 4, 2, 0.0)
    assert (won.arm, won.second, won.ms) == ("grouped", "loop", 4.0)
    assert (won.lead, won.lead_low, won.lead_high) == (2.0, 2.0, 2.0)
    assert (won.share, won.sure) == (1.0, True)


def test_a_tie_within_noise_is_not_sure():
    rows = (row("loop", [1.0, 3.0, 1.0, 3.0, 2.0]), row("grouped", [3.0, 1.0, 3.1, 1.1, 2.1]))
    (won,) = winners(Measurements(HERE, rows))
    assert won.arm == "loop"
    assert 0.3 < won.share < 0.8
    assert not won.sure
    assert won.lead_low < 1 < won.lead_high


def test_bounds_and_points_with_one_arm_do_not_count():
    rows = (row("dense", [0.1], error=None), row("loop", [1.0]), row("grouped", [2.0]), row("loop", [1.0], tokens=32))
    assert [(won.arm, won.point.tokens) for won in winners(Measurements(HERE, rows))] == [("loop", 16)]
    assert winners(Measurements(HERE, rows), "forward+backward") == []


def test_what_cannot_be_compared_is_refused():
    first, second = row("loop", [1.0, 2.0]), row("grouped", [1.0])
    with pytest.raises(ValueError, match="different numbers of repeats"):
        winners(Measurements(HERE, (first, second)))
    with pytest.raises(ValueError, match="repeats=None of 'loop'"):
        winners(Measurements(HERE, (dataclasses.replace(first, repeats=None),)))
    with pytest.raises(ValueError, match="skew=None of 'loop'"):
        winners(Measurements(HERE, (dataclasses.replace(first, skew=None),)))
