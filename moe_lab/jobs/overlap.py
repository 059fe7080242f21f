"""What shared experts hide of combine in a sharded training step, from profiler traces of its ranks.

    python -m moe_lab.jobs.overlap docs/results/overlap.json
    python -m moe_lab.jobs.overlap docs/results/h100x2_overlap.json --backend nccl --layer 1

On gloo the shipped model spread over two ranks, on the text of the shipped pages; on NCCL two layers of 10B_2B, drawn
at random, bfloat16, on random bytes. A round is a step that waits for combine at once and a step as it is, in turns
which is first, each traced by `torch.profiler` and read by `study.kineto`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile, record_function
from tqdm import tqdm

from moe_lab import data
from moe_lab.config import MoEConfig
from moe_lab.jobs.memory import loss_of
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.models.lm import LMConfig, MoELM
from moe_lab.parallel.mesh import MeshExchange, Wait
from moe_lab.parallel.ranks import RankPool
from moe_lab.parallel.sharding import make_mesh, shard_moe
from moe_lab.phases import Span
from moe_lab.study.kineto import read
from moe_lab.study.timeline import Flight, RankSteps, by_exchange

SIDES = {"off": False, "on": True}
BESIDE_SHARED = ("combine", "combine gradients")
RANKS = 2
SHARES = {"gloo": (2, 448), "nccl": (8, 2048)}  # sequences of a rank and their tokens; the shortest page has 483 bytes
LARGE = LMConfig(num_layers=2, num_heads=16, max_length=2048, moe=MoEConfig.preset("10B_2B", backend="grouped"))


class AtOnce(MeshExchange):
    """Waits for every exchange where it is started: what a layer would do that has nothing to compute meanwhile."""

    def start(
        self, rows_SD: Tensor, send: list[int] | None, receive: list[int] | None, overlap: bool
    ) -> tuple[Tensor, Wait]:
        """As of `MeshExchange`, never overlapping."""
        return super().start(rows_SD, send, receive, overlap=False)


def mark(layers: Sequence[nn.Module]) -> None:
    """Each layer's forward says its number in a trace."""
    for number, layer in enumerate(layers):
        layer.forward = partial(_marked, layer.forward, f"layer {number}")


def _marked(forward: Callable[..., Tensor], name: str, *args: Any) -> Tensor:
    with record_function(name):
        return forward(*args)


@cache
def _prepared() -> tuple[MoELM, Tensor]:
    """The sharded model and this rank's text, the same in every round."""
    backend, rank = dist.get_backend(), dist.get_rank()
    sequences, length = SHARES[backend]
    if backend == "nccl":
        torch.manual_seed(0)
        model = MoELM(LARGE).cuda().train()
        shard_moe(model, make_mesh(RANKS, device="cuda"), dtype=torch.bfloat16)
        text_BL = torch.randint(256, (RANKS * sequences, length + 1)).chunk(RANKS)[rank].cuda()
    else:
        model = data.load_lm().train()
        shard_moe(model, make_mesh(RANKS))
        pages = sorted((data.root() / "pages").iterdir())[rank::RANKS][:sequences]
        text_BL = torch.tensor([list(page.read_bytes()[: length + 1]) for page in pages])
    mark(model.moe_layers)
    return model, text_BL


def traced(folder: Path, overlap: bool) -> Path:
    """Rank function: one forward and backward after one that is not traced; where its trace lies."""
    model, text_BL = _prepared()
    kind = MeshExchange if overlap else AtOnce
    for moe in model.moe_layers:
        assert isinstance(moe.dispatcher, AllToAllTokenDispatcher)
        moe.dispatcher.exchange = kind(moe.dispatcher.exchange.group, collectives="c10d")  # type: ignore[attr-defined]
    _step(model, text_BL)
    dist.barrier()
    with profile() as profiler:
        _step(model, text_BL)
    path = folder / f"rank{dist.get_rank()}.json"
    profiler.export_chrome_trace(str(path))
    return path


def _step(model: MoELM, text_BL: Tensor) -> None:
    loss_of(model, text_BL).backward()
    model.zero_grad()
    if text_BL.is_cuda:
        torch.cuda.synchronize()


Traces = dict[str, list[list[RankSteps]]]  # by side: layers, then ranks


def one_round(pool: RankPool, sides: Sequence[str]) -> Traces:
    """Both sides, one after the other."""
    found = {}
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            steps = read(pool.run(traced, Path(folder), SIDES[side]))
        found[side] = [steps[layer] for layer in sorted(layer for layer in steps if layer is not None)]
    return found


