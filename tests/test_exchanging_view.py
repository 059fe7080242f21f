import torch

from moe_lab.jobs.exchange_runs import Overlap
from moe_lab.layer.splits import CountMatrix, choose_splits
from moe_lab.phases import Span
from moe_lab.study.ranks import RankLoad
from moe_lab.study.timeline import Flight, RankSteps
from moe_lab.study.timing import Timing
from moe_lab.view import exchanging

COUNTS = CountMatrix(counts_RP=torch.tensor([[2, 3, 1, 4], [0, 1, 5, 2]]))


def test_matrix_by_hand():
    lines = exchanging.MatrixText(COUNTS, choose_splits(COUNTS.splits_RR, "force")).text().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["to", "rank", "0", "1", "sent", "zeros"],
        ["from", "0", "5", "5", "10", "4"],
        ["from", "1", "1", "7", "8", "6"],
        ["received", "6", "12", "18"],
    ]


def test_blocks_hold_all_rows_on_both_sides():
    left, right = exchanging.blocks(COUNTS, "by hand").axes
    lengths = [[round(bar.get_width()) for bar in axes.patches if bar.get_width()] for axes in (left, right)]
    assert sorted(lengths[0]) == sorted(lengths[1]) == [1, 1, 2, 2, 3, 4, 5]


def test_heatmaps_and_stragglers_have_one_picture_each():
    assert [axes.get_title(loc="left") for axes in exchanging.heatmaps([COUNTS] * 2, "by hand").axes[:2]] == [
        "EP 2"
    ] * 2
    load = RankLoad(2, 64, 3, 1, 1.5, 1.1, 1.0, 1.2, 9.0, 9.0, 9.0)
    result = exchanging.StragglerTable((load, load._replace(ranks=4, straggler=1.75)))
    assert "1.750" in result.text()
    solid = exchanging.stragglers(result, "by hand").axes[0].lines[0]
    assert (list(solid.get_xdata()), list(solid.get_ydata())) == ([2, 4], [1.5, 1.75])


def test_a_timeline_draws_wait_and_transfer_in_ms():
    steps = tuple(
        RankSteps((Span("router", 0.0, 0.001),), (Flight("dispatch", at, at, 0.005),)) for at in (0.001, 0.003)
    )
    (axes,) = exchanging.gantt(steps, "by hand").axes
    bars = [(round(bar.get_x(), 6), round(bar.get_width(), 6), bar.get_hatch()) for bar in axes.patches]
    assert (1.0, 2.0, "////") in bars
    assert bars.count((3.0, 2.0, "")) + bars.count((3.0, 2.0, None)) == 2
    assert exchanging.TimelineTable(steps).text().splitlines()[1].split() == [
        "dispatch",
        "0",
        "2.0",
        "2.0",
        "4.0",
        "0.0",
    ]


def test_overlap_is_a_line_a_direction():
    one = Overlap("combine", Timing(3, 2, 4), Timing(1, 1, 2), Timing(-2, -3, -1))
    assert exchanging.OverlapTable((one,)).text().splitlines()[1] == "combine     3.00   1.00    -2.00 [-3.00, -1.00]"
