import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from PIL import Image

from moe_lab.jobs.layouts import LAYOUTS, on_rank
from moe_lab.view.panels.training import TrainingPanel
from moe_lab.view.training import StepsPicture, read_log


def stuck(config, out, layout):
    """Logs one step, then hangs in a collective that rank 1 never enters."""
    if dist.get_rank() == 0:
        line = {"step": 1, "bits_per_byte": 7.5, "max_over_mean": [1.5, 1.25], "seconds": 0.5}
        (Path(out) / "log.jsonl").write_text(json.dumps(line) + "\n" + '{"step": 2, "bits')
        dist.barrier()
    else:
        time.sleep(600)


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def panel():
    panel = TrainingPanel(steps=10)
    yield panel
    panel.close()


def test_controls_say_what_would_run(panel):
    assert panel.text().startswith("EP 2 · 2 gloo ranks · 10 steps of 8 x 32 bytes in 1 micro-batch · 2 layers, D 64")
    panel.coeff.value, panel.accumulate.value = 0.0, 2
    panel.layout.value = LAYOUTS["dp 2 x ep 2"]
    assert panel.text().endswith("in 2 micro-batches · 2 layers, D 64, F 16, E 8, K 4 · no balancing")
    assert panel.config().model.moe.load_balance_coeff is None
    with Image.open(io.BytesIO(panel.png())) as page, Image.open(io.BytesIO(panel.loss_image.value)) as part:
        assert page.size == (2 * part.width, part.height)


@pytest.mark.slow
def test_a_run_is_shown_while_it_goes_on(panel):
    panel.steps.value = 20
    empty = bytes(panel.loss_image.value)
    panel.run_button.click()
    assert panel.run_button.disabled
    until(lambda: panel.log)
    assert panel._worker is not None, "seen before it has ended"
    until(lambda: bytes(panel.loss_image.value) != empty)
    panel.wait()
    assert [line["step"] for line in panel.log] == list(range(1, 21))
    assert panel.progress.value == 20
    assert panel.state.value.startswith("step 20 of 20 · bits per byte ")
    assert panel.log[-1]["bits_per_byte"] < panel.log[0]["bits_per_byte"]
    assert panel.results().splitlines()[1].split()[0] == "1"
    assert panel.pool.pids == []
    first = panel.log
    panel.run()
    assert panel.before == first
    panel.wait()


@pytest.mark.slow
def test_cancel_ends_a_hung_run_and_leaves_no_process(panel):
    panel._function = stuck
    panel.run()
    panel.run()  # one at a time
    until(lambda: panel.log)
    assert panel.log == [{"step": 1, "bits_per_byte": 7.5, "max_over_mean": [1.5, 1.25], "seconds": 0.5}]
    until(lambda: "step 1 of 10 · bits per byte 7.50 · worst max/mean 1.50" in panel.state.value)
    pids = list(panel.pool.pids)
    panel.cancel_button.click()
    panel.wait(20)
    assert panel.state.value == "cancelled"
    assert (panel.run_button.disabled, panel.cancel_button.disabled) == (False, True)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]


@pytest.mark.slow
def test_cancel_is_heard_while_ranks_start(panel):
    panel.run()
    panel.cancel()
    panel.wait(20)
    assert (panel.state.value, panel.log) == ("cancelled", [])


@pytest.mark.slow
def test_a_killed_rank_is_named_and_ends_the_others(panel):
    panel._function, panel.steps.value = on_rank, 500
    panel.run()
    until(lambda: len(panel.log) > 1)
    pids = list(panel.pool.pids)
    os.kill(pids[1], signal.SIGKILL)
    panel.wait(10)
    assert panel.state.value == "rank 1 failed first: process died (exit code -9)"
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_lines_grow_over_those_of_the_run_before():
    picture = StepsPicture("Loss", ["a", "b"], steps=10, ylabel="loss", ylim=(0, 8))
    blank = picture.png()
    picture.update([[(1, 7.0), (2, 6.0)], [(1, 3.0)]], [[(1, 5.0)], []], "step 2")
    assert picture.png() != blank
    grey, _, first, second = picture.figure.axes[0].lines
    assert [list(line.get_ydata()) for line in (first, second, grey)] == [[7.0, 6.0], [3.0], [5.0]]
    assert picture.update([[], []], [[], []], "").png() == blank


def test_a_line_being_written_is_not_read(tmp_path):
    (tmp_path / "log").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path / "log") == [{"step": 1}, {"step": 2}]
