"""Panels of routing that is not shipped: a trace, or the path of one."""

import numpy as np
import pytest

from moe_lab.view.panels import BalancePanel, ExchangePanel, PaddingPanel
from moe_lab.view.panels.padding import ZIPF
from synthetic import synthetic_trace

PANELS = (ExchangePanel, PaddingPanel, BalancePanel)


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(tokens=2500, layers=2, experts=16)


@pytest.mark.parametrize("kind", PANELS)
def test_a_trace_of_ones_own_is_steered_like_a_shipped_one(kind, trace, tmp_path):
    trace.save(tmp_path / "mine.safetensors")
    panel, kept = kind(trace), kind(tmp_path / "mine.safetensors")
    assert panel.error == kept.error == ""
    assert (panel.layer.min, panel.layer.max) == (0, 1)
    assert kept.text().startswith("mine.safetensors")
    assert panel.text().removeprefix(trace.info.model) == kept.text().removeprefix("mine.safetensors")
    before = panel.text()
    panel.layer.value = 1 - panel.layer.value
    assert panel.error == ""
    assert panel.text() != before


@pytest.mark.parametrize("kind", [PaddingPanel, BalancePanel])
def test_the_shipped_ones_are_still_offered(kind, trace):
    panel = kind(trace)
    panel.source.value = "unbalanced"
    assert panel.error == ""
    assert panel.layer.max == 5
    assert panel.text().startswith("unbalanced")
    panel.source.value = trace.info.model
    assert panel.error == ""
    assert panel.layer.max == 1


def test_synthetic_routing_may_come_first():
    panel = PaddingPanel(ZIPF)
    assert panel.error == ""
    assert "skew 0.8" in panel.text()


@pytest.mark.parametrize("kind", PANELS)
def test_what_is_no_trace_is_refused_by_name(kind, tmp_path):
    (tmp_path / "counts.csv").write_text("expert,count\n0,5\n")
    np.save(tmp_path / "ids.npy", np.zeros((3, 1, 2), int))
    for source, message in (
        ("nowhere", "'nowhere' does not exist"),
        (tmp_path / "counts.csv", "counts.csv holds counts, not tokens"),
        (tmp_path / "ids.npy", "num_experts is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(source)
