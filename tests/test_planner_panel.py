import io

import pytest
import torch
from PIL import Image

from moe_lab import data
from moe_lab.models.lm import SMALL
from moe_lab.study.planner import Layout, beforehand, plan
from moe_lab.view.panels.planning import MODELS, TRACE, PlannerPanel


@pytest.fixture(scope="module")
def panel():
    return PlannerPanel()


def test_the_panel_shows_the_plan_of_its_controls(panel):
    panel.model.value, panel.ranks.value, panel.ep.value, panel.sequences.value = next(iter(MODELS)), 8, 4, 4
    panel.load.value, panel.limit.value = TRACE, 2.0
    expected = beforehand(SMALL, Layout(8, 4), 4096, data.open("balanced"))
    assert panel.shown == expected
    assert panel.text().startswith(
        "shipped, 11.5 M · 8 ranks, EP 4 · 4 x 1,024 tokens a rank · p99.9 of the trace · float32 · fits in 2 GiB\n"
    )
    assert f"peak         {expected.peak / 2**30:.3f}" in panel.text()
    assert panel.csv().splitlines()[-1] == f"peak,{expected.peak},float32,False"
    before = bytes(panel.layout_image.value), bytes(panel.token_image.value)
    panel.limit.value = 0.25
    assert "does not fit in 0.25 GiB" in panel.text()
    assert (bytes(panel.layout_image.value), bytes(panel.token_image.value)) != before
    with Image.open(io.BytesIO(panel.png())) as page:
        assert page.size[1] == Image.open(io.BytesIO(before[0])).size[1]


def test_the_mean_needs_less_than_the_tail(panel):
    panel.ep.value, panel.load.value = 8, TRACE
    most = panel.shown
    panel.load.value = "mean"
    assert panel.shown.receive < most.receive
    assert panel.shown.parameters == most.parameters


def test_sequences_may_be_cut_over_ranks(panel):
    panel.model.value, panel.ranks.value, panel.ep.value, panel.sequences.value = next(iter(MODELS)), 8, 4, 4
    panel.load.value, panel.sp.value = "mean", 2
    assert panel.shown == plan(SMALL, Layout(8, 4, 2), 4 * 512)
    assert panel.text().startswith("shipped, 11.5 M · 8 ranks, EP 4, sp 2 · 4 x 512 tokens a rank")
    panel.sp.value = 4
    assert "sp=4 must divide the 2 ranks beside ep=4" in panel.error
    panel.sp.value = 1


def test_precision_and_recompute_are_steered(panel):
    panel.model.value, panel.ranks.value, panel.ep.value, panel.sequences.value = next(iter(MODELS)), 8, 4, 4
    panel.load.value, panel.limit.value = TRACE, 2.0
    panel.precision.value, panel.recompute.value = "bfloat16", True
    options = {"dtype": torch.bfloat16, "checkpointing": True}
    assert panel.shown == beforehand(SMALL, Layout(8, 4), 4096, data.open("balanced"), **options)
    assert "p99.9 of the trace · bfloat16 · recompute · fits in 2 GiB" in panel.text()
    assert panel.csv().splitlines()[0] == "term,bytes,precision,recompute"
    assert panel.csv().splitlines()[-1] == f"peak,{panel.shown.peak},bfloat16,True"
    panel.load.value = "mean"
    assert panel.shown == plan(SMALL, Layout(8, 4), 4096, **options)
    panel.ranks.value, panel.ep.value = 1, 1
    assert "one process is planned in float32 without checkpointing" in panel.error
    panel.precision.value, panel.recompute.value = "float32", False
    assert panel.error == ""


def test_what_cannot_be_is_said_in_the_panel(panel):
    panel.load.value = "mean"
    panel.ranks.value, panel.ep.value = 4, 8
    assert "ep=8 must divide the 4 ranks" in panel.error
    panel.ep.value = 4
    assert panel.error == ""
    panel.model.value, panel.load.value = "24 layers of 10B_2B", TRACE
    assert "the trace has 6 layers of 32 experts, top 4, the model 24 of 36, top 3" in panel.error
    panel.load.value, panel.ranks.value, panel.ep.value = "1.5 x mean", 64, 8
    assert "num_experts=36 must divide over ep=8" in panel.error
    panel.ep.value = 4
    assert panel.error == ""
    assert "24 layers of 10B_2B · 64 ranks, EP 4" in panel.text()
