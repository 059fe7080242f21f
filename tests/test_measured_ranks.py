"""What ranks measured, read from its file, printed and drawn."""

import dataclasses

import pytest

from moe_lab import data
from moe_lab.jobs.ranks_table import PHASES, load, save
from moe_lab.view.measured_ranks import RanksText, layout, phases


@pytest.fixture(scope="module")
def kept():
    return load(data.result("h100x4_ep2_10B_2B.json"))


def test_rows_are_read_as_they_were_kept(kept, tmp_path):
    save(tmp_path / "again.json", *kept)
    assert load(tmp_path / "again.json") == kept
    assert kept[1][0].exchange_ratio.low <= kept[1][0].exchange_ratio.median


def test_the_text_names_device_date_and_every_row(kept):
    environment, rows = kept
    lines = RanksText(environment, tuple(rows)).text().splitlines()
    assert lines[0] == "4 x NVIDIA H100 80GB HBM3 · torch 2.11.0+cu130 · 2026-11-26"
    assert lines[1] == "10B_2B · EP 2 x DP 2 · 16,384 tokens a rank · D 2,048, F 1,408, E 36, K 3"
    assert lines[3].split()[:4] == ["skewed", "unequal", "3.82", "13.02"]
    assert len(lines) == 2 + 1 + len(rows) + 1 + 1 + len(rows)
    assert lines[-1].split()[2:] == [f"{rows[-1].phases_ms[name]:.2f}" for name in PHASES]


def test_one_group_is_not_called_data_parallel(kept):
    row = kept[1][0]
    assert layout(row) == "EP 2 x DP 2"
    assert layout(dataclasses.replace(row, ep=4)) == "EP 4"


def test_bars_are_as_long_as_their_phases(kept):
    _, rows = kept
    (axes,) = phases(rows[:2], "by hand").axes
    lengths = [bar.get_width() for bar in axes.patches]
    assert lengths == pytest.approx([row.phases_ms[name] for row in rows[:2] for name in PHASES])
    marks = [line.get_xdata()[0] for line in axes.lines]
    assert marks == pytest.approx([row.forward_slowest_each for row in rows[:2]])
