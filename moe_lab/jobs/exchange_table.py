"""What the benchmark of dispatch and combine measured: printed, kept, and read again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from moe_lab.study.timing import Timing, environment, ratio, summarise

PHASES = ("plan", "pack", "unpack", "unpermute", "combine")


class PairedTimes(NamedTuple):
    """Milliseconds of the slowest rank, and ratios within rounds, each the median with its bootstrap interval.

    `exchange`: the counts and both exchanges of the same rows alone; `bound`: that over theirs, which is what
    `ratio` would be if all else of ours took no time. `phases_ms`: medians over rounds, mean over ranks, of ours, in
    rounds of their own; "all" is the whole, what no phase takes is exchanging and waiting.
    """

    tokens: int
    dim: int
    ours: Timing
    theirs: Timing
    exchange: Timing
    ratio: Timing
    bound: Timing
    phases_ms: dict[str, float]


def paired(by_rank: list[dict[str, Any]], tokens: int, dim: int) -> PairedTimes:
    """From the seconds of every rank's rounds; a round is as slow as its slowest rank."""
    arms = ("ours", "theirs", "exchange")
    ours, theirs, exchange = ([1e3 * max(n) for n in zip(*(rank[arm] for rank in by_rank))] for arm in arms)
    stamped = {n: s for n in ("all", *PHASES) if all(s := [rank["phases"][n] for rank in by_rank])}
    phases_ms = {name: 1e3 * mean(map(median, seconds)) for name, seconds in stamped.items()}
    return PairedTimes(
        tokens=tokens,
        dim=dim,
        ours=summarise(ours),
        theirs=summarise(theirs),
        exchange=summarise(exchange),
        ratio=ratio(ours, theirs),
        bound=ratio(exchange, theirs),
        phases_ms=phases_ms,
    )


def describe(times: PairedTimes) -> str:
    """One line: medians in ms and the ratio, each with its 95 % interval."""
    cells = [f"T {times.tokens:>5}  D {times.dim:>4}"]
    shown = (("ours", times.ours, 1), ("torchtitan", times.theirs, 1), ("ratio", times.ratio, 3))
    for name, of, digits in shown:
        cells.append(f"{name} {of.median:.{digits}f} [{of.low:.{digits}f}, {of.high:.{digits}f}]")
    return "  ".join(cells)


def phase_table(found: Sequence[PairedTimes]) -> str:
    """What our time is made of, ms and share of the whole, and the ratio that would be left without our own part."""
    names = ("all", *PHASES)
    lines = [f"{'T':>6}{'D':>6}" + "".join(f"{name:>16}" for name in (*names, "exchange, wait")) + f"{'bound':>8}"]
    for times in (times for times in found if times.phases_ms):
        whole = times.phases_ms["all"]
        parts = [times.phases_ms[name] for name in names]
        parts.append(whole - sum(parts[1:]))
        cells = "".join(f"{f'{ms:.1f} ({100 * ms / whole:.0f} %)':>16}" for ms in parts)
        lines.append(f"{times.tokens:>6}{times.dim:>6}{cells}{times.bound.median:>8.2f}")
    return "\n".join(lines)


def cpu_model() -> str:
    """What the kernel calls this CPU, and how many cores it lends."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def save(path: Path, found: Sequence[PairedTimes], ranks: int, num_rounds: int, *, on_gpu: bool = False) -> None:
    """The measured times as JSON, with the machine, versions and date; `load` reads them."""
    facts = environment(torch.device("cuda" if on_gpu else "cpu")) | {"ranks": ranks, "rounds": num_rounds}
    if not on_gpu:
        facts["device"] = cpu_model()
    shapes = [times._asdict() for times in found]
    path.write_text(json.dumps({"environment": facts, "shapes": shapes}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[PairedTimes]]:
    """What `save` wrote: the environment, and the times of each shape."""
    kept = json.loads(path.read_text())
    rows = kept["shapes"]
    timings = ("ours", "theirs", "exchange", "ratio", "bound")
    return kept["environment"], [PairedTimes(**row | {name: Timing(*row[name]) for name in timings}) for row in rows]
