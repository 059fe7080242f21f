import io
import time

import psutil
import pytest
from PIL import Image

from moe_lab.view.panels.timing import TimingPanel


@pytest.fixture(scope="module")
def panel():
    panel = TimingPanel(rounds=2)
    panel.tokens.value, panel.dim.value, panel.hidden_dim.value = 16, 32, 16
    yield panel
    panel.close()


def test_controls_change_the_numbers_before_anything_runs(panel):
    assert "T 16 D 32 F 16 E 36 K 3 · float32 · forward · synthetic routing, skew 0.5" in panel.text()
    before = panel.load_image.value
    panel.skew.value = 2.0
    assert panel.load_image.value != before
    assert "skew 2" in panel.numbers.value
    panel.skew.value = 0.5
    panel.top_k.value, panel.experts.value = 8, 4
    assert "top_k=8 must be an integer from 1 to 4" in panel.error
    panel.run()
    assert panel.error
    assert not panel.run_button.disabled, "nothing runs"
    panel.top_k.value = 2
    assert panel.error == ""
    with pytest.raises(ValueError, match="nothing was timed yet"):
        panel.results()
    with Image.open(io.BytesIO(panel.png())) as page, Image.open(io.BytesIO(panel.load_image.value)) as part:
        assert page.size == (2 * part.width, part.height)


@pytest.mark.slow
def test_a_run_times_backends_in_its_own_process_and_cancel_kills_it(panel):
    empty = panel.bar_image.value
    panel.run_button.click()
    panel.wait()
    assert panel.progress.value == 2
    assert panel.state.value.startswith("2 rounds on ")
    assert "not run: batched: backend=" in panel.state.value
    assert panel.results().text().splitlines()[1].split()[0] == "dense"
    assert panel.csv().splitlines()[1].startswith("dense,")
    shown = panel.bar_image.value
    assert shown != empty
    panel.skew.value = 1.0
    assert panel.bar_image.value != shown, "times of another shape are not shown"
    panel.tokens.value, panel.dim.value, panel.hidden_dim.value = 8192, 1024, 4096  # minutes
    (pid,) = panel.pool.pids
    panel.run()
    assert panel.run_button.disabled
    time.sleep(0.3)
    panel.cancel_button.click()
    panel.wait(20)
    assert panel.state.value == "cancelled"
    assert not panel.run_button.disabled
    assert panel.cancel_button.disabled
    assert not psutil.pid_exists(pid)


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds=0 must be"):
        TimingPanel(rounds=0)
