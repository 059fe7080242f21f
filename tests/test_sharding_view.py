import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_lab.jobs.layouts import IN_ORDER, STEPS
from moe_lab.view import theme
from moe_lab.view.sharding import ONE, difference_table, differences, layout_table, memory, term_table


@pytest.fixture(scope="module")
def result():
    return json.loads((Path(__file__).parent.parent / "docs/results/layouts.json").read_text())


def test_differences_are_those_of_the_file(result):
    drawn = differences(result)
    curves, off = drawn.axes
    names = list(result["by_seed"]["0"]["layouts"])
    assert [label.get_text() for label in off.get_xticklabels()] == names
    for line, name in zip(curves.lines, (ONE, *names), strict=True):
        np.testing.assert_allclose(line.get_ydata(), result["bits_per_byte"][name])
    for line, name in zip(off.lines, names, strict=True):
        assert list(line.get_ydata()) == [seed["layouts"][name] for seed in result["by_seed"].values()]
    assert Image.open(io.BytesIO(theme.png(drawn))).size == (theme.SCALE * theme.WIDTH, theme.SCALE * 300)


def test_ranks_in_a_fixed_order_have_one_process_s_bits_in_the_file(result):
    seeds = result["by_seed"].values()
    for seed in seeds:
        assert seed["in_order"] == dict.fromkeys(IN_ORDER, 0.0)
    table = difference_table(result).splitlines()
    assert table[1].startswith("one process, 1 to 4 threads")
    assert table[-1].split() == [*f"{[*IN_ORDER][-1]}, same order of sums".split(), *["0"] * len(seeds)]
    assert set(result["seconds_in_fixed_order"]) == set(IN_ORDER)


def test_bars_stand_on_each_other_up_to_what_is_held(result):
    axes, times = memory(result).axes
    names = list(result["bytes"])
    found = result["bytes"][names[1]]["counted"]
    held = sum(found[term] for term in ("parameters", "gradients", "optimizer", "activations", "gathered"))
    tops = [bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() == pytest.approx(1 + 0.2 - 0.18)]
    assert max(tops) == pytest.approx(held / 2**20)
    assert axes.lines[len(names) + 1].get_ydata()[0] == pytest.approx(found["peak"] / 2**20)
    assert [bar.get_height() for bar in times.patches] == [1e3 * result["seconds_a_step"][name] for name in names]
    assert [label.get_text() for label in times.get_xticklabels()] == names


def test_plans_in_the_file_are_what_was_counted(result):
    """Every term at the rows that came, the peak within a tenth; beforehand every term within a tenth."""
    assert result["steps_watched"] == STEPS
    for found in result["bytes"].values():
        for term, counted in found["counted"].items():
            assert found["planned"][term] == pytest.approx(counted, rel=0.1 if term == "peak" else 1e-9), term
            assert found["beforehand"][term] == pytest.approx(counted, rel=0.1), term
    assert len(layout_table(result).splitlines()) == 1 + len(result["bytes"])
    assert term_table(result["bytes"]["EP 2"]).splitlines()[0].split() == (
        ["bytes", "counted", "planned,", "rows", "that", "came", "planned", "beforehand", "off", "by"]
    )
