"""The panel of training: a small model on real ranks of this machine, watched through its log while it runs."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from moe_lab.jobs.layouts import LAYOUTS, SHRUNK, on_rank
from moe_lab.jobs.train import TrainConfig
from moe_lab.parallel.ranks import RankPool
from moe_lab.study.planner import Layout
from moe_lab.view import theme
from moe_lab.view.panels.base import RunPanel, control
from moe_lab.view.text import table
from moe_lab.view.training import StepsPicture, read_log

POLL = 0.15  # seconds between two looks at the log
TIMEOUT = 600.0
COEFFS = (0.0, 1e-3, 1e-2, 3e-2)
Log = list[dict[str, Any]]


class TrainingPanel(RunPanel):
    """Train on ranks of a layout and watch loss and load; cancel kills the ranks, whatever they do.

    The ranks write one log; the panel reads it while they do, and knows nothing else of them. `function` is what
    ranks run (`moe_lab.jobs.layouts.on_rank`).
    """

    def __init__(self, *, steps: int = 100, function: Callable[..., Any] = on_rank) -> None:
        self._function = function
        layouts = {"1 rank": Layout(1), **LAYOUTS}
        self.layout = control(widgets.Dropdown, "layout", "190px", options=layouts, value=LAYOUTS["EP 2"])
        self.steps = control(widgets.IntSlider, "steps", "230px", min=10, max=500, step=10, value=steps)
        rates = [3e-4, 1e-3, 3e-3, 1e-2]
        self.rate = control(widgets.SelectionSlider, "learning rate", "240px", options=rates, value=3e-3)
        self.accumulate = control(widgets.SelectionSlider, "micro-batches", "220px", options=[1, 2], value=1)
        self.coeff = control(widgets.SelectionSlider, "step of the bias", "270px", options=COEFFS, value=COEFFS[1])
        self.loss_image, self.load_image = (widgets.Image(format="png") for _ in range(2))
        controls = [self.layout, self.steps, self.rate, self.accumulate, self.coeff]
        super().__init__([controls], [self.loss_image, self.load_image])
        self.offer_run("run", "train on real ranks of this machine", "kill the ranks, whatever they do", steps)
        self.log: Log = []
        self.before: Log = []
        self.watch(controls, self.refresh)
        self.refresh()

    def config(self) -> TrainConfig:
        """What the controls say. `ValueError` for what cannot be."""
        moe = SHRUNK.model.moe.replace(load_balance_coeff=self.coeff.value or None)
        steps = self.steps.value
        config = dataclasses.replace(
            SHRUNK,
            model=dataclasses.replace(SHRUNK.model, moe=moe),
            steps=steps,
            save_every=steps,
            learning_rate=self.rate.value,
            accumulate=self.accumulate.value,
        )
        layout = self.layout.value
        shares = layout.ranks // layout.sp * config.accumulate
        if config.batch % shares:
            raise ValueError(f"batch={config.batch} must divide over {shares} shares of ranks and micro-batches")
        return config

    def _update(self) -> None:
        config = self.config()
        if not self.running:
            self._frame(config.steps)
        self._show()
        self.numbers.value = escape(self.text())

    def _frame(self, steps: int) -> None:
        """Axes for so many steps."""
        self.progress.max = steps
        self._loss = StepsPicture("Bits per byte", [""], steps=steps, ylabel="bits per byte", ylim=(0, 9))
        layers = [f"layer {n}" for n in range(SHRUNK.model.num_layers)]
        most = SHRUNK.model.moe.num_experts / SHRUNK.model.moe.top_k  # one expert in every token's choice
        self._load = StepsPicture("Imbalance by layer", layers, steps=steps, ylabel="max / mean", ylim=(1, most))

    def _show(self) -> None:
        """The log so far, over that of the run before."""
        note = f"step {self.log[-1]['step']}" if self.log else "press run"
        note += " · grey: the run before" if self.before else ""
        loss, loss_before = (
            [[(line["step"], line["bits_per_byte"]) for line in log]] for log in (self.log, self.before)
        )
        load, load_before = (
            [[(line["step"], line["max_over_mean"][n]) for line in log] for n in range(SHRUNK.model.num_layers)]
            for log in (self.log, self.before)
        )
        self.loss_image.value = self._loss.update(loss, loss_before, note).png()
        self.load_image.value = self._load.update(load, load_before, note).png()

    # running

    def _job(self) -> Callable[[], None]:
        config = self.config()
        self.log, self.before = [], self.log
        self._frame(config.steps)
        return partial(self._train, config, self.layout.value)

    def _train(self, config: TrainConfig, layout: Layout) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            RankPool(layout.ranks, backend="gloo", timeout=TIMEOUT) as self.pool,
            ThreadPoolExecutor(1) as caller,
        ):
            run = caller.submit(self.pool.run, self._function, config, Path(folder), layout)
            self._follow(self.pool, run, Path(folder) / "log.jsonl", config.steps)

    def _follow(self, pool: RankPool, run: Future[Any], path: Path, steps: int) -> None:
        """Show what the log says until the run has ended; raises what it raised."""
        ended = False
        while not ended:
            threading.Event().wait(POLL)
            if self.stopped:
                pool.cancel()  # again, for ranks that were only starting when it was pressed
            ended = run.done()
            found = read_log(path) if path.exists() else []
            if len(found) == len(self.log):
                continue
            with self._lock:
                self.log = found
                self._show()
            last = found[-1]
            self.progress.value = last["step"]
            self.tell(
                f"step {last['step']} of {steps} · bits per byte {last['bits_per_byte']:.2f} · "
                f"worst max/mean {max(last['max_over_mean']):.2f} · {last['seconds']:.1f} s"
            )
        run.result()

    # forms

    def text(self) -> str:
        """What would run: the controls in words."""
        config, layout = self.config(), self.layout.value
        moe = config.model.moe
        coeff = moe.load_balance_coeff
        balance = f"bias moves by {coeff:g} a step" if coeff else "no balancing"
        return (
            f"{self.layout.label} · {layout.ranks} gloo rank{'s' * (layout.ranks > 1)} · {config.steps} steps of "
            f"{config.batch} x {config.model.max_length} bytes in {config.accumulate} micro-batch"
            f"{'es' * (config.accumulate > 1)} · {config.model.num_layers} layers, D {moe.dim}, F {moe.hidden_dim}, "
            f"E {moe.num_experts}, K {moe.top_k} · {balance}"
        )

    def results(self, points: int = 5) -> str:
        """The run shown, at some of its steps."""
        rows = [["step", "bits per byte", "worst max/mean"]]
        for line in self.log[:: max(1, len(self.log) // points)]:
            rows.append([str(line["step"]), f"{line['bits_per_byte']:.2f}", f"{max(line['max_over_mean']):.2f}"])
        return table(rows)

    def png(self) -> bytes:
        """The pictures side by side."""
        return theme.side_by_side([bytes(self.loss_image.value), bytes(self.load_image.value)])
