"""Dispatch and combine over real ranks, timed beside torchtitan's on the same inputs, in paired rounds.

    python -m moe_lab.jobs.exchange_bench --tokens 1024 4096 --dim 256 1024

A round times ours, torchtitan's, and the exchanges alone of the same rows, in turns which is first; its time is that
of the slowest rank. Experts are left out: rows come back as they went. NCCL where each rank has a GPU, else gloo.
Needs torchtitan (the `peers` extra).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab import phases
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.jobs.exchange_table import PHASES, PairedTimes, describe, paired, phase_table, save
from moe_lab.jobs.options import new_file
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.router import Routing, route
from moe_lab.parallel.mesh import MeshExchange
from moe_lab.parallel.ranks import RankPool

Step = Callable[[Tensor, Routing], Tensor]


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


def exchanges_alone(config: MoEConfig, x_TD: Tensor, routing: Routing) -> Callable[[], Tensor]:
    """The gather of counts and both exchanges of the same rows, packed beforehand: ours, if the rest took no time."""
    assert dist.group.WORLD is not None
    exchange = MeshExchange(dist.group.WORLD, collectives="c10d")
    dispatcher = AllToAllTokenDispatcher(config, exchange)
    _, plan = dispatcher.dispatch(x_TD, routing)
    sent_SD = dispatcher.pack(x_TD, routing, plan)

    def step() -> Tensor:
        exchange.all_gather(plan.local.counts_E).wait()
        received_SD = exchange.all_to_all(sent_SD, plan.send_splits, plan.receive_splits).wait()
        return exchange.all_to_all(received_SD, plan.receive_splits, plan.send_splits).wait()

    return step


def rounds(
    tokens: int, dim: int, num_experts: int, top_k: int, num_rounds: int, warmup: int = 20, dtype: str = "float32"
) -> dict[str, Any]:
    """Rank function: seconds of every round by arm, the relative difference of results, and seconds of our phases.

    Phases are stamped in rounds of their own, where an arm is timed nothing is.
    """
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda" if on_gpu else "cpu")
    config = MoEConfig(dim=dim, hidden_dim=1, num_experts=num_experts, top_k=top_k)
    torch.manual_seed(dist.get_rank())
    x_TD = torch.randn(tokens, dim).to(device, getattr(torch, dtype))
    routing = route(torch.randn(tokens, num_experts).to(device), RouterConfig(), top_k)
    steps: dict[str, Callable[[], Tensor]] = {
        "ours": partial(ours(config), x_TD, routing),
        "theirs": partial(torchtitans(config), x_TD, routing),
        "exchange": exchanges_alone(config, x_TD, routing),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results = {}

    def timed(name: str) -> float:
        dist.barrier()
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        results[name] = steps[name]()
        float(results[name][0, 0])  # awaits a functional collective's result, and the device
        return time.perf_counter() - start

    found: dict[str, list[float]] = {name: [] for name in ("all", *PHASES)}
    with torch.no_grad():
        for turn in range(warmup + num_rounds):
            for name in (*steps, *steps)[turn % 3 : turn % 3 + 3]:
                took = timed(name)
                if turn >= warmup:
                    seconds[name].append(took)
        for _ in range(0 if on_gpu else num_rounds):  # on the host only: stamps do not wait for a device
            with phases.record() as spans:
                found["all"].append(timed("ours"))
            for name in PHASES:
                found[name].append(sum(span.end - span.start for span in spans if span.name == name))
    ours_TD, theirs_TD = (results[name].float() for name in ("ours", "theirs"))
    return {"difference": float((ours_TD - theirs_TD).norm() / ours_TD.norm()), "phases": found, **seconds}


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
    parser.add_argument("--out", type=new_file, help="keep the times in this JSON file")
    args = parser.parse_args()
    budget = 1e-5 if args.dtype == "float32" else 2e-2  # the peer rounds weighted rows, we their sum
    found: list[PairedTimes] = []
    with RankPool(args.ranks, timeout=900.0) as pool:
        for tokens in args.tokens:
            for dim in args.dim:
                by_rank = pool.run(rounds, tokens, dim, args.experts, args.top_k, args.rounds, dtype=args.dtype)
                assert max(rank["difference"] for rank in by_rank) < budget, "the two disagree"
                found.append(paired(by_rank, tokens, dim))
                print(describe(found[-1]), flush=True)
                if args.out is not None:
                    save(args.out, found, args.ranks, args.rounds, on_gpu=pool.backend == "nccl")
    print(phase_table(found))


if __name__ == "__main__":
    from moe_lab.jobs import exchange_bench  # ranks import functions by module, and cannot import __main__

    exchange_bench.main()
