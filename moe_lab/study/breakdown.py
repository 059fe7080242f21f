"""What a layer's time is made of: the phases that it records, in rounds that competing arms take in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_lab import phases
from moe_lab.study.timing import BLOCK_MS

REST = "rest"
WARM_UPS = 3


def breakdown(
    arms: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Milliseconds of every run, by arm, phase and round: "all", each phase, and the "rest" of all.

    A phase that comes twice in a run counts once, with its sum. Stamps are cheap beside a phase, yet they are there:
    "all" is of runs that are being recorded.
    """
    found: dict[str, dict[str, list[list[float]]]] = {name: {} for name in arms}
    for arm in arms.values():
        for _ in range(WARM_UPS):
            arm()
    calls = {name: _calls(arm, device) for name, arm in arms.items()}
    for _ in range(rounds):
        for name, arm in arms.items():
            runs = [_recorded(arm, device) for _ in range(calls[name])]
            for phase in dict.fromkeys(phase for run in runs for phase in run):
                found[name].setdefault(phase, []).append([run.get(phase, 0.0) for run in runs])
    return found


def _calls(arm: Callable[[], object], device: torch.device) -> int:
    taken = statistics.median(_recorded(arm, device)["all"] for _ in range(3))
    return min(50, max(1, round(BLOCK_MS[device.type] / max(taken, 1e-3))))


def _recorded(arm: Callable[[], object], device: torch.device) -> dict[str, float]:
    stamp, ms = _clock(device)
    with phases.record(stamp) as spans:
        start = stamp()
        arm()
        end = stamp()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    parts: dict[str, float] = {}
    for span in spans:
        parts[span.name] = parts.get(span.name, 0.0) + ms(span.start, span.end)
    whole = ms(start, end)
    return {"all": whole} | parts | {REST: max(0.0, whole - sum(parts.values()))}


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What makes a stamp, and the milliseconds between two."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: 1e3 * (end - start)

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return stamp, lambda start, end: start.elapsed_time(end)
