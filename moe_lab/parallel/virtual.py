"""N ranks in one process, in lock step: the same dispatchers, one autograd graph, no threads.

Each rank's dispatcher is a program that posts its part of an exchange and yields. When all have posted, results are
views of what was posted, concatenated: gradients need no second exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from moe_lab.config import check_int
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.capacity import drop_over_capacity
from moe_lab.layer.exchange import Log, Program
from moe_lab.layer.exchange_plan import ExchangePlan
from moe_lab.layer.moe import MoE
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import Routing
from moe_lab.parallel.wire import without_weights

T = TypeVar("T")


def lock_step(programs: Sequence[Program[T]]) -> list[T]:
    """Run one program a rank, each to its next wait, until all return.

    `RuntimeError` when some have returned and others still wait: on real ranks those would hang.
    """
    answers: list[Any] = [None] * len(programs)
    while True:
        pending, results = {}, {}
        for rank, program in enumerate(programs):
            try:
                pending[rank] = program.send(answers[rank])
            except StopIteration as stop:
                results[rank] = stop.value
        if not pending:
            return [results[rank] for rank in range(len(programs))]
        if results:
            raise RuntimeError(f"ranks {sorted(pending)} wait for an exchange that ranks {sorted(results)} never enter")
        answers = [pending[rank].wait() for rank in range(len(programs))]


class VirtualMesh:
    """The meeting place of `size` virtual ranks: the n-th call of every rank is one collective."""

    def __init__(self, size: int) -> None:
        check_int("size", size, 1)
        self.size = size
        self.calls: list[dict[int, Any]] = []
        self.exchanges = [VirtualExchange(self, rank) for rank in range(size)]

    def reset(self) -> None:
        """Forget past collectives."""
        self.calls.clear()
        for exchange in self.exchanges:
            exchange.calls = 0


class VirtualExchange:
    """One virtual rank's way to the others."""

    def __init__(self, mesh: VirtualMesh, rank: int) -> None:
        self.mesh, self.rank, self.size = mesh, rank, mesh.size
        self.calls = 0
        self.log = Log()

    def _post(self, value: Any, result: Callable[[list[Any]], Tensor]) -> _Posted:
        if self.calls == len(self.mesh.calls):
            self.mesh.calls.append({})
        call = self.mesh.calls[self.calls]
        call[self.rank] = value
        self.calls += 1
        return _Posted(call, self.size, result)

    def all_gather(self, counts_P: Tensor) -> _Posted:
        """(P,) integers of each rank -> (R, P), on the CPU."""
        return self._post(counts_P, lambda posted: torch.stack(posted).cpu())

    def all_reduce(self, counts_E: Tensor) -> _Posted:
        """The sum over ranks."""
        return self._post(counts_E.clone(), lambda posted: torch.stack(posted).sum(dim=0))

    def all_to_all(
        self, rows_SD: Tensor, send: list[int] | None, receive: list[int] | None, *, overlap: bool = False
    ) -> _Posted:
        """Rows to and from each rank, rank by rank; None for even splits."""
        self.log.note(rows_SD, send, self.size)
        if send is None:
            send = [len(rows_SD) // self.size] * self.size
        return self._post(rows_SD.split(send), partial(self._receive, receive=receive))

    def _receive(self, posted: list[tuple[Tensor, ...]], receive: list[int] | None) -> Tensor:
        segments = [segments[self.rank] for segments in posted]
        if receive is not None and [len(segment) for segment in segments] != receive:
            raise RuntimeError(f"rank {self.rank} expects {receive} rows, sent are {[len(s) for s in segments]}")
        received_SD = torch.cat(segments)
        if received_SD.requires_grad:  # on real ranks gradients travel the other way: counted, though nothing moves
            received_SD.register_hook(lambda grad_SD: self.log.note(grad_SD, receive, self.size))
        return received_SD


class _Posted:
    """A collective that one rank has entered."""

    def __init__(self, call: dict[int, Any], size: int, result: Callable[[list[Any]], Tensor]) -> None:
        self.call, self.size, self.result = call, size, result

    def wait(self) -> Tensor:
        """The result, once all ranks have entered; `RuntimeError` before."""
        absent = sorted(set(range(self.size)) - set(self.call))
        if absent:
            raise RuntimeError(f"ranks {absent} have not entered this exchange")
        return self.result([self.call[rank] for rank in range(self.size)])


class VirtualRanks:
    """A one-rank layer run as `ep` ranks that each bring their own tokens.

    Weights stay where they are: each rank's experts are slices of the layer's own, so that gradients land in the
    layer's parameters, summed over ranks. `layers`: a copy of the layer for each rank, whose router and shared
    experts are that rank's, so that their gradients stay apart. `placement` and `tokens_per_rank` as for
    `AllToAllTokenDispatcher`.
    """

    def __init__(
        self,
        moe: MoE,
        ep: int,
        *,
        layers: Sequence[MoE] | None = None,
        placement: Placement | None = None,
        tokens_per_rank: int | None = None,
    ) -> None:
        self.moe, self.ep = moe, ep
        self.layers = layers or [moe] * ep
        self.mesh = VirtualMesh(ep)
        self.dispatchers = [
            AllToAllTokenDispatcher(moe.config, exchange, placement=placement, tokens_per_rank=tokens_per_rank)
            for exchange in self.mesh.exchanges
        ]
        self.placement = self.dispatchers[0].placement
        self.local_experts = without_weights(moe.experts, self.placement.slots_per_rank)
        self.routings: list[Routing] = []
        self.plans: list[ExchangePlan] = []

    def __call__(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """One (T_r, D) input a rank -> one output of the same shape a rank.

        The routings and plans of the call are kept in `routings` and `plans`. `ValueError` for another number of
        inputs than ranks.
        """
        self._check(xs)
        moe = self.moe
        routings = [layer.router(x_TD, moe.expert_bias_E) for layer, x_TD in zip(self.layers, xs)]
        if moe.training:
            moe.tokens_per_expert_E += sum(routing.counts_E for routing in routings)
        if moe.config.capacity_factor is not None:
            routings = [drop_over_capacity(r, moe.config.capacity_factor, moe.config.drop_policy) for r in routings]
        self.routings = routings
        rows = [
            functional_call(self.local_experts, weights, (rows_RD, plan.ends_E))
            for rows_RD, plan, weights in zip(self.dispatch(xs, routings), self.plans, self._local_weights())
        ]
        return self.combine(rows, routings, xs)

    def dispatch(self, xs: Sequence[Tensor], routings: Sequence[Routing]) -> list[Tensor]:
        """The rows of each rank's experts. Plans are kept in `plans`."""
        self._check(xs)
        self.mesh.reset()
        dispatched = lock_step([d.dispatching(x_TD, r) for d, x_TD, r in zip(self.dispatchers, xs, routings)])
        self.mesh.reset()
        self.plans = [plan for _, plan in dispatched]
        return [rows_RD for rows_RD, _ in dispatched]

    def combine(
        self, rows: Sequence[Tensor], routings: Sequence[Routing], xs: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Expert outputs back to their tokens; with `xs`, the shared experts of those inputs, if any, are added."""
        experts = [layer.shared_experts for layer in self.layers]
        shared = [None if xs is None or e is None else partial(e, xs[rank]) for rank, e in enumerate(experts)]
        programs = zip(self.dispatchers, rows, routings, self.plans, shared)
        outs = lock_step([d.combining(rows_RD, r, plan, s) for d, rows_RD, r, plan, s in programs])
        self.mesh.reset()
        return outs

    def _check(self, xs: Sequence[Tensor]) -> None:
        if len(xs) != self.ep:
            raise ValueError(f"{len(xs)} inputs for ep={self.ep} ranks: one a rank")

    def _local_weights(self) -> list[dict[str, Tensor]]:
        """The weights in each rank's slots, by name."""
        local: list[dict[str, Tensor]] = [{} for _ in range(self.ep)]
        for name, weight in self.moe.experts.named_parameters():
            slots = torch.tensor(self.placement.expert_of_slot, device=weight.device)
            placed = weight if self.placement.is_identity else weight.index_select(0, slots)
            for weights, chunk in zip(local, placed.chunk(self.ep)):
                weights[name] = chunk
        return local
