"""The notebooks in a real JupyterLab, as a reader meets them."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from browser import harness

NOTEBOOKS = sorted(path.name for path in (harness.ROOT / "notebooks").glob("*.ipynb"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(harness.CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]

PANEL = """
import io, ipywidgets as widgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
k, picture, text = widgets.IntSlider(2, 1, 8, description="K"), widgets.Image(), widgets.HTML()
def draw(change=None):
    file, figure = io.BytesIO(), Figure(figsize=(2, 1))
    figure.subplots().bar(range(k.value), range(k.value))
    FigureCanvasAgg(figure).print_png(file)
    picture.value, text.value = file.getvalue(), f"top {k.value}"
k.observe(draw, "value"); draw()
widgets.VBox([k, picture, text])
"""


@pytest.fixture(scope="module")
def browser():
    with harness.start_browser() as browser:
        yield browser


@pytest.fixture
def page(browser):
    page = harness.new_page(browser)
    yield page
    page.close()


@pytest.fixture(scope="module")
def scratch_lab(tmp_path_factory):
    """A lab with a panel of three widgets, and with a widget view that was stored without its state."""
    folder = tmp_path_factory.mktemp("scratch")
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "gone", "version_major": 2, "version_minor": 0}}
    orphan = new_code_cell("1", execution_count=1, outputs=[new_output("display_data", view)])
    (folder / "source").mkdir()
    for name, cell in (("01_routing", new_code_cell(PANEL)), ("orphan", orphan)):
        kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        notebook = new_notebook(cells=[new_markdown_cell(f"# {name}"), cell], metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / "source" / f"{name}.ipynb")
    with harness.start_lab(folder / "lab dir", folder / "source") as address:
        yield address


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with harness.start_lab(tmp_path_factory.mktemp("lab") / "a lab") as address:
        yield address


def test_the_harness_sees_a_slider_change_picture_and_numbers(page, scratch_lab):
    harness.open_notebook(page, scratch_lab, "01_routing.ipynb")
    harness.run_all(page)
    assert harness.errors(page) == []
    before, after = harness.move_slider(page, "K")
    assert (before.text, after.text) == ("top 2", "top 3")
    before, after = harness.move_slider(page, key="ArrowLeft")
    assert (before.text, after.text) == ("top 3", "top 2")


def test_the_lab_asks_the_reader_nothing(page, scratch_lab):
    harness.open_notebook(page, scratch_lab, "01_routing.ipynb")
    page.wait_for_timeout(2000)  # JupyterLab asks about news a moment after it is ready
    assert page.locator(".Toastify__toast, .jp-Dialog").all_inner_texts() == []


def test_the_harness_sees_a_widget_without_state(page, scratch_lab):
    harness.open_notebook(page, scratch_lab, "orphan.ipynb")
    assert harness.errors(page) == ["Error displaying widget: model not found"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_opens_unrun_without_errors(page, lab, name):
    harness.open_notebook(page, lab, name)
    harness.screenshot(page, f"{name}-opened")
    assert harness.errors(page) == []


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name.startswith("01_")])
def test_a_panel_answers_its_sliders(page, lab, name):
    harness.open_notebook(page, lab, name)
    seconds = harness.run_all(page)
    assert harness.errors(page) == []
    harness.screenshot(page, f"{name}-run")
    before, after = harness.move_slider(page)
    harness.screenshot(page, f"{name}-moved")
    assert len(after.pictures) == len(before.pictures)
    assert after.text != before.text
    print(f"{name}: Run All took {seconds:.1f} s")


@pytest.fixture
def plans(page, lab, request):
    """The page of a notebook whose panel was run, and nothing else of it."""
    name, cell = request.param
    harness.open_notebook(page, lab, name)
    harness.run_cell(page, cell)
    assert harness.errors(page) == []
    yield page
    harness.screenshot(page, f"{name}-panel")


EXCHANGE = ("04_expert_parallel.ipynb", "panels.ExchangePanel(")
PADDING = ("05_padding.ipynb", "PaddingPanel(")


@pytest.mark.parametrize("plans", [EXCHANGE], indirect=True)
def test_the_exchange_panel_answers_and_runs_real_ranks(plans):
    before, after = harness.move_slider(plans, "EP", "ArrowLeft")
    assert "4 ranks" in before.text
    assert "2 ranks" in after.text
    assert [a != b for a, b in zip(before.pictures, after.pictures)] == [True, True]
    harness.press(plans, "run on real ranks")
    harness.wait_for_text(plans, "2 gloo ranks: rows as planned")
    harness.press(plans, "CSV")
    harness.wait_for_text(plans, "exchange.csv")
    assert plans.locator("a[download='exchange.csv']").get_attribute("href").startswith("data:text/csv;base64,")


@pytest.mark.parametrize("plans", [PADDING], indirect=True)
def test_the_padding_panel_answers_and_ends_where_a_fast_hand_left_it(plans):
    before, after = harness.move_slider(plans, "tokens per rank")
    assert "256 tokens a rank" in before.text
    assert "512 tokens a rank" in after.text
    harness.slider(plans, "EP").focus()
    for key in ["ArrowRight", "ArrowLeft"] * 5 + ["ArrowLeft"]:  # 8, 16, 8, ... and 4, without waiting between
        plans.keyboard.press(key)
    harness.wait_for_text(plans, "EP 4, 512 tokens a rank")
    plans.wait_for_timeout(500)
    assert "EP 4, 512 tokens a rank" in harness.panel(plans).text
    harness.press(plans, "PNG")
    harness.wait_for_text(plans, "padding.png")


@pytest.mark.parametrize("plans", [("10_balancing.ipynb", "BalancePanel(")], indirect=True)
def test_the_balance_panel_answers_and_takes_a_methods_usual_strength(plans):
    before, _ = harness.move_slider(plans, "layer")
    assert "unbalanced, bias 0.001, layer 3" in before.text
    harness.wait_for_text(plans, "unbalanced, bias 0.001, layer 4")  # set after both pictures
    after = harness.panel(plans)
    assert [a != b for a, b in zip(before.pictures, after.pictures)] == [True, True]
    harness.move_slider(plans, "coefficient")
    harness.wait_for_text(plans, "bias 0.002, layer 4")
    plans.locator(".jp-OutputArea .widget-dropdown select").nth(1).select_option("capacity, probs")
    harness.wait_for_text(plans, "capacity, probs 1.25, layer 4")
    harness.press(plans, "CSV")
    harness.wait_for_text(plans, "balance.csv")


@pytest.mark.parametrize("plans", [PADDING], indirect=True)
def test_a_narrow_window_cuts_nothing_off(plans):
    plans.set_viewport_size({"width": 700, "height": 900})
    plans.wait_for_timeout(500)  # the page lays itself out again
    inside = "n => n.getBoundingClientRect().right <= n.closest('.moe-panel').getBoundingClientRect().right + 1"
    for part in (".moe-pictures img", ".moe-numbers pre", "button"):
        assert all(plans.locator(f".moe-panel {part}").evaluate_all(f"all => all.map({inside})")), part
    names = plans.locator(".moe-panel button").evaluate_all("all => all.map(b => b.scrollWidth <= b.clientWidth)")
    assert all(names), "a button's name is cut"


@pytest.mark.parametrize("plans", [("08_timing.ipynb", "TimingPanel(")], indirect=True)
def test_the_timing_panel_runs_when_asked_and_stops_when_told(plans):
    before, after = harness.move_slider(plans, "skew")
    assert "skew 0.5" in before.text
    assert "skew 0.75" in after.text
    assert before.pictures[0] != after.pictures[0]
    harness.press(plans, "run")
    harness.wait_for_text(plans, "4 rounds on")
    assert harness.panel(plans).pictures[1] != after.pictures[1]
    harness.screenshot(plans, "08_timing-timed")
    harness.press(plans, "run")
    harness.press(plans, "cancel")
    harness.wait_for_text(plans, "cancelled")


@pytest.mark.parametrize("plans", [("09_training.ipynb", "TrainingPanel(")], indirect=True)
def test_a_run_is_watched_while_it_goes_on_and_ends_when_told(plans):
    before, after = harness.move_slider(plans, "steps")
    assert "60 steps" in before.text
    assert "70 steps" in after.text
    harness.press(plans, "run")
    harness.wait_for_text(plans, "of 70 · bits per byte")
    live = harness.panel(plans)
    assert [a != b for a, b in zip(live.pictures, after.pictures)] == [True, True]
    harness.screenshot(plans, "09_training-live")
    harness.wait_for_text(plans, "step 70 of 70")
    harness.press(plans, "run")
    harness.wait_for_text(plans, "starting ...")
    harness.press(plans, "cancel")
    harness.wait_for_text(plans, "cancelled")
