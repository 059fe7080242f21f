"""A layer over real ranks, timed: kinds of splits, phases with waiting told from transfer, beside plain collectives.

    torchrun --nproc-per-node 2 -m moe_lab bench layer --preset 10B_2B --json ranks.json
    python -m moe_lab.jobs.ranks_bench --ranks 2 --preset 10B_2B --shrink 8 --tokens 1024

Every rank holds its own tokens. Routing is given, not computed, so that all kinds of splits see the same: normal
logits with a random offset an expert ("skewed"), popularity as 1 / rank ("zipf"), or the shipped model's ("trace",
which brings its own 32 experts and K 4). Forward runs without gradients; backward is of mean(y^2) in float32. The
router and shared experts are left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moe_lab import data
from moe_lab.config import MoEConfig, RouterConfig, check_choice, check_int
from moe_lab.jobs.bench_inputs import LAYERS
from moe_lab.jobs.ranks_table import EXCHANGES, PHASES, Row, describe, save
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.exchange import finish
from moe_lab.layer.moe import MoE
from moe_lab.layer.router import Routing, count
from moe_lab.layer.splits import EqualSplits
from moe_lab.parallel import RankPool, wire
from moe_lab.parallel.ranks import choose_backend
from moe_lab.study.load import packing_order
from moe_lab.study.timing import environment, ratio, summarise

KINDS: dict[str, dict[str, Any]] = {
    "unequal": {"equal_split": "off"},
    "adaptive": {"equal_split": "adaptive"},
    "equal": {"equal_split": "force"},
    "forced": {"router": RouterConfig(force_load_balance="round_robin")},
}
ROUTINGS = ("skewed", "zipf", "trace")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every rank runs: one layer, one kind of splits, one routing, `tokens` tokens a rank."""

    config: MoEConfig
    kind: str
    routing: str
    tokens: int
    dtype: str = "bfloat16"
    iterations: int = 100
    warmup: int = 20


class RankResult(NamedTuple):
    """One rank's part, in milliseconds: every iteration's forward and step, and phase edges in seconds.

    `edges_IP`: a monotonic clock at the start of each phase and at the end of the last, by iteration, the device
    synchronised at each: an arm of its own that perturbs what it measures. `exchange_ms`, `plain_ms`: the dispatch
    exchange and a plain all_to_all_single of the same rows, in turns. `sent_bytes`: to other ranks.
    """

    forward_ms: list[float]
    step_ms: list[float]
    edges_IP: list[list[float]]
    exchange_ms: list[float]
    plain_ms: list[float]
    sent_bytes: int
    rows: int
    padded_rows: int
    reason: str


