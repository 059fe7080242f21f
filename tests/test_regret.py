import numpy as np
import pytest
from matplotlib.colors import to_hex

from moe_lab.layer import auto
from moe_lab.layer.auto import Case
from moe_lab.view import regret

SMALL = Case("cpu", "float32", False, 4.0, 64, 64, 8)
STEP = SMALL._replace(grad=True)
MEASURED = [
    (SMALL, {"loop": 3.0, "padded": 2.0, "grouped": 4.0, "buffered": 8.0, "batched": 0.5}),
    (STEP, {"loop": 6.0, "padded": 9.0, "grouped": 7.5, "buffered": 12.0}),
]


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """It chooses the loop of both."""
    monkeypatch.setattr(auto, "table", lambda: [(case, {"loop": 1.0, "padded": 2.0}) for case in (SMALL, STEP)])
    auto.relative_times.cache_clear()
    yield
    auto.relative_times.cache_clear()


def test_the_text_has_each_way_to_choose():
    """`batched` is no choice where counts differ: the fastest forward is padded's, 2.0."""
    lines = [line.split() for line in str(regret.RegretText(MEASURED)).splitlines()]
    assert lines == [
        ["device", "choose", "mean", "median", "largest", "cases"],
        ["cpu", "auto", "25.0%", "25.0%", "50.0%", "2"],
        ["cpu", "loop", "25.0%", "25.0%", "50.0%", "2"],
        ["cpu", "padded", "25.0%", "25.0%", "50.0%", "2"],
        ["cpu", "grouped", "62.5%", "62.5%", "100.0%", "2"],
        ["cpu", "buffered", "200.0%", "200.0%", "300.0%", "2"],
    ]


def test_the_figure_has_a_dot_a_backend_and_a_ring_at_the_choice():
    (axes,) = regret.choice_dots(MEASURED, "cpu", "by hand").axes
    dots = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    rings = [line for line in dots if line.get_markerfacecolor() == "none"]
    at = {(to_hex(d.get_color()), int(d.get_ydata()[0])): float(d.get_xdata()[0]) for d in dots if d not in rings}
    names = ("loop", "padded", "grouped", "buffered")
    expected = ((1.5, 1.0, 2.0, 4.0), (1.0, 1.5, 1.25, 2.0))
    assert at == {(regret.COLOURS[name], y): x for y, row in enumerate(expected) for name, x in zip(names, row)}
    assert np.array([(r.get_xdata()[0], r.get_ydata()[0]) for r in rings]).tolist() == [[1.5, 0.0], [1.0, 1.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "float32 forward: 4 rows, D 64, F 64, E 8",
        "float32 step: 4 rows, D 64, F 64, E 8",
    ]
