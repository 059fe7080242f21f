"""What panels share: controls, pictures, one line of numbers, errors that stay inside, runs that can be cancelled.

A panel is `compute(params) -> result` (pure, cached), pictures of the result, and this thin shell. It sets
`Image.value` and `HTML.value` only, so a change shows at once, nothing flickers, and it can be tested without a
browser by setting `panel.layer.value = 3`.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import ipywidgets as widgets

from moe_lab.parallel.ranks import RankError, RankPool
from moe_lab.view import theme

_CSS = """<style>
.moe-panel { max-width: 1500px; }
.moe-line, .moe-pictures { flex-flow: row wrap; align-items: center; gap: 0 8px; }
.moe-pictures { align-items: flex-start; margin: 2px 0; }
.moe-pictures > * { flex: 1 1 300px; min-width: 0; max-width: 490px; height: auto; }
.moe-text { max-height: 230px; overflow-y: auto; background: #fff; }
.moe-text .widget-html-content, .moe-numbers .widget-html-content { line-height: 1.5; }
.moe-numbers { font-variant-numeric: tabular-nums; }
.moe-numbers .widget-html-content { min-width: 0; max-width: 100%; }
.moe-numbers pre { white-space: pre; overflow-x: auto; }
.moe-line button { flex: none; }
.moe-stale { opacity: 0.35; }
.moe-panel textarea { width: 100%; font-family: monospace; font-size: 12px; }
</style>"""


MOMENT = 0.3  # seconds


def control(kind: type[widgets.Widget], label: str, width: str, **settings: Any) -> Any:
    """A control whose label takes only the room it needs."""
    return kind(description=label, style={"description_width": "initial"}, layout={"width": width}, **settings)


class Panel:
    """Lines of controls over a row of pictures over numbers and buttons.

    Subclasses make their controls and pictures, call `super().__init__`, then `watch` the controls. They
    implement `_update()`, which computes, draws and sets `numbers`, and raises `ValueError` for what cannot be.
    Displayed in a notebook, a panel is its widget; stored, it is a picture and its text.
    """

    def __init__(self, lines: Sequence[Sequence[widgets.Widget]], pictures: Sequence[widgets.Widget]) -> None:
        self._lock = threading.RLock()  # widget callbacks run on a thread of their own
        self._held = False
        self.error = ""
        self.numbers, self.clock, self.message, self.shelf = (widgets.HTML() for _ in range(4))
        self.buttons = widgets.HBox()
        self._pictures = widgets.HBox(list(pictures))
        self._pictures.add_class("moe-pictures")
        self.numbers.add_class("moe-numbers")
        rows = [widgets.HBox(list(line)) for line in lines]
        foot = widgets.HBox([self.buttons, self.clock])
        for row in (*rows, foot, self.buttons):
            row.add_class("moe-line")
        style = widgets.HTML(_CSS, layout={"display": "none"})
        parts = [style, *rows, self.message, self._pictures, self.numbers, foot, self.shelf]
        self.widget = widgets.VBox(parts)
        self.widget.add_class("moe-panel")

    def watch(self, controls: Sequence[widgets.Widget], act: Callable[[], None]) -> None:
        """Act whenever somebody changes one of these controls; not while the panel changes them itself."""
        for watched in controls:
            watched.observe(lambda change: self._act(act), names="value")

    def _act(self, act: Callable[[], None]) -> None:
        with self._lock:
            if not self._held:
                act()

    def button(self, name: str, tooltip: str, pressed: Callable[[], None]) -> widgets.Button:
        """A button below the pictures."""
        made = widgets.Button(description=name, tooltip=tooltip, layout={"width": "auto"})
        made.on_click(lambda button: pressed())
        self.buttons.children = (*self.buttons.children, made)
        return made

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Several controls change as one."""
        with self._lock:
            outer, self._held = self._held, True
            try:
                yield
            finally:
                self._held = outer

    @contextmanager
    def busy(self) -> Iterator[None]:
        """What takes longer than a moment is said, and the old pictures grey."""
        done, one_of_us = threading.Event(), threading.Lock()

        def wait() -> None:
            with one_of_us:
                if not done.is_set():
                    self._stale(True)
                    self.clock.value = f'<span style="color:{theme.MUTED}">computing ...</span>'

        timer = threading.Timer(MOMENT, wait)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with one_of_us:
                done.set()

    def refresh(self) -> None:
        """Show what the controls say now; what cannot be is said in the panel, over the last good pictures."""
        with self._lock:
            began = time.perf_counter()
            try:
                with self.busy():
                    self._update()
            except ValueError as error:
                self.fail(error)
                return
            self._say("")
            self.shelf.value = ""
            self.clock.value = f'<span style="color:{theme.MUTED}">{1e3 * (time.perf_counter() - began):.0f} ms</span>'

    def fail(self, error: Exception) -> None:
        """Say what went wrong; pictures and numbers on the panel are stale until it is put right."""
        self._say(str(error))
        self.clock.value = ""

    def _say(self, error: str) -> None:
        self.error = error
        self._stale(bool(error))
        self.message.value = (
            f'<div role="alert" style="color:{theme.MORE};line-height:1.4">⚠ {escape(error)}</div>' if error else ""
        )

    def _stale(self, stale: bool) -> None:
        for shown in (self._pictures, self.numbers):
            (shown.add_class if stale else shown.remove_class)("moe-stale")

    def offer(self, name: str, kind: str, content: bytes) -> None:
        """Put a download on the shelf below the buttons: the bytes are in the link, nothing is written."""
        link = f"data:{kind};base64,{base64.b64encode(content).decode()}"
        self.shelf.value = f'<a download="{escape(name)}" href="{link}">{escape(name)}</a> ({len(content):,} bytes)'

    def offer_files(self, name: str) -> None:
        """Two buttons that put the numbers and the pictures shown on the shelf."""
        self.button("CSV", "the numbers shown", lambda: self.offer(f"{name}.csv", "text/csv", self.csv().encode()))
        self.button("PNG", "the pictures shown", lambda: self.offer(f"{name}.png", "image/png", self.png()))

    def _update(self) -> None:
        raise NotImplementedError

    def text(self) -> str:
        """What the panel shows, as a rounded table."""
        raise NotImplementedError

    def csv(self) -> str:
        """What the panel shows, as numbers."""
        raise NotImplementedError

    def png(self) -> bytes:
        """What the panel shows, as one picture."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"⚠ {self.error}" if self.error else self.text()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        bundle = dict(self.widget._repr_mimebundle_() or {})
        bundle |= {"text/plain": repr(self), "image/png": base64.b64encode(self.png()).decode()}
        return bundle, {"image/png": {"width": theme.PANEL_WIDTH}}


class RunPanel(Panel):
    """A panel with a run of seconds or minutes, in a thread and on processes that cancel kills.

    Subclasses call `offer_run` and implement `_job()`, which reads the controls and returns what the thread shall do:
    work in `pool`, `tell` how it goes, set `progress`, and raise `RankError` once `stopped`.
    """

    pool: RankPool | None = None

    def offer_run(self, name: str, tooltip: str, cancel: str, steps: int) -> None:
        """Two buttons, the bar of a run of so many steps, and a line of text."""
        self._worker: threading.Thread | None = None
        self._stop = threading.Event()
        self.run_button = self.button(name, tooltip, self.run)
        self.cancel_button = self.button("cancel", cancel, self.cancel)
        self.cancel_button.disabled = True
        self.progress = widgets.IntProgress(min=0, max=steps, layout={"width": "160px"})
        self.state = widgets.HTML()
        self.buttons.children = (*self.buttons.children, self.progress, self.state)

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self._worker is not None

    @property
    def stopped(self) -> bool:
        """Whether the run under way was cancelled."""
        return self._stop.is_set()

    def tell(self, text: str) -> None:
        """Say how the run goes, beside its bar."""
        self.state.value = escape(text, quote=False)

    def run(self) -> None:
        """Run what the controls say, in a thread; `cancel` ends it. One run at a time."""
        if self.running:
            return
        try:
            job = self._job()
        except ValueError as error:
            self.fail(error)
            return
        self._stop.clear()
        self.run_button.disabled, self.cancel_button.disabled, self.progress.value = True, False, 0
        self.tell("starting ...")
        self._worker = threading.Thread(target=self._work, args=(job,), daemon=True)
        self._worker.start()

    def cancel(self) -> None:
        """End a run under way, whatever its processes do."""
        self._stop.set()
        if self.pool is not None:
            self.pool.cancel()

    def wait(self, seconds: float = 120.0) -> None:
        """Until the run under way has ended, for tests and scripts."""
        if (worker := self._worker) is not None:
            worker.join(seconds)

    def close(self) -> None:
        """End the run and its processes."""
        self.cancel()
        self.wait()
        if self.pool is not None:
            self.pool.close()

    def _job(self) -> Callable[[], None]:
        raise NotImplementedError

    def _work(self, job: Callable[[], None]) -> None:
        try:
            job()
        except RankError as error:
            self.tell("cancelled" if self.stopped else _reason(error))
        finally:
            self._worker = None
            self.run_button.disabled, self.cancel_button.disabled = False, True


def _reason(error: RankError) -> str:
    """In one line: the rank that failed first and the last line of its traceback, or what is said of all."""
    lines = str(error).splitlines()
    first = next((line for line in lines if "failed first" in line), None)
    return f"{first} {lines[-1]}" if first else lines[0]
