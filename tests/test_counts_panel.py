"""The panel of counts, without a browser, and the front door that picks a panel by what a path holds."""

import csv
import io
import re

import numpy as np
import pytest
import torch

from moe_lab.study.counts import CountsTrace
from moe_lab.study.history import count_imbalance
from moe_lab.study.metrics import null_band
from moe_lab.view.panels import CountsPanel, RoutingPanel, open_panel
from moe_lab.view.panels.counts import compute
from synthetic import synthetic_trace

# Two steps, layers 1 and 4, ranks 0 and 1, four experts; every rank counts 8 assignments in every step and layer.
COUNTS = CountsTrace(
    torch.tensor([[[[8, 0, 0, 0], [2, 2, 2, 2]], [[4, 4, 0, 0], [0, 0, 4, 4]]]] * 2).contiguous(),
    (10, 20),
    (1, 4),
    (0, 1),
)


@pytest.fixture
def panel():
    return CountsPanel(COUNTS, 2)


def numbers(panel):
    return re.sub(r"<[^>]+>", "", panel.numbers.value)


def test_it_opens_on_all_steps_and_ranks_with_its_numbers(panel):
    # Layer 1 counts 10, 2, 2, 2 a step over both ranks: 10 / 4.
    assert "max/mean 2.50" in numbers(panel)
    assert "8 tokens x 2 steps (all steps), layer 1, all ranks, K 2" in numbers(panel)
    null = null_band(8, 2, 4, windows=2)
    assert f"chance {null.low.max_over_mean:.2f}–{null.high.max_over_mean:.2f}" in numbers(panel)
    for image in (panel.load_image, panel.heat_image, panel.over_image):
        assert bytes(image.value).startswith(b"\x89PNG")


def test_step_rank_layer_and_k_choose_what_is_measured(panel):
    before = bytes(panel.over_image.value)
    panel.layer.value = 4
    assert "max/mean 1.00" in numbers(panel)
    assert bytes(panel.over_image.value) == before, "load over steps does not depend on the layer"
    panel.rank.value = 0
    assert "max/mean 2.00" in numbers(panel)
    assert "4 tokens x 2 steps (all steps), layer 4, rank 0" in numbers(panel)
    panel.step.value = 20
    assert "4 tokens x 1 step (step 20), layer 4, rank 0" in numbers(panel)
    panel.top_k.value = 1
    assert "8 tokens x 1 step" in numbers(panel)
    assert repr(panel).splitlines()[2].split()[:2] == ["max/mean", "2.00"]


def test_unequal_steps_have_no_chance_level_and_say_so():
    uneven = CountsTrace.from_tensor(torch.tensor([[4, 0], [2, 0]]), ("step", "expert"))
    panel = CountsPanel(uneven, 1)
    assert "steps or layers differ in assignments" in panel.error
    panel.step.value = 1
    assert panel.error == ""
    assert "2 tokens x 1 step (step 1)" in numbers(panel)


def test_csv_text_and_png_hold_what_is_shown(panel):
    rows = list(csv.DictReader(io.StringIO(panel.csv())))
    of_experts = [float(row["value"]) for row in rows if row["quantity"] == "load_over_mean" and row["layer"] == "1"]
    assert of_experts == [2.5, 0.5, 0.5, 0.5]
    assert [row["step"] for row in rows if row["step"]] == ["10", "10", "20", "20"]
    assert panel.png().startswith(b"\x89PNG")
    assert "busiest (load / mean): 0 (2.50)" in panel.text()


def test_computing_is_pure_and_the_numbers_are_those_of_count_imbalance():
    view = compute(COUNTS, 2, None, None)
    assert view is compute(COUNTS, 2, None, None)
    expected = [load for load in count_imbalance(COUNTS, 2).loads if load.domain == "all ranks"]
    assert [load.metrics for load in view.loads.loads] == [load.metrics for load in expected]


def test_the_front_door_picks_the_panel(tmp_path):
    assert isinstance(open_panel("balanced"), RoutingPanel)
    trace = synthetic_trace(tokens=300)
    trace.save(tmp_path / "trace.safetensors")
    torch.save(tuple(trace.logits_LTE.float()), tmp_path / "logits.pt")
    ids_TLK = trace.expert_ids_LTK.transpose(0, 1).long().numpy()
    np.save(tmp_path / "ids.npy", ids_TLK)
    (tmp_path / "counts.csv").write_text("step,expert,count\n0,0,5\n0,1,5\n")
    (tmp_path / "counts.json").write_text('{"dims": ["step", "expert"], "counts": [[5, 5]]}')
    for name, settings in [("trace.safetensors", {}), ("logits.pt", {"top_k": 4}), ("ids.npy", {"num_experts": 16})]:
        panel = open_panel(tmp_path / name, **settings)
        assert isinstance(panel, RoutingPanel)
        assert panel.trace.num_tokens == 300
    for name in ("counts.csv", "counts.json"):
        panel = open_panel(tmp_path / name, top_k=1)
        assert isinstance(panel, CountsPanel)
        assert f"{name}, 10 tokens x 1 step" in numbers(panel)
    assert isinstance(open_panel(COUNTS, top_k=2), CountsPanel)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("logits.pt", r"top_k=8\)\); as ids: its tensors hold floating-point numbers"),
        ("ids.npy", "num_experts is needed"),
        ("counts.csv", "top_k is needed: counts do not say"),
        ("none.safetensors", "does not exist"),
        ("text.pt", "As logits or ids: .* it is no file of torch.save, or holds more than tensors"),
        ("text.doc", "As logits or ids: .* its kind '.doc' is not known: must be .pt, .pth, .bin or .safetensors"),
        ("flat.npy", r"there are \(3, 1\) of torch.int64"),
        ("text.jsonl", "it has neither 'routed_experts' nor"),
        ("other.json", "is no routing that is known. As counts"),
    ],
)
def test_what_is_missing_or_unknown_is_named(tmp_path, name, message):
    torch.save(tuple(torch.randn(2, 5, 4)), tmp_path / "logits.pt")
    np.save(tmp_path / "ids.npy", np.zeros((3, 1, 1), int))
    np.save(tmp_path / "flat.npy", np.zeros((3, 1), int))
    (tmp_path / "counts.csv").write_text("expert,count\n0,5\n")
    for text in ("other.json", "text.pt", "text.doc", "text.jsonl"):
        (tmp_path / text).write_text('{"a": 1}')
    with pytest.raises(ValueError, match=message):
        open_panel(tmp_path / name, num_experts=8 if name.startswith("flat") else None)


def test_a_path_of_counts_in_the_routing_panel_leads_to_the_other(tmp_path):
    (tmp_path / "counts.csv").write_text("expert,count\n0,5\n")
    panel = RoutingPanel("balanced")
    panel.file.value = str(tmp_path / "counts.csv")
    assert "counts.csv holds counts, not tokens: open it with moe_lab.view.panels.open_panel" in panel.error