def config_of(layer: str, shrink: int, routing: str) -> MoEConfig:
    """A layer's routed part, its dimensions divided by `shrink`; a trace brings its own experts and K."""
    config = LAYERS[layer].replace(num_shared_experts=0, load_balance_coeff=None)
    config = config.replace(dim=config.dim // shrink, hidden_dim=config.hidden_dim // shrink, router=RouterConfig())
    if routing == "trace":
        info = data.open("balanced_wide").info
        config = config.replace(num_experts=info.num_experts, top_k=info.top_k)
    return config


def draw_routing(settings: Settings, rank: int, ranks: int, device: torch.device) -> Routing:
    """This rank's gates and experts. Fixed seeds; offsets and popularity are the same on every rank."""
    config, tokens = settings.config, settings.tokens
    own = torch.Generator().manual_seed(rank + 1)
    logits_TE = torch.randn(tokens, config.num_experts, generator=own)
    if settings.kind == "forced":
        ids_TK = (torch.arange(tokens * config.top_k) % config.num_experts).view(tokens, config.top_k)
    elif settings.routing == "trace":
        trace = data.open("balanced_wide").layer(3)
        order_T = packing_order(trace).repeat(-(-ranks * tokens // trace.num_tokens))
        ids_TK = trace.expert_ids_LTK[0].long()[order_T[rank * tokens : (rank + 1) * tokens]]
    elif settings.routing == "zipf":
        place_E = torch.randperm(config.num_experts, generator=torch.Generator().manual_seed(0))
        # Gumbel noise on log popularity: K draws without replacement, expert of place n with weight 1 / n.
        gumbel_TE = -(-torch.rand(logits_TE.shape, generator=own).clamp(1e-20, 1 - 1e-7).log()).log()
        ids_TK = (gumbel_TE - (place_E + 1.0).log()).topk(config.top_k, dim=1).indices
    else:
        offset_E = 0.5 * torch.randn(config.num_experts, generator=torch.Generator().manual_seed(0))
        ids_TK = (logits_TE + offset_E).topk(config.top_k, dim=1).indices
    gates_TK = logits_TE.softmax(dim=1).gather(1, ids_TK).to(device)
    ids_TK = ids_TK.to(device)
    nothing = gates_TK.new_empty(0, config.num_experts)
    return Routing(gates_TK.requires_grad_(), ids_TK, nothing, nothing, count(ids_TK, config.num_experts))


def measure(settings: Settings) -> RankResult:
    """Rank function: time one layer on this rank's tokens, beside its peers."""
    assert dist.group.WORLD is not None
    rank, ranks = dist.get_rank(), dist.get_world_size()
    on_gpu = dist.get_backend() == "nccl"
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), getattr(torch, settings.dtype)
    torch.manual_seed(0)
    backend = "fused" if on_gpu else "loop"
    with device:
        moe = MoE(settings.config.replace(backend=backend, **KINDS[settings.kind]))
    moe = wire(moe.to(dtype), dist.group.WORLD, tokens_per_rank=settings.tokens, collectives="c10d")
    dispatcher: AllToAllTokenDispatcher = moe.dispatcher  # type: ignore[assignment]
    routing = draw_routing(settings, rank, ranks, device)
    torch.manual_seed(rank)
    x_TD = torch.randn(settings.tokens, settings.config.dim, device=device, dtype=dtype)

    def layer(x_TD: Tensor) -> Tensor:
        rows_RD, plan = dispatcher.dispatch(x_TD, routing)
        return dispatcher.combine(moe.experts(rows_RD, plan.ends_E), routing, plan)

    def step() -> None:
        layer(x_TD.detach().requires_grad_()).float().square().mean().backward()
        for leaf in (*moe.experts.parameters(), routing.gates_TK):
            leaf.grad = None

    forward = torch.no_grad()(lambda: layer(x_TD))
    edges_IP = [_edges(moe, dispatcher, x_TD, routing, on_gpu) for _ in range(settings.warmup + settings.iterations)]
    with torch.no_grad():
        plan = finish(dispatcher.planning(routing))
        sent_SD = dispatcher.pack(x_TD, routing, plan)
    exchange_ms, plain_ms = _exchanges(dispatcher, plan, sent_SD, settings, on_gpu)
    splits = plan.send_splits or [len(sent_SD) // ranks] * ranks
    away = sum(n for r, n in enumerate(splits) if r != rank) * sent_SD.shape[1] * sent_SD.element_size()
    return RankResult(
        _repeat(forward, settings, on_gpu),
        _repeat(step, settings, on_gpu),
        edges_IP[settings.warmup :],
        exchange_ms,
        plain_ms,
        away,
        int(plan.received_e.sum()),
        plan.splits.padded_rows(rank) if isinstance(plan.splits, EqualSplits) else 0,
        plan.splits.reason,
    )


def _repeat(work: Callable[[], object], settings: Settings, on_gpu: bool) -> list[float]:
    """Milliseconds of every iteration, one after another with nothing between: peers keep each other's pace."""
    for _ in range(settings.warmup):
        work()
    if not on_gpu:
        return [_host_ms(work) for _ in range(settings.iterations)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(settings.iterations + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def _host_ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def _edges(moe: MoE, dispatcher: AllToAllTokenDispatcher, x_TD: Tensor, routing: Routing, on_gpu: bool) -> list[float]:
    """A forward taken apart, the time at the edges of `PHASES`."""
    edges: list[float] = []

    def edge() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        edges.append(time.monotonic())

    exchange = dispatcher.exchange
    edge()
    plan = finish(dispatcher.planning(routing))
    edge()
    sent_SD = dispatcher.pack(x_TD, routing, plan)
    edge()
    received_SD = exchange.all_to_all(sent_SD, plan.send_splits, plan.receive_splits).wait()
    edge()
    rows_RD = dispatcher.unpack(received_SD, plan)
    edge()
    rows_RD = moe.experts(rows_RD, plan.ends_E)
    edge()
    sent_SD = dispatcher.repack(rows_RD, plan)
    edge()
    returned_SD = exchange.all_to_all(sent_SD, plan.receive_splits, plan.send_splits).wait()
    edge()
    if plan.send_padding is not None:
        returned_SD = plan.send_padding.strip(returned_SD)
    dispatcher.weigh(returned_SD, routing, plan.local, None, x_TD)
    edge()
    return edges


@torch.no_grad()
def _exchanges(
    dispatcher: AllToAllTokenDispatcher, plan: Any, sent_SD: Tensor, settings: Settings, on_gpu: bool
) -> tuple[list[float], list[float]]:
    """The dispatch exchange as the dispatcher makes it, and a plain collective into a buffer that is there."""
    send, receive = plan.send_splits, plan.receive_splits
    out_SD = dispatcher.exchange.all_to_all(sent_SD, send, receive).wait().clone()
    arms = (
        lambda: dispatcher.exchange.all_to_all(sent_SD, send, receive).wait(),
        lambda: dist.all_to_all_single(out_SD, sent_SD, receive, send),
    )
    rounds: tuple[list[float], list[float]] = [], []
    for turn in range(settings.warmup + settings.iterations):
        for arm, read in list(zip(arms, rounds))[:: 1 if turn % 2 else -1]:
            dist.barrier()
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            arm()
            if on_gpu:
                torch.cuda.synchronize()
            read.append(1e3 * (time.perf_counter() - start))
    return rounds[0][settings.warmup :], rounds[1][settings.warmup :]


def gather_rows(settings: Settings, layer: str, by_rank: Sequence[RankResult]) -> Row:
    """What the ranks measured, as one row."""
    forward_RI, step_RI = (np.array([getattr(r, n) for r in by_rank]) for n in ("forward_ms", "step_ms"))
    edges_RIP = np.array([r.edges_IP for r in by_rank])
    taken_RIP = 1e3 * np.diff(edges_RIP, axis=2)
    wait, transfer = {}, {}
    for name in EXCHANGES:
        arrival_RI, end_RI = (edges_RIP[:, :, PHASES.index(name) + side] for side in (0, 1))
        wait_RI, transfer_RI = wait_and_transfer(arrival_RI, end_RI)
        wait[name], transfer[name] = (1e3 * float(x.mean(axis=1).max()) for x in (wait_RI, transfer_RI))
    rows_R, padded_R = (np.array([getattr(r, n) for r in by_rank], float) for n in ("rows", "padded_rows"))
    exchange_I, plain_I = (np.array([getattr(r, n) for r in by_rank]).max(axis=0) for n in ("exchange_ms", "plain_ms"))
    config = settings.config
    return Row(
        layer=layer,
        routing=settings.routing,
        kind=settings.kind,
        ranks=len(by_rank),
        tokens=settings.tokens,
        shape={"D": config.dim, "F": config.hidden_dim, "E": config.num_experts, "K": config.top_k},
        forward_by_rank=_spread(forward_RI),
        forward_slowest_rank=float(forward_RI.mean(axis=1).max()),
        forward_slowest_each=float(forward_RI.max(axis=0).mean()),
        step_by_rank=_spread(step_RI),
        step_slowest_rank=float(step_RI.mean(axis=1).max()),
        step_slowest_each=float(step_RI.max(axis=0).mean()),
        tokens_per_second=1e3 * settings.tokens * len(by_rank) / float(forward_RI.max(axis=0).mean()),
        straggler=float(rows_R.max() / rows_R.mean()),
        padded_share=float(padded_R.sum() / (settings.tokens * config.top_k * len(by_rank))),
        reason=by_rank[0].reason,
        phases_ms=dict(zip(PHASES, taken_RIP.mean(axis=1).max(axis=0).tolist())),
        wait_ms=wait,
        transfer_ms=transfer,
        exchange=summarise(exchange_I.tolist()),
        plain=summarise(plain_I.tolist()),
        exchange_ratio=ratio(exchange_I.tolist(), plain_I.tolist()),
        bytes_per_second=1e3 * max(r.sent_bytes for r in by_rank) / float(np.median(exchange_I)),
    )


def wait_and_transfer(arrival_RI: np.ndarray, end_RI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each rank and iteration: until the latest rank arrives, and from then on until this one is done.

    wait_r = latest arrival - arrival_r; transfer_r = end_r - latest arrival. One clock for all ranks.
    """
    latest_I = arrival_RI.max(axis=0)
    return latest_I - arrival_RI, end_RI - latest_I


def _spread(times_RI: np.ndarray) -> list[list[float]]:
    return [[float(times.mean()), *np.quantile(times, (0.5, 0.9, 0.99)).tolist()] for times in times_RI]


def settings_of(args: argparse.Namespace) -> list[tuple[str, Settings]]:
    """All that is to be measured, by layer. `ValueError` for what is not known."""
    check_int("shrink", args.shrink, 1)
    layers, routings, kinds = args.preset or ["10B_2B"], args.routing or ["skewed"], args.kinds or list(KINDS)
    how = {"tokens": args.tokens or 16384, "dtype": args.dtype, "iterations": args.iterations}
    for name, wanted, known in (("preset", layers, LAYERS), ("routing", routings, ROUTINGS), ("kinds", kinds, KINDS)):
        for one in wanted:
            check_choice(name, one, known)
    return [
        (
            layer if args.shrink == 1 else f"{layer}/{args.shrink}",
            Settings(config=config_of(layer, args.shrink, routing), kind=kind, routing=routing, **how),
        )
        for layer in layers
        for routing in routings
        for kind in kinds
    ]


def run(
    call: Callable[[Settings], Sequence[RankResult] | None], work: Sequence[tuple[str, Settings]], out: Path | None
) -> None:
    """Measure everything, print a table a layer; the file holds what is done whenever it is interrupted.

    `call` gives the results of all ranks on the rank that reports, None on the others.
    """
    rows: list[Row] = []
    for name, settings in tqdm(work, desc="bench", unit="arm", file=sys.stderr, delay=2, disable=None):
        by_rank = call(settings)
        if by_rank is None:
            continue
        rows.append(gather_rows(settings, name, by_rank))
        if out is not None:
            device = torch.device("cuda" if choose_backend("auto", len(by_rank)) == "nccl" else "cpu")
            save(out, environment(device), rows)
    for name in dict.fromkeys(row.layer for row in rows):
        print(describe(name, [row for row in rows if row.layer == name]), flush=True)


def main_under_torchrun(args: argparse.Namespace) -> None:
    """On ranks that torchrun started: rank 0 reports."""
    backend = choose_backend("auto", int(os.environ["LOCAL_WORLD_SIZE"]))
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)

    def call(settings: Settings) -> Sequence[RankResult] | None:
        results: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(results, measure(settings))
        return results if dist.get_rank() == 0 else None

    run(call, settings_of(args), args.json)
    dist.barrier()  # without it gloo now and then aborts at exit
    dist.destroy_process_group()


def main() -> None:
    """On a pool of ranks of this machine."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.jobs.ranks_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", nargs="+", help="layers (default 10B_2B)")
    parser.add_argument("--tokens", type=int, help="tokens a rank (default 16384)")
    parser.add_argument("--kinds", nargs="+", help=f"of {', '.join(KINDS)} (default all)")
    parser.add_argument("--routing", nargs="+", help=f"of {', '.join(ROUTINGS)} (default skewed)")
    parser.add_argument("--shrink", type=int, default=1, help="divide D and F by this")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the numbers, with the environment, here")
    args = parser.parse_args()
    work = settings_of(args)
    with RankPool(args.ranks, timeout=900.0) as pool:
        run(lambda settings: pool.run(measure, settings), work, args.json)


if __name__ == "__main__":
    from moe_lab.jobs import ranks_bench  # ranks import functions by module, and cannot import __main__

    ranks_bench.main()
