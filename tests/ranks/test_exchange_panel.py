import io
import threading
import time

import psutil
import pytest
import rank_jobs
from PIL import Image

from moe_lab.jobs.exchange_runs import exchange_ids
from moe_lab.view.panels.exchange import RUNS, ExchangePanel
from moe_lab.view.panels.exchange_compute import BLOCKWISE, REPLICAS, SORTED


@pytest.fixture(scope="module")
def panel():
    panel = ExchangePanel("balanced")
    yield panel
    panel.close()


def test_sliders_change_plan_pictures_and_numbers(panel):
    assert "4 ranks x 256 tokens · layer 0 · all domains · shuffled documents" in panel.text()
    assert "4,096 rows sent, 0 zeros" in panel.text()
    before = panel.heat_image.value, panel.bar_image.value
    panel.layer.value = 3
    panel.ep.value = 2
    assert "2,048 rows sent" in panel.numbers.value
    assert panel.heat_image.value != before[0]
    assert panel.bar_image.value != before[1]
    panel.equal_split.value = "force"
    size = panel.shown.splits.size
    assert f"{4 * size - 2048:,} zeros" in panel.text()
    panel.equal_split.value = "off"
    assert panel.csv().splitlines()[0] == "to 0,to 1"
    assert [button.description for button in panel.buttons.children[:2]] == ["CSV", "PNG"]
    panel.buttons.children[0].click()
    assert 'download="exchange.csv"' in panel.shelf.value
    with Image.open(io.BytesIO(panel.png())) as page, Image.open(io.BytesIO(panel.heat_image.value)) as part:
        assert page.size == (2 * part.width, part.height)


def test_packing_by_domain_is_a_control_with_more_skew(panel):
    panel.ep.value, panel.tokens.value, panel.layer.value = 8, 256, 3
    shuffled = panel.shown.counts.splits_RR
    panel.packing.value = SORTED
    assert not shuffled.equal(panel.shown.counts.splits_RR)
    assert "(control)" in panel.text()
    panel.packing.value = panel.packing.options[0]


def test_replicas_of_busy_experts_even_out_the_ranks(panel):
    panel.ep.value, panel.tokens.value, panel.layer.value = 8, 256, 3
    alone = panel.shown.counts
    panel.placing.value = REPLICAS
    assert "replicas of busy ones" in panel.text()
    twice = panel.shown.counts
    assert twice.counts_RP.shape[1] == alone.counts_RP.shape[1] + 8
    assert twice.splits_RR.sum() == alone.splits_RR.sum()
    assert twice.splits_RR.sum(dim=0).max() < alone.splits_RR.sum(dim=0).max()
    panel.placing.value = BLOCKWISE


def test_too_few_tokens_are_said_in_the_panel(panel):
    panel.domain.value, panel.ep.value, panel.tokens.value = "prose", 32, 1024
    assert "tokens_per_rank=1024 on ep=32 ranks is 32,768 tokens: this trace has 2,048" in panel.error
    panel.domain.value, panel.ep.value, panel.tokens.value = "all domains", 4, 256
    assert panel.error == ""


def test_more_ranks_than_this_machine_should_hold_are_refused(panel):
    panel.ep.value, panel.tokens.value = 16, 32
    panel.run()
    assert panel.state.value == "real ranks: at most 8 here, EP is 16"


@pytest.mark.slow
def test_real_ranks_count_what_the_plan_says(panel):
    panel.ep.value, panel.tokens.value, panel.equal_split.value = 2, 64, "force"
    panel.placing.value = REPLICAS
    panel.run()
    panel.wait()
    assert "2 gloo ranks: rows as planned" in panel.state.value
    assert panel.progress.value == RUNS
    assert (panel.run_button.disabled, panel.cancel_button.disabled) == (False, True)


@pytest.mark.slow
def test_cancel_ends_a_hung_exchange_and_the_next_run_works():
    panel = ExchangePanel("balanced", function=rank_jobs.hang_in_exchange)
    panel.ep.value, panel.tokens.value = 2, 32
    panel.run()
    panel.run()  # one at a time
    while panel.pool is None or not panel.pool.pids:
        time.sleep(0.02)
    time.sleep(3.0)
    pids = list(panel.pool.pids)
    panel.cancel()
    panel.wait(20)
    assert panel.state.value == "cancelled"
    assert panel.pool.pids == []
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert alive == []
    assert panel.run_button.disabled is False
    panel._function = exchange_ids
    panel.run()
    panel.wait()
    assert "rows as planned" in panel.state.value
    panel.close()
    assert panel.pool.pids == []
    assert not [thread for thread in threading.enumerate() if "_work" in thread.name]
