"""Time and memory of functions that compete: interleaved rounds, ratios within a round, intervals by bootstrap.

In a round every arm runs in turn, each for a block of about `BLOCK_MS`, while drifts pass under all alike. On CUDA,
events time the device, the host queues ahead, and a buffer larger than the cache is written before each run. A GPU
under matrix products lowers its clocks within tens of milliseconds, by its power, and recovers under an arm that
leaves it half idle: there a block is longer and its first half is not counted, so that each arm is measured at the
clocks that its own power leaves it, as in training.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

BLOCK_MS = {"cpu": 50.0, "cuda": 250.0}
FLUSH_BYTES = 256 * 2**20


class Timing(NamedTuple):
    """Milliseconds: the median over rounds, and the 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float


class Spread(NamedTuple):
    """Milliseconds of single runs: quartiles, high percentiles, mean."""

    q25: float
    q75: float
    p90: float
    p99: float
    mean: float


class Memory(NamedTuple):
    """Bytes above what was allocated before: kept when forward ends, without its output; and at the worst moment."""

    saved: int
    peak: int


def interleave(
    arms: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, block_ms: float | None = None
) -> dict[str, list[list[float]]]:
    """Milliseconds of every run of every arm, by round; a round before does not count. See `medians`."""
    block_ms = BLOCK_MS[device.type] if block_ms is None else block_ms
    clock = _time_cuda if device.type == "cuda" else _time_cpu
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def block(arm: Callable[[], object], repeats: int) -> list[float]:
        read = []
        for _ in range(repeats):
            flush.zero_()
            read.append(clock(arm))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            read = read[len(read) // 2 :]
        return [time() for time in read]

    def repeats_of(arm: Callable[[], object]) -> int:
        return min(400, max(1, round(block_ms / max(statistics.median(block(arm, 3)), 1e-3))))

    repeats = {name: repeats_of(arm) for name, arm in arms.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in arms}
    for _ in tqdm(range(1 + rounds), "time", unit="round", delay=2, leave=False, disable=None):
        for name, arm in arms.items():
            times[name].append(block(arm, repeats[name]))
    return {name: counted for name, (_, *counted) in times.items()}


def medians(runs: Sequence[Sequence[float]]) -> list[float]:
    """One number a round: the median of its runs."""
    return [statistics.median(block) for block in runs]


def _time_cuda(arm: Callable[[], object]) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    arm()
    end.record()
    return lambda: start.elapsed_time(end)


def _time_cpu(arm: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    arm()
    taken = 1e3 * (time.perf_counter() - start)
    return lambda: taken


def time_replayed(function: Callable[[], object], *, calls: int = 20, rounds: int = 20) -> Timing:
    """One call on CUDA without the gaps of its launches: a graph of `calls` calls, replayed."""
    function()
    graph = captured(lambda: [function() for _ in range(calls)])
    read = [_time_cuda(graph.replay) for _ in range(rounds + 3)]
    torch.cuda.synchronize()
    return summarise([time() / calls for time in read[3:]])


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What a function launches, as a CUDA graph; run it once before, so that nothing is compiled here."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def summarise(values: Sequence[float]) -> Timing:
    """Median and interval of one arm's rounds, or of ratios within rounds."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (1000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Timing(statistics.median(values), float(low), float(high))


def spread(runs: Sequence[float]) -> Spread:
    """How single runs scatter."""
    q25, q75, p90, p99 = np.quantile(runs, (0.25, 0.75, 0.9, 0.99)).tolist()
    return Spread(q25, q75, p90, p99, statistics.fmean(runs))


def ratio(times: Sequence[float], bound: Sequence[float]) -> Timing:
    """How many times the bound an arm took, round by round."""
    return summarise([a / b for a, b in zip(times, bound)])


def measure_memory(forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], object]) -> Memory:
    """Memory of one forward and backward on CUDA; backward may leave gradients behind, which count."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = forward()
    saved = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    backward(out)
    return Memory(saved, torch.cuda.max_memory_allocated() - before)


def environment(device: torch.device) -> dict[str, str]:
    """What a measurement holds for: device, versions and date."""
    facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        import triton

        facts |= {"device": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
        facts["triton"] = triton.__version__
    else:
        facts |= {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads", "cpu": _cpu_name()}
    return facts


def _cpu_name() -> str:
    """The processor, with family and model where Linux tells them: in a virtual machine its name may be short."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().partition("\n\n")[0].splitlines())
    facts = {name.strip(): fact.strip() for name, _, fact in lines}
    parts = [f"{name.split()[-1]} {facts[name]}" for name in ("cpu family", "model") if name in facts]
    return ", ".join([facts.get("model name", platform.machine()), *parts])
