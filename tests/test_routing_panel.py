"""The routing panel, without a browser: set a control's value, look at numbers, pictures and messages."""

import base64
import csv
import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from moe_lab.config import PRESETS, MoEConfig, RouterConfig
from moe_lab.study.choice import Choice, rerouted
from moe_lab.study.load import imbalance
from moe_lab.study.windows import ratio
from moe_lab.view import theme
from moe_lab.view.panels import RoutingPanel
from moe_lab.view.panels.choosing import group_options, preset_choice
from moe_lab.view.panels.latency import measure, random_trace, report
from moe_lab.view.panels.routing_compute import compute
from synthetic import synthetic_trace


@pytest.fixture(scope="module")
def trace():
    return synthetic_trace(tokens=3000, experts=32)


@pytest.fixture
def panel(trace):
    texts = {document.name: b"x = 1\n" * 30 for document in trace.info.documents}
    return RoutingPanel(trace, texts={name: text[:125] for name, text in texts.items()})


def pictures(panel):
    return panel.load_image.value, panel.heat_image.value, panel.tokens.value


def press(panel, name):
    next(button for button in panel.buttons.children if button.description == name).click()


def numbers(panel):
    return re.sub(r"<[^>]+>", "", panel.numbers.value)


# moving


def test_it_opens_on_the_recorded_choice_with_its_numbers(panel, trace):
    assert panel.preset.value == "as recorded"
    assert (panel.layer.value, panel.domain.value, panel.window.value, panel.top_k.value) == (0, "all domains", 3000, 4)
    load = imbalance(trace).load(0)
    assert f"max/mean {load.metrics.max_over_mean:.2f}" in numbers(panel)
    assert "3,000 tokens x 1 window, all domains, layer 0, one rank" in numbers(panel)
    assert "as recorded" in numbers(panel)
    for png in pictures(panel)[:2]:
        assert Image.open(io.BytesIO(png)).size == tuple(theme.SCALE * side for side in theme.PICTURE)


@pytest.mark.parametrize(
    ("control", "value", "moved"),
    [
        ("layer", 2, (True, True, True)),
        ("domain", "prose", (True, True, True)),
        ("window", 200, (True, True, False)),
        ("top_k", 2, (True, True, True)),
        ("score", "softmax", (True, True, True)),
        ("groups", (8, 4), (True, True, True)),
        ("bias", False, (True, True, True)),
        ("forced", "random", (True, True, True)),
    ],
)
def test_every_control_changes_numbers_at_once_and_only_the_pictures_it_concerns(panel, control, value, moved):
    before, text = pictures(panel), panel.text()
    getattr(panel, control).value = value
    assert panel.error == ""
    assert panel.text() != text
    assert tuple(a != b for a, b in zip(before, pictures(panel), strict=True)) == moved
    assert re.fullmatch(r"<span[^>]*>\d+ ms</span>", panel.clock.value)
    assert "ms" not in panel.text()


def test_numbers_are_those_of_the_library(panel, trace):
    panel.layer.value, panel.window.value, panel.domain.value = 1, 200, "prose"
    load = imbalance(trace, 200).load(1, "prose")
    assert f"max/mean {load.metrics.max_over_mean:.2f}" in numbers(panel)
    assert re.search(rf"^max/mean +{load.metrics.max_over_mean:.2f} ", panel.text(), re.MULTILINE)
    assert re.search(rf"^CV +{load.metrics.cv:.3f} ", panel.text(), re.MULTILINE)
    assert f"{load.null.low.max_over_mean:.2f} - {load.null.high.max_over_mean:.2f}" in panel.text()


def test_another_choice_is_routed_by_the_library_and_called_open_loop(panel, trace):
    panel.layer.value, panel.top_k.value = 2, 1
    counts_E = trace.reroute(2, trace.info.router, 1).counts_E
    np.testing.assert_allclose(ratio(panel.shown.load), counts_E / counts_E.double().mean())
    for said in (numbers(panel), panel.text()):
        assert "open-loop (recorded: K 4, sigmoid, bias on)" in said
    assert panel.preset.value == "custom"
    panel.top_k.value = 4
    assert panel.preset.value == "as recorded"
    assert "open-loop" not in panel.text()


