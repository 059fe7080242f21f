"""The padding panel without a browser: set a control, look at numbers, picture and messages."""

import csv
import io

import pytest
from PIL import Image

from moe_lab.view.panels.latency import measure_plans, report
from moe_lab.view.panels.padding import DIRICHLET, ZIPF, PaddingPanel, compute


@pytest.fixture(scope="module")
def panel():
    return PaddingPanel()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("policy", "none", "EP 8, 256 tokens a rank, none"),
        ("policy", "multiple", "multiple 128"),
        ("multiple", 16, "multiple 16"),
        ("policy", "adaptive", "adaptive 0.10"),
        ("threshold", 1.5, "adaptive 1.50"),
        ("policy", "capacity", "capacity 1.25"),
        ("ep", 16, "EP 16"),
        ("tokens", 128, "128 tokens a rank"),
        ("layer", 2, "layer 2"),
        ("source", ZIPF, "Zipf (synthetic), skew 0.8"),
        ("skew", 1.2, "skew 1.2"),
        ("source", DIRICHLET, "Dirichlet (synthetic), skew 1.2"),
    ],
)
def test_every_control_changes_what_is_said_and_shown(panel, name, value, says):
    getattr(panel, name).value = value
    assert panel.error == ""
    assert says in panel.text()
    found, _ = compute(panel.params())
    assert f"{100 * found.exchange_overhead:.1f}" in panel.text()
    assert f"{found.straggler_factor:.2f}" in panel.numbers.value


def test_the_picture_follows_the_policy(panel):
    panel.policy.value = "none"
    before = panel.png()
    panel.policy.value = "padded_bmm"
    assert panel.png() != before


def test_what_cannot_be_is_said_over_the_last_good_picture():
    panel = PaddingPanel()
    panel.ep.value = 32
    before = panel.png()
    panel.tokens.value = 1024
    assert "this trace has 10,240" in panel.error
    assert panel.png() == before
    panel.tokens.value = 64
    assert panel.error == ""


def test_csv_holds_every_rank_and_says_what_it_is_of(panel):
    panel.policy.value = "equal_split"
    rows = list(csv.DictReader(io.StringIO(panel.csv())))
    found, worst = compute(panel.params())
    by_name = {}
    for row in rows:
        assert row["of"] == panel.words
        by_name.setdefault(row["quantity"], []).append(float(row["value"]))
    assert by_name["exchange_zeros"] == list(found.exchange_zeros_R)
    assert by_name["sent"] == list(found.sent_R)
    assert len(by_name["dropped"]) == panel.ep.value
    assert by_name["worst_overhead_of_even_splits"] == [pytest.approx(worst, rel=1e-5)]


def test_buttons_offer_what_is_shown(panel):
    numbers, picture = panel.buttons.children
    numbers.click()
    assert 'download="padding.csv"' in panel.shelf.value
    picture.click()
    assert 'download="padding.png"' in panel.shelf.value
    with Image.open(io.BytesIO(panel.png())) as drawn:
        assert drawn.format == "PNG"


def test_the_latency_report_moves_every_slider():
    panel = PaddingPanel()
    times = measure_plans(panel)
    assert {name: len(moves) for name, moves in times.items()} == {"EP": 9, "tokens": 11, "layer": 11}
    assert [line.split()[0] for line in report(times).splitlines()] == ["slider", "EP", "tokens", "layer"]


@pytest.mark.parametrize(("policy", "matter"), [("none", []), ("adaptive", ["threshold"]), ("multiple", ["multiple"])])
def test_only_what_matters_to_the_policy_can_be_moved(policy, matter):
    panel = PaddingPanel()
    panel.policy.value = policy
    assert [name for name in ("threshold", "multiple") if not getattr(panel, name).disabled] == matter
