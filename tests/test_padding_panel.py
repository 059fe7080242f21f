"""The padding panel without a browser: set a control, look at numbers, picture and messages."""

import pytest

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
