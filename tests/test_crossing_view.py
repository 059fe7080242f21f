import io

from PIL import Image

from moe_lab import data
from moe_lab.study.crossover import Point, Winner, winners
from moe_lab.study.measurements import load
from moe_lab.view import theme
from moe_lab.view.crossing import CrossoverTable, WinsTable, crossover_map

SURE = Winner(Point(1024, 8, 2, 0.0), "grouped", 1.234, 1.0, "loop", 1.5, 1.4, 1.6)
UNSURE = Winner(Point(64, 32, 1, 1.0), "loop", 0.5, 0.62, "padded", 1.02, 0.98, 1.04)


def test_tables_say_who_wins_and_how_sure():
    head, first, second = CrossoverTable((SURE, UNSURE)).text().splitlines()
    assert head.split() == ["T", "E", "K", "skew", "fastest", "ms", "next", "takes", "95", "%", "sure"]
    assert first.split() == [
        "1,024",
        "8",
        "2",
        "0",
        "grouped",
        "1.23",
        "loop",
        "1.50",
        "x",
        "1.40",
        "-",
        "1.60",
        "100",
        "%",
    ]
    assert second.split()[-3:] == ["62", "%", "?"]
    assert [line.split() for line in WinsTable((SURE, UNSURE)).text().splitlines()[1:]] == [
        ["grouped", "1", "0"],
        ["loop", "1", "1"],
    ]


def test_the_map_has_a_square_a_point_and_hatches_what_is_not_sure():
    drawn = crossover_map([SURE, UNSURE], "tiny")
    assert len(drawn.axes) == 4, "two top-k times two skews"
    squares = [patch for axes in drawn.axes for patch in axes.patches]
    assert [bool(square.get_hatch()) for square in squares] == [True, False]
    assert [text.get_text() for axes in drawn.axes for text in axes.texts] == ["1.02", "1.50"]
    with Image.open(io.BytesIO(theme.png(drawn))) as image:
        assert image.width == 2 * theme.WIDTH


def test_the_stored_sweep_has_every_point_with_its_repeats():
    table = load(data.result("sweep_cpu.json"))
    found = winners(table)
    assert len(found) == len({won.point for won in found}) == 90
    assert len(winners(table, "forward+backward")) == 24
    assert all(len(row.repeats) == table.environment["rounds"] for row in table.rows)
    assert table.values("device") == [table.environment["device"]]
