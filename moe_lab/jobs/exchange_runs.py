"""A layer of the shipped model over real ranks, on real text, with a stamp at every phase and exchange."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab import data, phases
from moe_lab.config import EqualSplit, MoEConfig, check_choice, check_int
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.exchange import Sent
from moe_lab.layer.moe import MoE
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import Routing, count
from moe_lab.parallel.mesh import MeshExchange
from moe_lab.parallel.ranks import RankPool
from moe_lab.parallel.virtual import VirtualRanks
from moe_lab.parallel.wire import wire
from moe_lab.study.timeline import RankSteps, TimedExchange, by_exchange
from moe_lab.study.timing import Timing, summarise

SLOW_AT = ("router", "experts")


@cache
def page_inputs(layer: int) -> tuple[MoE, Tensor]:
    """A layer of the shipped model, and what comes to it, (T, D), from the text of the five shipped pages."""
    model, seen = data.load_lm(), []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same bits in every process
    check_choice("layer", layer, tuple(range(len(model.moe_layers))))
    moe = model.moe_layers[layer]
    hook = moe.register_forward_hook(lambda module, args, out: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for page in sorted((data.root() / "pages").iterdir()):
            model(torch.tensor(list(page.read_bytes()[:512]))[None])
    hook.remove()
    torch.set_num_threads(threads)
    return moe, torch.cat(seen)


@cache
def _wired(layer: int) -> tuple[MoE, Tensor]:
    """This rank's part: every so many-th token, so that no rank has one kind of text."""
    moe, x_TD = page_inputs(layer)
    return wire(moe, dist.group.WORLD, collectives="c10d"), x_TD[dist.get_rank() :: dist.get_world_size()].clone()


def steps(
    layer: int, num_steps: int, *, slow_rank: int, slow_ms: float, slow_at: str, overlap: bool, barrier: bool
) -> list[RankSteps]:
    """Rank function: forward and backward, `num_steps` times after one that does not count."""
    moe, x_TD = _wired(layer)
    dispatcher = moe.dispatcher
    assert isinstance(dispatcher, AllToAllTokenDispatcher)
    assert isinstance(dispatcher.exchange, MeshExchange)
    plain = dispatcher.exchange
    sleeps = slow_ms / 1e3 if dist.get_rank() == slow_rank else 0.0
    hook = getattr(moe, slow_at).register_forward_hook(lambda *of: time.sleep(sleeps) if sleeps else None)
    recorded = []
    try:
        for _ in range(1 + num_steps):
            timed = TimedExchange(plain, overlap=overlap, barrier=barrier)
            dispatcher.exchange = timed
            x = x_TD.clone().requires_grad_()
            with phases.record() as spans:
                loss = moe(x).square().mean()
            loss.backward()
            recorded.append(RankSteps(tuple(spans), tuple(timed.flights)))
    finally:
        hook.remove()
        dispatcher.exchange = plain
    return recorded[1:]


def timeline(
    pool: RankPool,
    *,
    layer: int = 3,
    slow_rank: int = 0,
    slow_ms: float = 0.0,
    slow_at: str = "experts",
    overlap: bool = True,
    barrier: bool = False,
) -> list[RankSteps]:
    """One step of the shipped layer on the ranks of a pool, by rank. One of them sleeps `slow_ms` at `slow_at`.

    Raises `ValueError` for an unknown rank, phase or layer.
    """
    check_int("slow_rank", slow_rank, 0, pool.size - 1)
    check_choice("slow_at", slow_at, SLOW_AT)
    how: dict[str, Any] = {"slow_rank": slow_rank, "slow_ms": slow_ms, "slow_at": slow_at}
    return [steps[0] for steps in pool.run(steps, layer, 1, overlap=overlap, barrier=barrier, **how)]


class Overlap(NamedTuple):
    """Exposed ms of one exchange, mean over ranks: waited for at once, and with shared experts in between."""

    exchange: str
    off: Timing
    on: Timing
    change: Timing


def compare_overlap(pool: RankPool, *, layer: int = 3, rounds: int = 10) -> list[Overlap]:
    """Paired rounds of both arms; `change` is on less off, ms, round by round. Forward, then backward."""
    exposed: dict[tuple[str, bool], list[float]] = {}
    how: dict[str, Any] = {"slow_rank": 0, "slow_ms": 0.0, "slow_at": "experts", "barrier": False}
    for turn in range(rounds):
        for overlap in (bool(turn % 2), not turn % 2):
            first = [steps[0] for steps in pool.run(steps, layer, 1, overlap=overlap, **how)]
            found = by_exchange(first)
            for name in ("combine", "combine gradients"):
                ms = 1e3 * sum(part.exposed for part in found[name]) / pool.size
                exposed.setdefault((name, overlap), []).append(ms)
    results = []
    for name in ("combine", "combine gradients"):
        off, on = exposed[name, False], exposed[name, True]
        results.append(Overlap(name, summarise(off), summarise(on), summarise([b - a for a, b in zip(off, on)])))
    return results


def outputs(layer: int) -> list[str]:
    """Rank function: the layer's output on this rank's tokens, a few numbers and their sum, to the bit."""
    moe, x_TD = _wired(layer)
    with torch.no_grad():
        out_TD = moe(x_TD)
    return [float(v).hex() for v in (*out_TD.flatten()[:256], *out_TD.double().sum(dim=1))]


def same_bits(pool: RankPool, layer: int = 3) -> bool:
    """Whether real ranks and as many virtual ones give the same layer output, to the bit, at one thread each."""
    moe, x_TD = page_inputs(layer)
    threads = torch.get_num_threads()
    torch.set_num_threads(pool.threads)
    try:
        with torch.no_grad():
            virtual = VirtualRanks(moe, pool.size)([x_TD[rank :: pool.size].clone() for rank in range(pool.size)])
    finally:
        torch.set_num_threads(threads)
    expected = [[float(v).hex() for v in (*o.flatten()[:256], *o.double().sum(dim=1))] for o in virtual]
    return pool.run(outputs, layer) == expected


def exchange_ids(ids_by_rank: Sequence[Any], placement: Placement, equal_split: EqualSplit, dim: int) -> dict[str, Any]:
    """Rank function: these expert ids dispatched and combined, rows of `dim` float32, counted in the exchange."""
    num_experts = placement.num_experts
    ids_TK = torch.as_tensor(ids_by_rank[dist.get_rank()])
    top_k = ids_TK.shape[1]
    config = MoEConfig(dim=dim, hidden_dim=1, num_experts=num_experts, top_k=top_k, equal_split=equal_split)
    assert dist.group.WORLD is not None
    exchange = MeshExchange(dist.group.WORLD, collectives="c10d")
    dispatcher = AllToAllTokenDispatcher(config, exchange, placement=placement)
    scores_TE = torch.zeros(len(ids_TK), num_experts)
    gates_TK = torch.full(ids_TK.shape, 1 / top_k)
    routing = Routing(gates_TK, ids_TK, scores_TE, scores_TE, count(ids_TK, num_experts))
    x_TD = torch.randn(len(ids_TK), dim)
    start = time.perf_counter()
    with torch.no_grad(), exchange.log.watch() as sent:
        rows_RD, plan = dispatcher.dispatch(x_TD, routing)
        out_TD = dispatcher.combine(rows_RD, routing, plan)
    seconds = time.perf_counter() - start
    return {"sent": [_plain(one) for one in sent], "seconds": seconds, "same": torch.allclose(out_TD, x_TD)}


def _plain(sent: Sent) -> tuple[list[int], int]:
    return list(sent.rows_R), sent.row_bytes
