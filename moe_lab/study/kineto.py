"""Exchanges between ranks from traces of `torch.profiler`: one Chrome JSON a rank, all of one host's clock.

    steps = read(["rank0.json", "rank1.json"])       # of each layer, by rank
    by_exchange(steps[3])["dispatch"]                # a `timeline.Parts` a rank

With gloo an exchange lasts from its post until gloo's thread is done, with NCCL from the kernel's start to its end. It
is hidden while the rank computes: other kernels, or operators on the CPU. A layer is what a mark says:
`record_function("layer 3")` around it, or its module, `nn.Module: MoE_3`, which profiling with stacks marks by itself.
Inside a mark exchanges are dispatch and combine in turn, gathers are counts, but for those of weights by FSDP, which
are left out. Outside of any, backward undoes forward: the last combine first.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.phases import Span
from moe_lab.study.timeline import Flight, RankSteps

MARK = re.compile(r"(?:layer |nn\.Module: MoE_)(\d+)")
WEIGHTS = re.compile(r"FSDP::all_gather( |$)")  # what FSDP says while it posts one
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
    steps: dict[int | None, RankSteps]


def read(paths: Sequence[str | Path]) -> dict[int | None, list[RankSteps]]:
    """What the ranks recorded, by layer: flights in seconds, each name once ("dispatch 2" in the second step).

    The layer None has exchanges that no mark explains. A flight's `asked` is its arrival and what was hidden of it, so
    that `timeline.parts` gives wait, transfer, exposed and hidden. Spans are when the rank computed meanwhile. Raises
    `ValueError`, naming the file, for what is no trace of a rank, and where files are not of all ranks or ranks saw
    different exchanges.
    """
    traces = sorted((_read(Path(path)) for path in paths), key=lambda trace: trace.rank)
    ranks = [trace.rank for trace in traces]
    size = max((trace.size for trace in traces), default=0)
    if not traces or ranks != list(range(size)):
        raise ValueError(f"traces of ranks {ranks}: must be one of each rank from 0 to {max(size, 1) - 1}")
    layers = list(dict.fromkeys(layer for trace in traces for layer in trace.steps))
    found = {}
    for layer in sorted(layers, key=lambda layer: (layer is None, layer)):
        found[layer] = [trace.steps.get(layer, RankSteps((), ())) for trace in traces]
        names = [[flight.name for flight in step.flights] for step in found[layer]]
        if any(seen != names[0] for seen in names):
            raise ValueError(f"layer {layer}: ranks saw different exchanges: {names}")
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
    spans: dict[int | None, dict[Interval, Span]] = {}
    turns: dict[tuple[int | None, str], int] = {}
    for layer, name, seen in _named(_exchanges(events), marks):
        turns[layer, name] = turn = turns.get((layer, name), 0) + 1
        meanwhile = _during(busy, (seen.start, seen.end))
        hidden = sum(min(end, seen.end) - max(start, seen.start) for start, end in meanwhile)
        start, end = _seconds(base, (seen.start, seen.end))
        flight = Flight(name if turn == 1 else f"{name} {turn}", start, start + 1e-6 * hidden, end)
        flights.setdefault(layer, []).append(flight)
        computed = {one: Span("computing", *_seconds(base, one)) for one in meanwhile}
        spans[layer] = spans.get(layer, {}) | computed  # an interval may lie in two exchanges
    steps = {layer: RankSteps(tuple(spans[layer].values()), tuple(own)) for layer, own in flights.items()}
    return _Trace(rank, size, steps)


def _seconds(base: float, interval: Interval) -> Interval:
    return 1e-6 * (base + interval[0]), 1e-6 * (base + interval[1])


def _exchanges(events: Sequence[dict[str, Any]]) -> list[_Exchange]:
    """In order of their posts, without gathers of weights."""
    host = [event for event in events if event.get("cat") in ("user_annotation", "cpu_op")]
    of_weights = [(e["ts"], e["ts"] + e["dur"]) for e in host if WEIGHTS.match(e["name"])]
    found = [*_by_gloo(host, gathers=False), *_by_gloo(host, gathers=True), *_by_nccl(events)]
    kept = [one for one in found if not one.gathers or not any(a <= one.posted <= b for a, b in of_weights)]
    return sorted(kept, key=lambda exchange: exchange.posted)


def _by_gloo(host: Iterable[dict[str, Any]], *, gathers: bool) -> list[_Exchange]:
    """What gloo's thread ran, from the post of its turn on; where posts are missing, from when it began."""
    inside, post = ("gather", "allgather") if gathers else ("all_to_all", "alltoall")
    ran = [e for e in host if e["name"].startswith("gloo:") and inside in e["name"]]
    posts = sorted(e["ts"] for e in host if e["name"].startswith("c10d::") and post in e["name"])
    ran.sort(key=lambda event: event["ts"])
    starts = posts if len(posts) == len(ran) else [event["ts"] for event in ran]
    return [_Exchange(start, event["ts"] + event["dur"], start, gathers) for start, event in zip(starts, ran)]


def _by_nccl(events: Iterable[dict[str, Any]]) -> Iterator[_Exchange]:
    """Kernels, posted when the host launched them."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    for event in events:
        args = event.get("args", {})
        what = str(args.get("Collective name", ""))
        gathers = "gather" in what
        if event.get("cat") == "kernel" and event["name"].startswith("nccl") and (gathers or "all_to_all" in what):
            posted = launches.get(args.get("correlation"), event["ts"])
            yield _Exchange(event["ts"], event["ts"] + event["dur"], posted, gathers)


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


def _during(busy: Sequence[Interval], span: Interval) -> Sequence[Interval]:
    """Those of disjoint, ascending intervals that reach into the span."""
    first = bisect_right(busy, span[0], key=lambda interval: interval[1])
    return busy[first : bisect_left(busy, span[1], key=lambda interval: interval[0])]


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