def test_the_window_slider_and_its_box_move_together(panel):
    panel.window_slider.value = 2
    assert panel.window.value == 64
    assert "64 tokens x 46 windows" in numbers(panel)
    panel.window.value = 500
    assert panel.window_slider.value == 5  # 512 is the nearest
    assert "500 tokens x 6 windows" in numbers(panel)
    panel.window_slider.value = panel.window_slider.max
    assert "3,000 tokens x 1 window" in numbers(panel)


def test_axes_stay_put_while_a_slider_moves(panel):
    first = np.asarray(Image.open(io.BytesIO(panel.load_image.value)))
    panel.top_k.value, panel.layer.value = 1, 2
    second = np.asarray(Image.open(io.BytesIO(panel.load_image.value)))
    below = int(0.88 * first.shape[0])
    np.testing.assert_array_equal(first[below:], second[below:])
    assert (first != second).any()


def test_compute_is_pure_and_cached(panel):
    params = panel.params()
    assert compute(params) is compute(params)
    panel.layer.value = 1
    assert compute(params).load.layer == 0


def test_nothing_is_printed(panel, capfd):
    panel.top_k.value = 3
    panel.layer.value = 1
    panel.groups.value = (16, 1)
    press(panel, "PNG")
    assert capfd.readouterr() == ("", "")


# comparing


def test_a_pinned_baseline_is_outlined_and_compared_with(panel):
    panel.layer.value = 1
    before, was = panel.load_image.value, panel.shown.load.metrics
    press(panel, "pin baseline")
    assert panel.load_image.value != before
    panel.top_k.value = 1
    now = panel.shown.load.metrics
    percent = f"{100 * (now.max_over_mean / was.max_over_mean - 1):+.0f} %".replace("-", "−")
    assert f"baseline {was.max_over_mean:.2f} {percent}" in numbers(panel)
    assert re.search(rf"^max/mean.* {was.max_over_mean:.2f} +{re.escape(percent)}$", panel.text(), re.MULTILINE)
    assert "baseline: synthetic, 3,000 tokens x 1 window, all domains, layer 1" in panel.text()
    press(panel, "unpin")
    assert "baseline" not in panel.text() + numbers(panel)


def test_presets_are_fitted_to_the_experts_there_are(trace):
    choice = preset_choice("deepseek_v3", trace)
    assert (choice.top_k, choice.router.score_func, choice.use_bias) == (8, "sigmoid", True)
    assert (choice.router.num_expert_groups, choice.router.num_limited_groups) == (8, 4)
    small = preset_choice("deepseek_v3", synthetic_trace(tokens=100, experts=4))
    assert (small.top_k, small.router.num_expert_groups, small.router.num_limited_groups) == (4, 2, 1)
    assert not preset_choice("mixtral_8x7b", trace).use_bias


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_chosen(panel, trace, name):
    panel.preset.value = name
    assert panel.error == ""
    assert panel.preset.value == name
    assert panel.shown.load.null == imbalance(rerouted(trace, preset_choice(name, trace))).load(0).null
    panel.preset.value = "as recorded"
    assert panel.choosing.value() is None


def test_groups_are_those_that_divide_the_experts():
    assert group_options(8) == {
        "off": "off", "2 keep 1": (2, 1), "4 keep 2": (4, 2), "4 keep 1": (4, 1)
    }  # fmt: skip
    assert group_options(3) == {"off": "off"}
    for groups, kept in list(group_options(64).values())[1:]:
        RouterConfig(num_expert_groups=groups, num_limited_groups=kept).check(64, 2)


# errors inside


def test_a_choice_that_cannot_be_is_said_inside_and_the_panel_goes_on(panel):
    before = pictures(panel)
    panel.groups.value = (16, 1)
    assert "top_k=4 cannot be chosen from num_limited_groups=1 groups of 2 experts: at most 2" in panel.message.value
    assert repr(panel).startswith("⚠ top_k=4")
    assert pictures(panel) == before
    assert "moe-stale" in panel._pictures._dom_classes
    press(panel, "copy as MoEConfig")
    assert panel.shelf.value == "", "no config that would be refused"
    panel.top_k.value = 2
    assert (panel.error, panel.message.value) == ("", "")
    assert "moe-stale" not in panel._pictures._dom_classes
    assert pictures(panel) != before


