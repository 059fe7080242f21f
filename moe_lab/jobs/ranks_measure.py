"""One rank's part of the benchmark over ranks: its layer timed beside its peers', whole and in phases."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab.jobs.ranks_inputs import KINDS, Settings, draw_routing
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.exchange import finish
from moe_lab.layer.exchange_plan import ExchangePlan
from moe_lab.layer.moe import MoE
from moe_lab.layer.router import Routing
from moe_lab.layer.splits import EqualSplits
from moe_lab.parallel.sharding import make_mesh
from moe_lab.parallel.wire import wire


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


class Part:
    """One rank's part of a layer: its experts, beside those of its group of ranks, its tokens and their routing.

    `copies`: the ranks that hold the same experts, one of each group.
    """

    def __init__(self, settings: Settings) -> None:
        self.on_gpu = dist.get_backend() == "nccl"
        device, dtype = torch.device("cuda" if self.on_gpu else "cpu"), getattr(torch, settings.dtype)
        mesh = make_mesh(settings.ep or dist.get_world_size(), device=device.type)
        self.group, self.copies = mesh["ep"].get_group(), mesh["dp"].get_group()
        self.moe = _layer(settings, self.group, device, dtype)
        self.dispatcher: AllToAllTokenDispatcher = self.moe.dispatcher  # type: ignore[assignment]
        self.routing = draw_routing(settings, dist.get_rank(), dist.get_world_size(), device)
        torch.manual_seed(dist.get_rank())
        self.x_TD = torch.randn(settings.tokens, settings.config.dim, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D): tokens through their experts wherever these are."""
        rows_RD, plan = self.dispatcher.dispatch(x_TD, self.routing)
        return self.dispatcher.combine(self.moe.experts(rows_RD, plan.ends_E), self.routing, plan)

    def step(self) -> list[Tensor]:
        """The experts' gradients of the sum over all ranks of mean(y^2); none is left behind."""
        self.forward(self.x_TD.detach().requires_grad_()).float().square().mean().backward()
        self.routing.gates_TK.grad = None
        gradients = []
        for weight in self.moe.experts.parameters():
            assert weight.grad is not None
            if self.copies.size() > 1:
                dist.all_reduce(weight.grad, group=self.copies)
            gradients.append(weight.grad)
            weight.grad = None
        return gradients


def measure(settings: Settings) -> RankResult:
    """Rank function: time one layer on this rank's tokens, beside its peers.

    With several groups of ranks, each with all experts, a step ends with the sum of the experts' gradients over them.
    """
    part = Part(settings)
    dispatcher, group, routing, x_TD, on_gpu = part.dispatcher, part.group, part.routing, part.x_TD, part.on_gpu
    forward = torch.no_grad()(lambda: part.forward(x_TD))
    rounds = settings.warmup + settings.iterations
    edges_IP = [_edges(part.moe, dispatcher, x_TD, routing, on_gpu) for _ in range(rounds)]
    with torch.no_grad():
        plan = finish(dispatcher.planning(routing))
        sent_SD = dispatcher.pack(x_TD, routing, plan)
    exchange_ms, plain_ms = _exchanges(dispatcher, group, plan, sent_SD, settings, on_gpu)
    splits = plan.send_splits or [len(sent_SD) // group.size()] * group.size()
    away = sum(n for r, n in enumerate(splits) if r != group.rank()) * sent_SD.shape[1] * sent_SD.element_size()
    return RankResult(
        _repeat(forward, settings, on_gpu),
        _repeat(part.step, settings, on_gpu),
        edges_IP[settings.warmup :],
        exchange_ms,
        plain_ms,
        away,
        int(plan.received_e.sum()),
        plan.splits.padded_rows(group.rank()) if isinstance(plan.splits, EqualSplits) else 0,
        plan.splits.reason,
    )


def _layer(settings: Settings, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype) -> MoE:
    """The layer over the ranks of a group, without ever holding all experts."""
    backend = "fused" if device.type == "cuda" else "loop"
    with torch.device("meta"):
        moe = MoE(settings.config.replace(backend=backend, **KINDS[settings.kind])).to(dtype)
    moe = wire(moe, group, tokens_per_rank=settings.tokens, collectives="c10d").to_empty(device=device)
    torch.manual_seed(group.rank())
    moe.reset_parameters()
    return moe


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
    dispatcher: AllToAllTokenDispatcher,
    group: dist.ProcessGroup,
    plan: ExchangePlan,
    sent_SD: Tensor,
    settings: Settings,
    on_gpu: bool,
) -> tuple[list[float], list[float]]:
    """The dispatch exchange as the dispatcher makes it, and a plain collective into a buffer that is there."""
    send, receive = plan.send_splits, plan.receive_splits
    out_SD = dispatcher.exchange.all_to_all(sent_SD, send, receive).wait().clone()
    arms = (
        lambda: dispatcher.exchange.all_to_all(sent_SD, send, receive).wait(),
        lambda: dist.all_to_all_single(out_SD, sent_SD, receive, send, group=group),
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
