"""The balance panel without a browser: set a control, look at numbers, pictures and messages."""

import csv
import io

import pytest
from PIL import Image

from moe_lab.study.balancing import METHODS
from moe_lab.view.panels.balance import SHOWN, BalancePanel, compute


@pytest.fixture(scope="module")
def panel():
    return BalancePanel()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("coefficient", 0.01, "unbalanced, bias 0.01, layer 3"),
        ("layer", 2, "layer 2, EP 2, 512 tokens a rank, 24 steps, open-loop"),
        ("method", "switch, global", "switch, global 0.01"),
        ("method", "sinkhorn", "unbalanced, sinkhorn, layer 2"),
        ("source", "balanced", "balanced, sinkhorn"),
        ("method", "capacity, slot-major", "capacity, slot-major 1.25"),
        ("coefficient", 0.5, "capacity, slot-major 0.5"),
    ],
)
def test_every_control_changes_what_is_said_and_shown(panel, name, value, says):
    before = panel.png()
    getattr(panel, name).value = value
    assert panel.error == ""
    assert says in panel.text()
    assert says in panel.numbers.value
    assert panel.png() != before
    found = compute(panel.params())
    assert f"{found.outcome.load.metrics.max_over_mean:.2f}" in panel.text()
    assert f"{100 * found.outcome.rerouted:.1f}" in panel.text()


def test_a_method_comes_with_its_usual_strength(panel):
    for name in SHOWN:
        panel.method.value = name
        assert panel.error == ""
        usual = METHODS[name].coefficient
        assert panel.coefficient.disabled == (usual is None)
        assert panel.params().coefficient == usual
        assert usual is None or panel.coefficient.value == usual


def test_csv_holds_steps_and_experts_and_says_what_it_is_of(panel):
    panel.source.value, panel.method.value, panel.layer.value = "unbalanced", "bias", 3
    found, by_name = compute(panel.params()), {}
    for row in csv.DictReader(io.StringIO(panel.csv())):
        assert row["of"] == panel.words
        by_name.setdefault(row["quantity"], []).append((float(row["method"]), float(row["none"])))
    assert [made for made, _ in by_name["max_over_mean_at_step"]] == pytest.approx(found.steps_S.tolist(), rel=1e-5)
    assert [free for _, free in by_name["max_over_mean_at_step"]] == pytest.approx(found.free_S.tolist(), rel=1e-5)
    assert len(by_name["share_of_expert"]) == 32
    assert by_name["rerouted"] == [pytest.approx((found.outcome.rerouted, 0), rel=1e-5)]


def test_buttons_offer_what_is_shown(panel):
    numbers, picture = panel.buttons.children
    numbers.click()
    assert 'download="balance.csv"' in panel.shelf.value
    picture.click()
    assert 'download="balance.png"' in panel.shelf.value
    with Image.open(io.BytesIO(panel.png())) as drawn:
        assert drawn.size == (1760, 480)
