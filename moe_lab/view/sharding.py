"""One run on several layouts, as `moe_lab.jobs.layouts` measured it: curves, memory beside its plan, time.

python -m moe_lab.view.sharding docs/results/layouts.json docs/images/layouts
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import table
from moe_lab.view.theme import CHANCE, INK, MUTED, SERIES, WIDTH

ONE = "1 process"
HELD = ("parameters", "gradients", "optimizer", "activations", "gathered")  # receive is below a line's width
MIB = 2**20


def differences(result: dict[str, Any]) -> Figure:
    """Each step's difference from one process, relative, beside how far one process is from itself.

    Grey: the largest difference between any two runs of one process with other threads or in other parts; dashed:
    with other threads alone.
    """
    curves = {name: np.array(curve) for name, curve in result["bits_per_byte"].items()}
    names = [name for name in result["seconds_a_step"] if name != ONE]
    with theme.style():
        drawn = theme.figure(WIDTH, 300)
        left = inset(drawn, left=44, right=WIDTH - 330, bottom=40, top=44)
        right = inset(drawn, left=400, right=120, bottom=40, top=44)
        heading(left, "Bits per byte", "all layouts: their lines lie on each other")
        heading(
            right,
            "Difference from one process",
            "grey: the most between two runs of one process · dashed: by threads alone",
        )
        steps = np.arange(1, len(curves[ONE]) + 1)
        for colour, name in zip(SERIES, names, strict=False):
            left.plot(steps, curves[name], color=colour, lw=1)
            right.plot(steps, np.abs(curves[name] / curves[ONE] - 1) * 1e7, color=colour, lw=1, label=name)
        threads = result["largest_relative_difference"]["1 process, 2 threads"]
        right.axhline(threads * 1e7, color=INK, lw=0.8, ls=(0, (3, 2)))
        right.axhspan(0, result["largest_between_controls"] * 1e7, color=CHANCE, lw=0, zorder=0)
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        left.set(ylim=(0, None), ylabel="bits per byte")
        right.set(ylim=(0, None), ylabel="relative difference, 1e-7")
        for axes in (left, right):
            axes.set(xlim=(1, len(steps)))
            axes.set_xlabel("step", color=MUTED)
    return drawn


def memory(result: dict[str, Any]) -> Figure:
    """What the fullest rank holds by layout: planned and counted, term on term; a line is the most at once."""
    layouts = result["bytes"]
    with theme.style():
        drawn = theme.figure(WIDTH, 300)
        axes = inset(drawn, left=44, right=130, bottom=40, top=44)
        heading(axes, "Memory of the fullest rank", "left bar planned, right bar counted · line: the most at once")
        for side, shift in (("planned", -0.2), ("counted", 0.2)):
            bottom = np.zeros(len(layouts))
            for colour, term in zip(SERIES, HELD, strict=False):
                size = np.array([found[side][term] for found in layouts.values()]) / MIB
                label = term if side == "planned" else None
                alpha = 0.55 if side == "planned" else 1.0
                place = np.arange(len(layouts)) + shift
                axes.bar(place, size, 0.36, bottom=bottom, color=colour, alpha=alpha, label=label)
                bottom += size
            for at, found in enumerate(layouts.values()):
                axes.plot([at + shift - 0.18, at + shift + 0.18], [found[side]["peak"] / MIB] * 2, color=INK, lw=1.5)
        axes.set_xticks(range(len(layouts)), list(layouts))
        axes.set_ylabel("MiB")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


def layout_table(result: dict[str, Any]) -> str:
    """By layout: peak planned and counted, their difference, seconds a step, difference from one process."""
    rows = [["layout", "planned MiB", "counted MiB", "plan off by", "ms a step", "most off one process"]]
    for name, found in result["bytes"].items():
        planned, counted = found["planned"]["peak"], found["counted"]["peak"]
        off = result["largest_relative_difference"][name]
        time = f"{result['seconds_a_step'][name] * 1e3:.0f}"
        ratio = f"{planned / counted - 1:+.1%}"
        rows.append([name, f"{planned / MIB:.2f}", f"{counted / MIB:.2f}", ratio, time, f"{off:.1e}"])
    return table(rows)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    for name, drawn in (("curves", differences(found)), ("memory", memory(found))):
        Path(f"{sys.argv[2]}_{name}.png").write_bytes(theme.png(drawn))
    print(layout_table(found))
