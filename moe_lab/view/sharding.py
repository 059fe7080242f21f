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
from moe_lab.view.theme import CHANCE, INK, MUTED, SERIES, WIDTH, WITHIN

ONE = "1 process"
HELD = ("parameters", "gradients", "optimizer", "activations", "gathered")  # receive is below a line's width
MIB = 2**20


def differences(result: dict[str, Any]) -> Figure:
    """Curves of one seed, beside how far each seed's are from one process: the largest of all steps, relative.

    Grey: the largest difference between runs of one process with 1 to 4 threads, from the least to the most of a seed.
    """
    seeds = list(result["by_seed"].values())
    names = list(seeds[0]["layouts"])
    threads = [seed["threads"] for seed in seeds]
    with theme.style():
        drawn = theme.figure(WIDTH, 300)
        left = inset(drawn, left=44, right=WIDTH - 330, bottom=40, top=44)
        right = inset(drawn, left=420, right=20, bottom=40, top=44)
        heading(left, "Bits per byte", "one process and all layouts, seed 0: lines on each other")
        between = "grey: between 1 to 4 threads of it" if max(threads) else "1 to 4 threads of it: the same bits"
        heading(right, "Difference from one process, a dot a seed", f"largest of all steps' losses · {between}")
        steps = np.arange(1, len(result["bits_per_byte"][ONE]) + 1)
        for colour, name in zip((INK, *SERIES), (ONE, *names), strict=False):
            left.plot(steps, result["bits_per_byte"][name], color=colour, lw=1)
        right.axhspan(min(threads), max(threads), color=CHANCE, lw=0, zorder=0)
        for at, (colour, name) in enumerate(zip(SERIES, names, strict=False)):
            right.plot(
                [at] * len(seeds), [seed["layouts"][name] for seed in seeds], ls="", marker="o", ms=4, color=colour
            )
        left.set(ylim=(0, None), ylabel="bits per byte", xlim=(1, len(steps)))
        left.set_xlabel("step", color=MUTED)
        most = max(largest for seed in seeds for largest in seed["layouts"].values())
        right.set(yscale="log", ylabel="relative difference", xlim=(-0.5, len(names) - 0.5), ylim=(1e-8, 10 * most))
        right.set_xticks(range(len(names)), names, fontsize=7)
        right.grid(axis="y")
    return drawn


def memory(result: dict[str, Any]) -> Figure:
    """What the fullest rank holds by layout: planned beforehand and counted, term on term; below, time of a step.

    A line is the most at once.
    """
    layouts = result["bytes"]
    with theme.style():
        drawn = theme.figure(WIDTH, 420)
        axes = inset(drawn, left=44, right=130, bottom=170, top=44)
        heading(
            axes,
            "Memory of the fullest rank",
            "left bar planned beforehand from another text's routing, right bar counted in the fullest of "
            f"{result['steps_watched']:,} steps · line: the most at once",
        )
        for side, shift in (("beforehand", -0.2), ("counted", 0.2)):
            bottom = np.zeros(len(layouts))
            for colour, term in zip(SERIES, HELD, strict=False):
                size = np.array([found[side][term] for found in layouts.values()]) / MIB
                label = term if side == "beforehand" else None
                alpha = 0.55 if side == "beforehand" else 1.0
                place = np.arange(len(layouts)) + shift
                axes.bar(place, size, 0.36, bottom=bottom, color=colour, alpha=alpha, label=label)
                bottom += size
            for at, found in enumerate(layouts.values()):
                axes.plot([at + shift - 0.18, at + shift + 0.18], [found[side]["peak"] / MIB] * 2, color=INK, lw=1.5)
        axes.set_xticks(range(len(layouts)), list(layouts))
        axes.set_ylabel("MiB")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        below = inset(drawn, left=44, right=130, bottom=28, top=316)
        heading(below, "Time of a step", f"ms · median · gloo ranks that share {result['cores']} cores")
        ms = [1e3 * result["seconds_a_step"][name] for name in layouts]
        bars = below.bar(range(len(ms)), ms, 0.76, color=WITHIN)
        below.bar_label(bars, [f"{one:.0f}" for one in ms], padding=1, color=INK)
        below.set_xticks(range(len(layouts)), list(layouts))
        below.set(xlim=axes.get_xlim(), ylim=(0, 1.15 * max(ms)))
    return drawn


def layout_table(result: dict[str, Any]) -> str:
    """By layout: the most at once, counted in the fullest step, what plans differ from it, and time of a step."""
    rows = [["layout", "counted MiB", "planned, rows that came", "planned beforehand", "ms a step"]]
    for name, found in result["bytes"].items():
        counted = found["counted"]["peak"]
        off = [f"{found[plan]['peak'] / counted - 1:+.1%}" for plan in ("planned", "beforehand")]
        rows.append([name, f"{counted / MIB:.2f}", *off, f"{result['seconds_a_step'][name] * 1e3:.0f}"])
    return table(rows)


def term_table(found: dict[str, dict[str, int]]) -> str:
    """One layout's bytes, term by term: counted, planned at the rows that came, and beforehand."""
    rows = [["bytes", "counted", "planned, rows that came", "planned beforehand", "off by"]]
    for term, counted in found["counted"].items():
        planned, beforehand = found["planned"][term], found["beforehand"][term]
        off = f"{beforehand / counted - 1:+.1%}" if counted else ""
        rows.append([term, f"{counted:,}", f"{planned:,}", f"{beforehand:,}", off])
    return table(rows)


def difference_table(result: dict[str, Any]) -> str:
    """Largest relative difference of a logged loss by seed: between numbers of threads, then from one process."""
    seeds = result["by_seed"]
    rows = [["", *(f"seed {seed}" for seed in seeds)]]
    rows.append(["one process, 1 to 4 threads", *(f"{seed['threads']:.1e}" for seed in seeds.values())])
    for name in next(iter(seeds.values()))["layouts"]:
        rows.append([name, *(f"{seed['layouts'][name]:.1e}" for seed in seeds.values())])
    for name in next(iter(seeds.values()))["in_order"]:
        rows.append([f"{name}, same order of sums", *(f"{seed['in_order'][name]:g}" for seed in seeds.values())])
    return table(rows)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text())
    for name, drawn in (("curves", differences(found)), ("memory", memory(found))):
        Path(f"{sys.argv[2]}_{name}.png").write_bytes(theme.png(drawn))
    print(difference_table(found), layout_table(found), sep="\n\n")
