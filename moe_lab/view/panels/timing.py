"""The panel of timing: one's own shape, timed on this machine when asked to, in a process that cancel kills."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from typing import Any

import ipywidgets as widgets
import torch

from moe_lab.config import check_int
from moe_lab.jobs.own_shape import Shape, merged, one_round
from moe_lab.parallel.ranks import RankError, RankPool
from moe_lab.study.measurements import DIRECTIONS, Measurement
from moe_lab.view import theme
from moe_lab.view.panels.base import RunPanel, control
from moe_lab.view.pictures import heading, inset
from moe_lab.view.speeds import ArmsTable, arm_bars
from moe_lab.view.theme import LESS, MUTED

ROUNDS, TIMEOUT = 8, 120.0


class TimingPanel(RunPanel):
    """Set a layer's sizes; Run times every backend on synthetic routing, the dense bound beside them.

    `timeout`: seconds that one round may take.
    """

    pool: RankPool

    def __init__(self, *, rounds: int = ROUNDS, timeout: float = TIMEOUT) -> None:
        check_int("rounds", rounds, 1)
        self.rounds = rounds
        powers = [2**n for n in range(4, 14)]
        self.tokens = control(widgets.SelectionSlider, "T", "190px", options=powers, value=512)
        self.dim = control(widgets.SelectionSlider, "D", "170px", options=powers[1:8], value=256)
        self.hidden_dim = control(widgets.BoundedIntText, "F", "95px", min=16, max=8192, step=16, value=176)
        self.experts = control(widgets.BoundedIntText, "E", "90px", min=1, max=512, value=36)
        self.top_k = control(widgets.BoundedIntText, "K", "80px", min=1, max=16, value=3)
        self.skew = control(widgets.FloatSlider, "skew", "180px", min=0, max=2, step=0.25, value=0.5)
        self.dtype = control(widgets.Dropdown, "dtype", "140px", options=["float32", "bfloat16"])
        self.direction = control(widgets.Dropdown, "", "150px", options=DIRECTIONS)
        self.load_image, self.bar_image = (widgets.Image(format="png") for _ in range(2))
        controls = [self.tokens, self.dim, self.hidden_dim, self.experts, self.top_k, self.skew]
        controls += [self.dtype, self.direction]
        super().__init__([controls], [self.load_image, self.bar_image])
        run, cancel = "time every backend here, in a process of its own", "kill that process, whatever it computes"
        self.offer_run("run", run, cancel, rounds)
        self.pool = RankPool(1, backend="gloo", timeout=timeout, threads=torch.get_num_threads())
        self.rows: list[Measurement] = []
        self.missing: dict[str, str] = {}
        self._timed: Shape | None = None
        self.watch(controls, self.refresh)
        self.refresh()

    def shape(self) -> Shape:
        """What the controls say. `ValueError` for what cannot be."""
        return Shape(
            tokens=self.tokens.value,
            dim=self.dim.value,
            hidden_dim=self.hidden_dim.value,
            num_experts=self.experts.value,
            top_k=self.top_k.value,
            skew=self.skew.value,
            dtype=self.dtype.value,
            direction=self.direction.value,
        )

    def _update(self) -> None:
        shape = self.shape()
        self.counts = sorted(shape.counts(), reverse=True)
        self.load_image.value = theme.png(self._loads(shape))
        self._show(shape)

    def _show(self, shape: Shape) -> None:
        """Numbers, and the times if they are of this shape."""
        self.numbers.value = escape(self._line(shape))
        self.bar_image.value = theme.png(self._bars(shape))

    def _line(self, shape: Shape) -> str:
        rows, padded = shape.tokens * shape.top_k, shape.num_experts * self.counts[0]
        of = f"T {shape.tokens:,} D {shape.dim} F {shape.hidden_dim} E {shape.num_experts} K {shape.top_k}"
        return (
            f"{of} · {shape.dtype} · {shape.direction} · synthetic routing, skew {shape.skew:g} · "
            f"{shape.flops / 1e9:.2f} GFLOP forward · {shape.weight_bytes / 1e6:.1f} MB of weights · "
            f"{rows:,} rows, {padded / rows:.1f} times as many if padded"
        )

    def _loads(self, shape: Shape) -> Any:
        with theme.style():
            drawn = theme.figure(*theme.PICTURE)
            axes = inset(drawn, left=50, right=10, bottom=40, top=40)
            mean = shape.tokens * shape.top_k / shape.num_experts
            heading(axes, "Rows by expert, sorted", f"max/mean {self.counts[0] / mean:.1f}; line: the mean")
            axes.bar(range(len(self.counts)), self.counts, 1.0, color=LESS, lw=0)
            axes.axhline(mean, color=MUTED, lw=0.8)
            axes.set(xlabel="experts", ylabel="rows")
        return drawn

    def _bars(self, shape: Shape) -> Any:
        with theme.style():
            drawn = theme.figure(*theme.PICTURE)
            axes = inset(drawn, left=58, right=10, bottom=40, top=40)
            heading(axes, "Backends", "dashed: the dense bound" if self._timed == shape else "press run")
            if self._timed == shape:
                arm_bars(axes, self.rows)
            else:
                axes.set_axis_off()
        return drawn

    # timing

    def _job(self) -> Callable[[], None]:
        return partial(self._in_process, self.shape())

    def _in_process(self, shape: Shape) -> None:
        rounds: list[list[Measurement]] = []
        for turn in range(self.rounds):
            if self.stopped:
                raise RankError("cancelled between two rounds")
            ((rows, self.missing),) = self.pool.run(one_round, shape)
            rounds.append(rows)
            self.progress.value = turn + 1
            self.tell(f"round {turn + 1} of {self.rounds}")
        with self._lock:
            self.rows, self._timed = merged(rounds), shape
            if not self.error and self.shape() == shape:
                self._show(shape)
        left = "; ".join(f"{name}: {reason}" for name, reason in self.missing.items())
        self.tell(f"{self.rounds} rounds on {self.rows[0].device}" + (f" · not run: {left}" if left else ""))

    # forms

    def text(self) -> str:
        """The line of numbers; `results` has the times, which no two runs share."""
        return self._line(self.shape())

    def results(self) -> ArmsTable:
        """What was timed last. `ValueError` before the first run."""
        if self._timed is None:
            raise ValueError("nothing was timed yet: press run")
        return ArmsTable(self.rows)

    def csv(self) -> str:
        """Medians and intervals, ms."""
        lines = [f"{row.arm},{row.median:.6g},{row.low:.6g},{row.high:.6g}" for row in self.rows]
        return "\n".join(["arm,median,low,high", *lines]) + "\n"

    def png(self) -> bytes:
        """The pictures side by side."""
        return theme.side_by_side([bytes(self.load_image.value), bytes(self.bar_image.value)])
