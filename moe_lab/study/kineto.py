"""Exchanges between ranks from traces of `torch.profiler`: one Chrome JSON a rank, all of one host's clock.

    steps = read(["rank0.json", "rank1.json"])       # of each layer, by rank
    by_exchange(steps[3])["dispatch"]                # a `timeline.Parts` a rank

With gloo an exchange is the op on gloo's thread, with NCCL the kernel, from its start to its end. It is hidden while
the rank computes: other kernels, or operators on the CPU. A layer is what a mark says: `record_function("layer 3")`
around it, or its module, `nn.Module: MoE_3`, which profiling with stacks marks by itself. Inside a mark exchanges are
dispatch and combine in turn, gathers are counts. Outside of any, backward undoes forward: the last combine first.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.study.timeline import Flight, RankSteps

MARK = re.compile(r"(?:layer |nn\.Module: MoE_)(\d+)")
WAITING = ("c10d", "_c10d_functional", "autograd", "record_param_comms")  # operators that compute nothing
NAMES = ("dispatch", "combine")
MAX_BYTES = 2**30
Interval = tuple[float, float]


class _Exchange(NamedTuple):
    """When it ran and was asked for, microseconds, and whether it gathers."""

    start: float
    end: float
    posted: float
    gathers: bool


class _Trace(NamedTuple):
    rank: int
    size: int
    flights: dict[int | None, list[Flight]]


def read(paths: Sequence[str | Path]) -> dict[int | None, list[RankSteps]]:
    """What the ranks recorded, by layer: flights in seconds, each name once ("dispatch 2" in the second step).

    The layer None has exchanges that no mark explains. A flight's `asked` is its arrival and what was hidden of it, so
    that `timeline.parts` gives wait, transfer, exposed and hidden. Raises `ValueError`, naming the file, for what is
    no trace of a rank, and where files are not of all ranks or ranks saw different exchanges.
    """
    traces = sorted((_read(Path(path)) for path in paths), key=lambda trace: trace.rank)
    ranks = [trace.rank for trace in traces]
    size = max((trace.size for trace in traces), default=0)
    if not traces or ranks != list(range(size)):
        raise ValueError(f"traces of ranks {ranks}: must be one of each rank from 0 to {max(size, 1) - 1}")
    layers = list(dict.fromkeys(layer for trace in traces for layer in trace.flights))
    found = {}
    for layer in sorted(layers, key=lambda layer: (layer is None, layer)):
        names = [[flight.name for flight in trace.flights.get(layer, [])] for trace in traces]
        if any(seen != names[0] for seen in names):
            raise ValueError(f"layer {layer}: ranks saw different exchanges: {names}")
        found[layer] = [RankSteps((), tuple(trace.flights.get(layer, []))) for trace in traces]
    return found


def _read(path: Path) -> _Trace:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"is larger than {MAX_BYTES:,} bytes")
        return _parsed(json.loads(content))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no profiler trace of a rank: {error!r}") from error


def _parsed(content: dict[str, Any]) -> _Trace:
    about, base = content["distributedInfo"], content.get("baseTimeNanoseconds", 0) / 1e3
    rank, size = about["rank"], about["world_size"]
    if not (type(rank) is int and type(size) is int and 0 <= rank < size):
        raise ValueError(f"rank={rank!r} must be an integer below world_size={size!r}")
    events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
    for event in events:
        if not all(math.isfinite(event[name]) for name in ("ts", "dur")) or event["dur"] < 0:
            raise ValueError(f"event {event['name']!r} lasts {event['dur']!r} from {event['ts']!r}")
    busy, marks = _computing(events), _marks(events)
    flights: dict[int | None, list[Flight]] = {}
    turns: dict[tuple[int | None, str], int] = {}
    for layer, name, seen in _named(_exchanges(events), marks):
        own = flights.setdefault(layer, [])
        turns[layer, name] = turn = turns.get((layer, name), 0) + 1
        hidden = _overlap(busy, (seen.start, seen.end))
        start, end = (1e-6 * (base + stamp) for stamp in (seen.start, seen.end))
        own.append(Flight(name if turn == 1 else f"{name} {turn}", start, start + 1e-6 * hidden, end))
    return _Trace(rank, size, flights)


def _exchanges(events: Iterable[dict[str, Any]]) -> list[_Exchange]:
    """In order of their posts. A kernel is posted when the host launches it."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = []
    for event in events:
        name, args = event["name"], event.get("args", {})
        what = name.removeprefix("gloo:") if name.startswith("gloo:") else str(args.get("Collective name", ""))
        kernel = event.get("cat") == "kernel" and name.startswith("nccl")
        gathers = "gather" in what
        if (kernel or name.startswith("gloo:")) and (gathers or "all_to_all" in what):
            posted = launches.get(args.get("correlation"), event["ts"])
            found.append(_Exchange(event["ts"], event["ts"] + event["dur"], posted, gathers))
    return sorted(found, key=lambda exchange: exchange.posted)


def _computing(events: Iterable[dict[str, Any]]) -> list[Interval]:
    """When the rank computes, as disjoint intervals: kernels where there are any, else operators."""
    kernels = [e for e in events if e.get("cat") == "kernel"]
    if kernels:
        busy = [e for e in kernels if not e["name"].startswith("nccl")]
    else:
        ops = (e for e in events if e.get("cat") == "cpu_op" and "::" in e["name"])
        busy = [e for e in ops if e["name"].split("::")[0] not in WAITING]
    merged: list[Interval] = []
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in busy):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _overlap(busy: Sequence[Interval], span: Interval) -> float:
    """How much of the span the disjoint, ascending intervals cover."""
    covered = 0.0
    for start, end in busy[bisect_left(busy, span[0], key=lambda interval: interval[1]) :]:
        if start >= span[1]:
            break
        covered += min(end, span[1]) - max(start, span[0])
    return covered


def _marks(events: Iterable[dict[str, Any]]) -> list[tuple[float, float, int]]:
    """Start, end and layer of every mark on the host, the latest start first: of nested ones, the innermost."""
    host = (e for e in events if e.get("cat") in ("user_annotation", "python_function"))
    found = [(e["ts"], e["ts"] + e["dur"], int(hit[1])) for e in host if (hit := MARK.fullmatch(e["name"]))]
    return sorted(found, reverse=True)


def _named(
    exchanges: Iterable[_Exchange], marks: Sequence[tuple[float, float, int]]
) -> Iterator[tuple[int | None, str, _Exchange]]:
    """Each exchange with its layer and name, see the top of this module."""
    turns: dict[tuple[float, float, int], int] = {}
    forward: list[tuple[int, str]] = []
    for seen in exchanges:
        mark = next((mark for mark in marks if mark[0] <= seen.posted <= mark[1]), None)
        if seen.gathers:
            yield (None if mark is None else mark[2]), "count", seen
        elif mark is not None:
            name = NAMES[turns.get(mark, 0) % len(NAMES)]
            turns[mark] = turns.get(mark, 0) + 1
            forward.append((mark[2], name))
            yield mark[2], name, seen
        elif forward:
            layer, name = forward.pop()
            yield layer, f"{name} gradients", seen
        else:
            yield None, "exchange", seen
