import pytest
import torch

from moe_lab.jobs.paths import PATHS, path_arms, preset_layer
from moe_lab.study.breakdown import breakdown
from moe_lab.view.speeds import BreakdownTable, PhaseNames, breakdown_bars, phases_of


@pytest.fixture(scope="module")
def layer():
    return preset_layer("10B_2B/32", 16)


def test_every_path_gives_the_layers_output_and_its_phases(layer):
    arms = path_arms(*layer)
    assert list(arms) == list(PATHS)
    found = breakdown(arms, torch.device("cpu"), rounds=1)
    assert phases_of(found) == ["router", "plan", "pack", "experts", "shared experts", "combine", "rest"]
    lines = BreakdownTable(found).text().splitlines()
    assert lines[0].split() == ["loop", "padded", "grouped", "buffered", "loop,", "scatter_add"]
    assert [line.split("  ")[0] for line in lines[1:]] == ["all", *phases_of(found)]
    names = PhaseNames(found).text().splitlines()
    assert names[0] == "loop: router, plan, pack, experts, shared experts, combine"
    assert names[3] == "buffered: router, experts, shared experts"
    drawn = breakdown_bars(found, "tiny")
    assert [tick.get_text() for tick in drawn.axes[0].get_yticklabels()] == list(PATHS)


def test_a_path_that_computes_something_else_is_refused(layer):
    with pytest.raises(ValueError, match=r"path 'wrong' differs by .* of the output"):
        path_arms(*layer, {"wrong": {"score_before_experts": True}})
