"""Padding as tables and figures."""

import torch

from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.forced import forced_view
from moe_lab.study.threshold import sweep_threshold
from moe_lab.study.waste import waste
from moe_lab.view import padding, theme

COUNTS = CountMatrix(counts_RP=torch.tensor([[3, 1, 2, 0], [1, 1, 4, 0]]))
IDS = [torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0, 1], [0, 3]])]


def test_known_splits_and_thresholds_as_text():
    lines = padding.SplitsText(COUNTS).text().splitlines()
    assert [line.split() for line in lines[1:3]] == [["0", "4", "2", "2"], ["1", "2", "4", "2"]]
    assert lines[-1] == "padded to 4: worst rank's overhead 33.3 %"
    text = padding.ThresholdText({"x": sweep_threshold([COUNTS], [0.3, 0.4])}).text()
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["0.30", "0", "of", "1", "0.0"],
        ["0.40", "1", "of", "1", "33.3"],
    ]


def test_known_totals_as_text():
    found = waste([IDS], Placement.blockwise(4, 2))
    text = padding.WasteText(found, dim=1000, hidden_dim=10).text()
    # Splits [[2, 2], [3, 1]] padded to 3: 2 + 2 sent, 1 + 3 returned, 2000 bytes a row.
    (line,) = [line for line in text.splitlines() if line.startswith("equal split")]
    assert line.split() == ["equal", "split", "50.0", "71.4", "0.0", "0.0", "0.0", "0.0", "0.0", "1.25"]
    assert "rows that leave ranks: per assignment 5, per rank 4, per node 0" in text


def test_every_figure_has_a_title_and_is_of_its_width():
    views = {2: forced_view(IDS, Placement.blockwise(4, 2))}
    found = {2: waste([IDS], Placement.blockwise(4, 2))}
    figures = {
        padding.xray(COUNTS): "As they are",
        padding.tiles(COUNTS, 8): "Experts' rows in tiles of 8",
        padding.thresholds({"x": sweep_threshold([COUNTS], [0.3, 0.4])}): "Micro-batches padded",
        padding.policies(found, ["none"]): "In both exchanges",
        padding.forced(views): "Busiest rank over the mean",
    }
    for drawn, title in figures.items():
        assert theme.title(drawn) == title
        assert theme.css_width(drawn) == theme.WIDTH
    widths = [bar.get_width() for bar in padding.xray(COUNTS).axes[1].patches]
    assert sum(widths) == 4 * 4  # real and zero rows fill every segment


def test_forced_balance_as_text():
    text = padding.ForcedText({2: forced_view(IDS, Placement.blockwise(4, 2))}).text()
    assert text.splitlines()[1].split()[:4] == ["2", "0", "1.25", "1.00"]
    assert text.split()[-1] == "-", "two ranks are one node, which no row leaves"