def test_a_layer_between_recorded_ones_is_refused_by_name(trace):
    sparse = synthetic_trace(tokens=200, layers=2)
    panel = RoutingPanel(replace(sparse, info=replace(sparse.info, layers=(3, 7))))
    assert (panel.layer.min, panel.layer.max, panel.layer.value) == (3, 7, 3)
    panel.layer.value = 5
    assert panel.error == "layer=5 was not recorded: choose one of 3, 7"
    panel.layer.value = 7
    assert panel.error == ""


def test_ones_own_file_is_opened_by_path(panel, tmp_path):
    synthetic_trace(tokens=400, experts=8, layers=2, top_k=2).save(tmp_path / "mine.safetensors")
    panel.file.value = str(tmp_path / "mine.safetensors")
    assert panel.error == ""
    assert panel.source.value == "mine.safetensors"
    assert (panel.top_k.value, panel.layer.max, panel.window.max) == (2, 1, 400)
    assert "mine.safetensors, 400 tokens x 1 window" in panel.text()
    panel.source.value = "synthetic"
    assert "synthetic, 3,000 tokens x 1 window" in panel.text()


def test_a_file_that_is_no_trace_is_said_inside(panel, tmp_path):
    (tmp_path / "poem.txt").write_text("no trace <b>at all</b>")
    for name, said in (("missing.safetensors", "does not exist"), ("poem.txt", "is no routing that is known")):
        panel.file.value = str(tmp_path / name)
        assert f"{name}' {said}" in panel.error
        assert panel.source.value == "synthetic"
    panel.layer.value = 1
    assert panel.error == ""


def test_a_message_is_text_not_html(panel):
    panel.fail(ValueError("<script>"))
    assert "<script>" not in panel.message.value
    assert "&lt;script&gt;" in panel.message.value


def test_without_logits_only_what_was_recorded_can_be_shown():
    panel = RoutingPanel(synthetic_trace(tokens=400, logits=False))
    assert all(control.disabled for control in panel.choosing.widgets)
    panel.top_k.value = 2
    assert panel.error == "this trace has no logits_LTE, only what was chosen: reroute() needs logits"
    assert panel.preset.options == ("as recorded", "custom")


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (5, 2, 2), (20, 3, 1)])
def test_the_smallest_traces_can_be_shown(tokens, experts, top_k):
    panel = RoutingPanel(synthetic_trace(tokens=tokens, experts=experts, top_k=top_k, layers=1))
    assert panel.error == ""
    assert f"{tokens} token{'s' * (tokens > 1)} x 1 window" in panel.text()
    panel.window_slider.value = panel.window_slider.min
    panel.top_k.value = 1
    assert panel.error == ""


def test_a_trace_without_tokens_is_refused(trace):
    empty = trace.select(layer=0)._tokens(slice(0, 0))
    with pytest.raises(ValueError, match="mine holds no tokens"):
        RoutingPanel("mine", sources={"mine": empty})


def test_without_a_text_the_panel_says_so():
    panel = RoutingPanel(synthetic_trace(tokens=400))
    assert "No text to show" in panel.tokens.value
    assert "first experts of the text" not in panel.text()
    assert Image.open(io.BytesIO(panel.png())).width == 2 * theme.SCALE * theme.PICTURE[0]


def test_a_bias_of_zeros_is_no_bias(trace):
    panel = RoutingPanel(replace(trace, expert_bias_LE=torch.zeros_like(trace.expert_bias_LE)))
    assert panel.bias.disabled
    assert "K 4, sigmoid, bias off, as recorded" in panel.text()


def test_unknown_sources_are_refused_by_name(trace):
    with pytest.raises(ValueError, match=r"source='nowhere' is not known: choose one of .*'mine'"):
        RoutingPanel("nowhere", sources={"mine": trace})
    assert RoutingPanel("mine", sources={"mine": trace}).source.value == "mine"


# taking it away


