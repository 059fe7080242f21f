import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_lab.view import theme
from moe_lab.view.sharding import ONE, differences, layout_table, memory


@pytest.fixture(scope="module")
def result():
    return json.loads((Path(__file__).parent.parent / "docs/results/layouts.json").read_text())


def test_differences_are_those_of_the_file(result):
    drawn = differences(result)
    curves, off = drawn.axes
    names = [name for name in result["seconds_a_step"] if name != ONE]
    assert [line.get_label() for line in off.lines[:-1]] == names
    for curve, line, name in zip(curves.lines, off.lines[:-1], names, strict=True):
        np.testing.assert_allclose(curve.get_ydata(), result["bits_per_byte"][name])
        assert line.get_ydata().max() == pytest.approx(result["largest_relative_difference"][name] * 1e7)
    assert Image.open(io.BytesIO(theme.png(drawn))).size == (theme.SCALE * theme.WIDTH, theme.SCALE * 300)


def test_bars_stand_on_each_other_up_to_what_is_held(result):
    (axes,) = memory(result).axes
    names = list(result["bytes"])
    found = result["bytes"][names[1]]["counted"]
    held = sum(found[term] for term in ("parameters", "gradients", "optimizer", "activations", "gathered"))
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() == pytest.approx(1 + 0.2 - 0.18)]
    assert max(tops) == pytest.approx(held / 2**20)
    assert axes.lines[len(names) + 1].get_ydata()[0] == pytest.approx(found["peak"] / 2**20)


def test_the_plan_in_the_file_is_within_a_tenth(result):
    for found in result["bytes"].values():
        assert found["planned"]["peak"] == pytest.approx(found["counted"]["peak"], rel=0.1)
    assert len(layout_table(result).splitlines()) >= 1 + len(result["bytes"])
