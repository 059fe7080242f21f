"""A training run drawn from its log: how well it predicts, and how evenly it routes.

python -m moe_lab.view.training picture.png balanced=data/lm/log.jsonl "no balancing=data/twin/log.jsonl"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.theme import MUTED, SERIES, WIDTH, WITHIN

Curves = Sequence[Sequence[tuple[int, float]]]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl` that `moe-lab train` writes; one that is being written does not count yet."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class StepsPicture(theme.Live):
    """Curves that grow while a run goes on, one a label, over the same of the run before in grey."""

    def __init__(
        self, title: str, labels: Sequence[str], *, steps: int, ylabel: str, ylim: tuple[float, float]
    ) -> None:
        with theme.style():
            drawn = theme.figure(450, 260)
            axes = inset(drawn, left=44, right=12, bottom=40, top=44)
            self._note = heading(axes, title)
            axes.set(xlim=(0, steps), ylim=ylim, ylabel=ylabel)
            axes.set_xlabel("step", color=MUTED)
            axes.grid(axis="y")
            self._before = [axes.plot([], [], color=WITHIN, lw=1)[0] for _ in labels]
            self._lines = [
                axes.plot([], [], color=colour, lw=1.4, label=label)[0]
                for colour, label in zip(SERIES, labels, strict=False)
            ]
            if len(labels) > 1:
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels), borderaxespad=0)
        super().__init__(drawn, [*self._before, *self._lines, self._note])

    def update(self, curves: Curves, before: Curves, note: str) -> StepsPicture:
        """Show both runs so far: (step, value) points of every label."""
        for lines, points in ((self._lines, curves), (self._before, before)):
            for at, line in enumerate(lines):
                line.set_data(*zip(*points[at])) if at < len(points) and points[at] else line.set_data([], [])
        self._note.set_text(note)
        return self


def curves(runs: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """Bits per byte and the worst layer's max/mean against bytes read, one colour a run.

    Lines are training text, dots the held-out files that the run looks at; max/mean is of single steps.
    """
    with theme.style():
        drawn = theme.figure(WIDTH, 300)
        left = inset(drawn, left=44, right=WIDTH - 430, bottom=40, top=44)
        right = inset(drawn, left=490, right=100, bottom=40, top=44)
        heading(left, "Bits per byte", "lines: training text · dots: held-out text, some files")
        heading(right, "Imbalance of the worst layer", "max/mean of expert load, single steps")
        for colour, (name, log) in zip(SERIES, runs.items(), strict=False):
            read = np.array([line["bytes"] for line in log]) / 1e6
            left.plot(read, [line["bits_per_byte"] for line in log], color=colour, lw=1)
            heldout = [line for line in log if "heldout_bits_per_byte" in line]
            dots = [line["heldout_bits_per_byte"]["all"] for line in heldout]
            left.plot([line["bytes"] / 1e6 for line in heldout], dots, ls="", marker="o", ms=4, color=colour)
            worst = [max(line["max_over_mean"]) for line in log]
            right.plot(read, worst, color=colour, lw=1)
            place: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            right.annotate(name, (read[-1], worst[-1]), color=colour, **place)
        left.set(ylim=(0, 4), ylabel="bits per byte")
        right.set(ylim=(1, None), ylabel="max / mean")
        for axes in (left, right):
            axes.set_xlim(0)
            axes.set_xlabel("bytes read, millions", color=MUTED)
            axes.grid(axis="y")
    return drawn


if __name__ == "__main__":
    runs = dict(argument.split("=", 1) for argument in sys.argv[2:])
    Path(sys.argv[1]).write_bytes(theme.png(curves({name: read_log(Path(path)) for name, path in runs.items()})))
