"""Dispatch and combine over real ranks, timed beside torchtitan's on the same inputs, in paired rounds.

    python -m moe_lab.jobs.exchange_bench --tokens 1024 4096 --dim 256 1024

A round times one after the other, in turns which is first; its time is that of the slowest rank. Experts are left
out: rows come back as they went. NCCL where each rank has a GPU, else gloo. Needs torchtitan (the `peers` extra).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.router import Routing, route
from moe_lab.parallel.mesh import MeshExchange
from moe_lab.parallel.ranks import RankPool
from moe_lab.study.timing import Timing, environment, ratio, summarise

Step = Callable[[Tensor, Routing], Tensor]


class PairedTimes(NamedTuple):
    """Milliseconds of the slowest rank, and the ratio within rounds, each the median with its bootstrap interval."""

    tokens: int
    dim: int
    ours: Timing
    theirs: Timing
    ratio: Timing


def ours(config: MoEConfig, collectives: str = "c10d") -> Step:
    """Our dispatch and combine over all ranks."""
    assert dist.group.WORLD is not None
    dispatcher = AllToAllTokenDispatcher(config, MeshExchange(dist.group.WORLD, collectives=collectives))

    def step(x_TD: Tensor, routing: Routing) -> Tensor:
        rows_RD, plan = dispatcher.dispatch(x_TD, routing)
        return dispatcher.combine(rows_RD, routing, plan)

    return step


def torchtitans(config: MoEConfig) -> Step:
    """Torchtitan's dispatch and combine over all ranks, by functional collectives.

    Its default, spmd_types, exchanges lists of tensors, which gloo takes only in equal sizes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher as Peer

    if not hasattr(torch.compiler, "_is_non_strict_tracing"):  # torchtitan 0.3.0 asks PyTorch 2.13's compiler
        torch.compiler._is_non_strict_tracing = lambda: False
    peer = Peer(Peer.Config(num_experts=config.num_experts, top_k=config.top_k))
    set_spmd_backend("full_dtensor")
    kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
    peer.wire_meshes(ep_mesh=init_device_mesh(kind, (dist.get_world_size(),), mesh_dim_names=("ep",)))

    def step(x_TD: Tensor, routing: Routing) -> Tensor:
        rows_RD, _, metadata = peer.dispatch(x_TD, routing.gates_TK, routing.expert_ids_TK, routing.counts_E)
        return peer.combine(rows_RD, metadata, x_TD)

    return step


def rounds(
    tokens: int, dim: int, num_experts: int, top_k: int, num_rounds: int, warmup: int = 5, dtype: str = "float32"
) -> dict[str, Any]:
    """Rank function: seconds of every round, ours and theirs, and the relative difference of their results."""
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda" if on_gpu else "cpu")
    config = MoEConfig(dim=dim, hidden_dim=1, num_experts=num_experts, top_k=top_k)
    steps = {"ours": ours(config), "theirs": torchtitans(config)}
    torch.manual_seed(dist.get_rank())
    x_TD = torch.randn(tokens, dim).to(device, getattr(torch, dtype))
    routing = route(torch.randn(tokens, num_experts).to(device), RouterConfig(), top_k)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results = {}
    with torch.no_grad():
        for turn in range(warmup + num_rounds):
            for name in list(steps)[:: 1 if turn % 2 else -1]:
                dist.barrier()
                if on_gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                results[name] = steps[name](x_TD, routing)
                float(results[name][0, 0])  # awaits a functional collective's result, and the device
                if turn >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    ours_TD, theirs_TD = (results[name].float() for name in ("ours", "theirs"))
    return {**seconds, "difference": float((ours_TD - theirs_TD).norm() / ours_TD.norm())}


def paired(by_rank: list[dict[str, Any]], tokens: int, dim: int) -> PairedTimes:
    """From the seconds of every rank's rounds; a round is as slow as its slowest rank."""
    ours_n, theirs_n = ([1e3 * max(n) for n in zip(*(rank[name] for rank in by_rank))] for name in ("ours", "theirs"))
    return PairedTimes(tokens, dim, summarise(ours_n), summarise(theirs_n), ratio(ours_n, theirs_n))


def describe(times: PairedTimes) -> str:
    """One line: medians in ms and the ratio, each with its 95 % interval."""
    cells = [f"T {times.tokens:>5}  D {times.dim:>4}"]
    for name, of, digits in (("ours", times.ours, 1), ("torchtitan", times.theirs, 1), ("ratio", times.ratio, 3)):
        cells.append(f"{name} {of.median:.{digits}f} [{of.low:.{digits}f}, {of.high:.{digits}f}]")
    return "  ".join(cells)


def cpu_model() -> str:
    """What the kernel calls this CPU, and how many cores it lends."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {os.cpu_count()} cores"


def save(path: Path, found: Sequence[PairedTimes], ranks: int, num_rounds: int) -> None:
    """The measured times as JSON, with the machine, versions and date; `load` reads them."""
    facts = environment(torch.device("cpu")) | {"device": cpu_model(), "ranks": ranks, "rounds": num_rounds}
    shapes = [times._asdict() for times in found]
    path.write_text(json.dumps({"environment": facts, "shapes": shapes}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[PairedTimes]]:
    """What `save` wrote: the environment, and the times of each shape."""
    kept = json.loads(path.read_text())
    rows = kept["shapes"]
    timings = [{name: Timing(*row[name]) for name in ("ours", "theirs", "ratio")} for row in rows]
    return kept["environment"], [PairedTimes(r["tokens"], r["dim"], **times) for r, times in zip(rows, timings)]


def main() -> None:
    """Time every shape and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--dim", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--experts", type=int, default=36)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="keep the times in this JSON file")
    args = parser.parse_args()
    budget = 1e-5 if args.dtype == "float32" else 2e-2  # the peer rounds weighted rows, we their sum
    found = []
    with RankPool(args.ranks, timeout=900.0) as pool:
        for tokens in args.tokens:
            for dim in args.dim:
                by_rank = pool.run(rounds, tokens, dim, args.experts, args.top_k, args.rounds, dtype=args.dtype)
                assert max(rank["difference"] for rank in by_rank) < budget, "the two disagree"
                found.append(paired(by_rank, tokens, dim))
                print(describe(found[-1]), flush=True)
    if args.out is not None:
        save(args.out, found, args.ranks, args.rounds)


if __name__ == "__main__":
    from moe_lab.jobs import exchange_bench  # ranks import functions by module, and cannot import __main__

    exchange_bench.main()
