import threading

import pytest

from moe_lab.parallel.ranks import RankError
from moe_lab.view.panels import base
from moe_lab.view.panels.base import Panel, RunPanel

TRACEBACK = "[rank 0] closed\n[rank 1] KeyError: 3\n\nrank 1 failed first:\nTraceback\nKeyError: 3"


class Waiting(RunPanel):
    """Its run goes on until it is let go, then ends as told."""

    def __init__(self, error=None, refusal=None):
        super().__init__([], [])
        self.offer_run("go", "wait", "stop waiting", 3)
        self.error_of_run, self.refusal, self.let_go, self.started = error, refusal, threading.Event(), 0

    def _job(self):
        if self.refusal:
            raise ValueError(self.refusal)
        return self._wait

    def _wait(self):
        self.started += 1
        self.progress.value = 1
        self.tell("1 < 3")
        assert self.let_go.wait(20)
        if self.stopped:
            raise RankError("cancelled between two steps")
        if self.error_of_run:
            raise RankError(self.error_of_run)
        self.tell("done")


def buttons(panel):
    return [button.description for button in panel.buttons.children[:2] if not button.disabled]


def test_a_run_leaves_the_panel_free_and_is_the_only_one():
    panel = Waiting()
    assert (buttons(panel), panel.running, panel.progress.max) == (["go"], False, 3)
    panel.run_button.click()
    panel.run()
    assert (buttons(panel), panel.running) == (["cancel"], True)
    panel.let_go.set()
    panel.wait()
    assert (buttons(panel), panel.running, panel.started) == (["go"], False, 1)
    assert (panel.state.value, panel.progress.value) == ("done", 1)


def test_a_cancelled_run_says_so_and_the_next_one_is_not_cancelled():
    panel = Waiting()
    panel.run()
    panel.cancel_button.click()
    panel.let_go.set()
    panel.wait()
    assert (panel.state.value, buttons(panel)) == ("cancelled", ["go"])
    panel.run()
    panel.close()
    assert panel.started == 2
    assert not panel.running


def test_text_is_escaped():
    panel = Waiting()
    panel.tell('1 < 3, "quoted"')
    assert panel.state.value == '1 &lt; 3, "quoted"'


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TRACEBACK, "rank 1 failed first: KeyError: 3"),
        ("[ranks 0, 1] no answer within 5 s; killed", "[ranks 0, 1] no answer within 5 s; killed"),
    ],
)
def test_a_failed_run_names_its_cause_in_one_line(error, said):
    panel = Waiting(error)
    panel.let_go.set()
    panel.run()
    panel.wait()
    assert (panel.state.value, buttons(panel)) == (said, ["go"])


def test_what_cannot_run_is_said_and_starts_nothing():
    panel = Waiting(refusal="batch=3 must be even")
    panel.run()
    assert (panel.error, panel.started, buttons(panel)) == ("batch=3 must be even", 0, ["go"])


def test_what_takes_longer_than_a_moment_is_said_and_greys_the_old_pictures(monkeypatch):
    class Slow(Panel):
        seen = threading.Event()

        def _update(self):
            assert self.seen.wait(20)
            self.greyed = "moe-stale" in self.numbers._dom_classes

    monkeypatch.setattr(base, "MOMENT", 0.0)
    panel = Slow([], [])
    panel.clock.observe(lambda change: "computing" in change.new and panel.seen.set(), "value")
    panel.refresh()
    assert panel.greyed
    assert panel.clock.value.endswith(" ms</span>")
    assert "moe-stale" not in panel.numbers._dom_classes