def test_csv_has_exactly_the_numbers_shown(panel):
    panel.layer.value = 1
    panel.pin()
    panel.top_k.value = 2
    rows = list(csv.DictReader(io.StringIO(panel.csv())))
    metrics = {row["quantity"]: row for row in rows if row["quantity"] in ("max_over_mean", "cv")}
    assert f"max/mean {float(metrics['max_over_mean']['value']):.2f}" in numbers(panel)
    assert f"baseline {float(metrics['max_over_mean']['baseline']):.2f}" in numbers(panel)
    assert f"CV {float(metrics['cv']['value']):.3f}" in numbers(panel)
    loads = [row for row in rows if row["quantity"] == "load_over_mean"]
    assert len(loads) == 3 * 32
    shown = [float(row["value"]) for row in loads if row["layer"] == "1"]
    np.testing.assert_allclose(shown, ratio(panel.shown.load), rtol=1e-5)
    firsts = [int(row["expert"]) for row in rows if row["quantity"] == "first_expert"]
    assert firsts == panel.shown.tinted.expert_ids_TK[:, 0].tolist()
    assert all("layer 1, one rank, K 2, sigmoid, bias on, open-loop" in row["of"] for row in loads)


@pytest.mark.parametrize(("name", "kind"), [("CSV", "text/csv"), ("PNG", "image/png")])
def test_downloads_are_links_that_hold_the_bytes(panel, name, kind):
    press(panel, name)
    link = re.fullmatch(rf'<a download="routing\.\w+" href="data:{kind};base64,([^"]+)">.*', panel.shelf.value)
    content = base64.b64decode(link.group(1))
    assert content == (panel.csv().encode() if name == "CSV" else panel.png())
    panel.layer.value = 1
    assert panel.shelf.value == ""


def test_the_png_holds_all_pictures_and_the_line(panel):
    page = Image.open(io.BytesIO(panel.png()))
    width, height = (theme.SCALE * side for side in theme.PICTURE)
    assert page.width == 3 * width
    assert page.height > height
    assert (page.crop((0, 0, width, height)).tobytes()) == Image.open(
        io.BytesIO(panel.load_image.value)
    ).convert("RGB").tobytes()  # fmt: skip


@pytest.mark.parametrize("preset", ["as recorded", "deepseek_v3", "llama4_scout"])
def test_the_copied_config_is_python_that_makes_the_choice(panel, preset):
    panel.preset.value = preset
    press(panel, "copy as MoEConfig")
    assert "&#x27;sigmoid&#x27;" in panel.shelf.value
    made = {}
    exec(panel.config(), made)
    config = made["config"]
    assert isinstance(config, MoEConfig)
    choice = panel.params().choice or Choice.recorded(panel.trace)
    assert (config.num_experts, config.top_k, config.router) == (32, choice.top_k, choice.router)
    assert (config.load_balance_coeff is not None) == choice.use_bias


def test_displayed_it_is_its_widget_and_stored_its_text_and_picture(panel):
    data, metadata = panel._repr_mimebundle_()
    assert data["text/plain"] == panel.text()
    assert base64.b64decode(data["image/png"]) == panel.png()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.widget.model_id
    assert metadata["image/png"]["width"] == theme.PANEL_WIDTH


def test_text_is_the_same_for_an_equal_panel(panel, trace):
    other = RoutingPanel(trace)
    assert other.text() == panel.text().rpartition("\n")[0]  # without the last line, on its text


# sources


def test_shipped_sources_are_offered_and_opened_when_chosen(trace, monkeypatch):
    opened = []
    pages = synthetic_trace(tokens=500, experts=32, seed=1)
    shelf = SimpleNamespace(
        names=lambda: ("balanced", "balanced_pages"),
        open=lambda name: opened.append(name) or {"balanced": trace, "balanced_pages": pages}[name],
    )
    monkeypatch.setattr("moe_lab.view.panels.routing.data", shelf)
    monkeypatch.setattr("moe_lab.view.panels.routing_compute.data", shelf)
    panel = RoutingPanel(sources={"mine": synthetic_trace(tokens=300)})
    assert panel.source.options == ("mine", "balanced")
    assert (panel.source.value, opened) == ("balanced", ["balanced", "balanced_pages"])
    assert panel._pages is pages


def test_the_latency_report_measures_every_slider():
    panel = RoutingPanel(random_trace(tokens=256, layers=2, experts=8, top_k=2))
    times = measure(panel, moves=4)
    assert [len(values) for values in times.values()] == [4, 7, 4]
    assert report(times).splitlines()[0].split() == ["slider", "moves", "median", "ms", "p90", "ms"]
    assert panel.error == ""


def test_the_panel_of_the_shipped_trace_shows_its_pages():
    panel = RoutingPanel()
    assert "python.py" in panel.tokens.value
    assert "balanced, 4,096 tokens x 2 windows, all domains, layer 0, one rank" in panel.text()