def kept(steps: RankSteps) -> RankSteps:
    """One rank's combine, forward and backward, and what was computed during either."""
    flights = tuple(flight for flight in steps.flights if flight.name in BESIDE_SHARED)
    spans = tuple(s for s in steps.spans if any(f.arrival < s.end and s.start < f.end for f in flights))
    return RankSteps(spans, flights)


def microseconds(found: Traces) -> dict[str, list[dict[str, list[list[int]]]]]:
    """By side, layer and exchange: of each rank wait, transfer, exposed and hidden."""
    return {
        side: [
            {
                name: [[round(1e6 * part) for part in parts] for parts in by_exchange(list(map(kept, ranks)))[name]]
                for name in BESIDE_SHARED
            }
            for ranks in found[side]
        ]
        for side in SIDES
    }


def exposed(rounds: Sequence[dict[str, Any]], side: str, name: str, layer: int | None = None) -> list[float]:
    """Exposed milliseconds of an exchange, mean over ranks, by round: of a layer, or the sum of all."""
    layers = [one[side] if layer is None else [one[side][layer]] for one in rounds]
    return [1e-3 * sum(statistics.fmean(rank[2] for rank in of[name]) for of in found) for found in layers]


def typical(rounds: Sequence[dict[str, Any]], layer: int) -> int:
    """The round whose changes in a layer are nearest to the medians over rounds."""
    changes = []
    for name in BESIDE_SHARED:
        off, on = (exposed(rounds, side, name, layer) for side in SIDES)
        change = [b - a for a, b in zip(off, on)]
        changes.append([abs(one - statistics.median(change)) for one in change])
    distances = [sum(of) for of in zip(*changes)]
    return distances.index(min(distances))


def pack(ranks: Sequence[RankSteps]) -> list[dict[str, Any]]:
    """What ranks kept of a layer, plain: microseconds since the first arrival of each exchange."""
    packed: list[dict[str, Any]] = [{} for _ in ranks]
    for name in BESIDE_SHARED:
        flights = [next(f for f in map_of.flights if f.name == name) for map_of in ranks]
        zero = min(flight.arrival for flight in flights)
        for into, of, flight in zip(packed, ranks, flights):
            spans = [s for s in of.spans if flight.arrival < s.end and s.start < flight.end]
            into[name] = {
                "flight": [round(1e6 * (stamp - zero), 1) for stamp in flight[1:]],
                "computing": [[round(1e6 * (s.start - zero), 1), round(1e6 * (s.end - zero), 1)] for s in spans],
            }
    return packed


def unpack(packed: Sequence[dict[str, Any]], name: str) -> list[RankSteps]:
    """One exchange on each rank again, in seconds."""
    found = []
    for rank in packed:
        spans = tuple(Span("computing", 1e-6 * start, 1e-6 * end) for start, end in rank[name]["computing"])
        found.append(RankSteps(spans, (Flight(name, *(1e-6 * stamp for stamp in rank[name]["flight"])),)))
    return found


def measure(backend: str, num_rounds: int, layer: int) -> dict[str, Any]:
    """Rounds in microseconds, and the intervals of one layer in a typical round."""
    traces = []
    with RankPool(RANKS, backend=backend, timeout=300) as pool:
        for turn in tqdm(range(num_rounds), file=sys.stderr):
            traces.append(one_round(pool, list(SIDES)[:: 1 if turn % 2 else -1]))
    rounds = [microseconds(found) for found in traces]
    chosen = typical(rounds, layer)
    model = "2 layers of 10B_2B, bfloat16," if backend == "nccl" else "the shipped model"
    sequences, length = SHARES[backend]
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {
        "what": f"{model} on {RANKS} {backend} ranks, EP {RANKS}, {sequences} x {length:,} tokens a rank",
        "date": time.strftime("%Y-%m-%d"),
        "torch": str(torch.__version__),
        "machine": f"{RANKS} x {torch.cuda.get_device_name()}" if backend == "nccl" else cpu,
        "load_average": os.getloadavg()[0],
        "parts": ["wait", "transfer", "exposed", "hidden"],
        "rounds": rounds,
        "shown": {"layer": layer, "round": chosen}
        | {side: pack(list(map(kept, traces[chosen][side][layer]))) for side in SIDES},
    }


if __name__ == "__main__":
    from moe_lab.jobs import overlap  # by the name that ranks import

    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--backend", choices=list(SHARES), default="gloo")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layer", type=int, default=3, help="the one whose intervals are kept")
    args = parser.parse_args()
    args.file.write_text(
        json.dumps(overlap.measure(args.backend, args.rounds, args.layer), separators=(",", ":")) + "\n"
    )
