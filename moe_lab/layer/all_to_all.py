"""Executing a plan over many ranks: pack -> exchange -> unpack, and for combine the mirror."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from moe_lab import fastpaths, phases
from moe_lab.config import MoEConfig
from moe_lab.kernels.strided import strided_rows
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.layer.exchange import Exchange, Program, finish
from moe_lab.layer.exchange_plan import (
    ExchangePlan,
    direct_reason,
    direct_refusal,
    forced_matrix,
    forced_order,
    make_plan,
    note_padding,
)
from moe_lab.layer.placement import Placement
from moe_lab.layer.plan import plan_local
from moe_lab.layer.router import Routing
from moe_lab.layer.splits import CountMatrix


class AllToAllTokenDispatcher(LocalTokenDispatcher):
    """Dispatch and combine where the experts are spread over the ranks of an exchange.

    Every rank calls `dispatch`, then `combine`, in the same order. `placement` says where experts live, block-wise
    by default. `tokens_per_rank` declares that every rank always brings that many tokens: with round-robin routing
    the splits are then known without gathering counts.

    Raises `ValueError` where experts do not divide over the ranks; in `dispatch`, before anything is sent, for bad
    ids, and for a number of tokens other than the declared one.
    """

    def __init__(
        self,
        config: MoEConfig,
        exchange: Exchange,
        *,
        placement: Placement | None = None,
        tokens_per_rank: int | None = None,
    ) -> None:
        super().__init__(
            config.num_experts,
            combine=config.combine,
            score_before_experts=config.score_before_experts,
            dropless=config.capacity_factor is None,
        )
        self.config = config
        self.exchange = exchange
        self.placement = placement or Placement.blockwise(config.num_experts, exchange.size)
        self.tokens_per_rank = tokens_per_rank
        if (self.placement.num_experts, self.placement.ep) != (config.num_experts, exchange.size):
            raise ValueError(
                f"placement is for {self.placement.num_experts} experts on {self.placement.ep} ranks: must be for "
                f"num_experts={config.num_experts} on ep={exchange.size}"
            )
        forced = config.router.force_load_balance == "round_robin"
        fixed = tokens_per_rank is not None and not self.placement.has_replicas and self.dropless
        self.analytic = forced and fixed
        self.direct = direct_reason(config, self.placement) if self.analytic else None

    @property
    def may_fuse(self) -> bool:
        """False: rows have to travel between dispatch and experts."""
        return False

    def dispatch(  # type: ignore[override]
        self, x_TD: Float[Tensor, "T D"], routing: Routing
    ) -> tuple[Float[Tensor, "R D"], ExchangePlan]:
        """The rows of this rank's experts, expert by expert, from all ranks, and the plan that brought them."""
        return finish(self.dispatching(x_TD, routing))

    def combine(  # type: ignore[override]
        self,
        rows_RD: Float[Tensor, "R D"],
        routing: Routing,
        plan: ExchangePlan,
        *,
        shared: Callable[[], Tensor] | None = None,
        x_TD: Float[Tensor, "T D"] | None = None,
    ) -> Float[Tensor, "T D"]:
        """Expert outputs sent home and summed into their tokens. `shared` runs while they travel and is added."""
        return finish(self.combining(rows_RD, routing, plan, shared, x_TD))

    def dispatching(self, x_TD: Tensor, routing: Routing) -> Program[tuple[Tensor, ExchangePlan]]:
        """`dispatch` as a program."""
        plan = yield from self.planning(routing)
        # No name for what is sent: its memory is free as soon as it has arrived, and unpacking takes it.
        received_SD = yield self.exchange.all_to_all(
            self.pack(x_TD, routing, plan), plan.send_splits, plan.receive_splits
        )
        return self.unpack(received_SD, plan), plan

    def combining(
        self,
        rows_RD: Tensor,
        routing: Routing,
        plan: ExchangePlan,
        shared: Callable[[], Tensor] | None = None,
        x_TD: Tensor | None = None,
    ) -> Program[Tensor]:
        """`combine` as a program."""
        overlap = shared is not None
        returning = self.exchange.all_to_all(
            self.repack(rows_RD, plan), plan.receive_splits, plan.send_splits, overlap=overlap
        )
        shared_TD = shared() if shared is not None else None
        returned_SD = yield returning
        if plan.send_padding is not None:
            with phases.phase("combine"):
                returned_SD = plan.send_padding.strip(returned_SD)
        return self.weigh(returned_SD, routing, plan.local, shared_TD, x_TD)

    def planning(self, routing: Routing) -> Program[ExchangePlan]:
        """The plan as a program: it waits for counts, unless they are known."""
        num_tokens, top_k = routing.expert_ids_TK.shape
        if self.tokens_per_rank not in (None, num_tokens):
            raise ValueError(f"this rank has {num_tokens} tokens: declared is tokens_per_rank={self.tokens_per_rank}")
        with phases.phase("plan"):
            if self.analytic and self.placement.is_identity:
                local = forced_order(num_tokens, top_k, self.num_experts, routing.expert_ids_TK.device)
            else:
                local = plan_local(
                    self.placement.slot_ids(routing.expert_ids_TK),
                    self.placement.num_slots,
                    counts_E=routing.counts_E if self.placement.is_identity else None,
                    dropless=self.dropless,
                )
        if self.analytic:
            counts = forced_matrix(num_tokens, self.config, self.placement)
            fastpaths.note("force_load_balance_dispatch", counts.reason)
        else:
            counts = CountMatrix(counts_RP=(yield self.exchange.all_gather(local.counts_E)))
        with phases.phase("plan"):
            return make_plan(self.exchange.rank, local, counts, routing.counts_E, config=self.config)

    def pack(self, x_TD: Tensor, routing: Routing, plan: ExchangePlan) -> Tensor:
        """Rows in the order they are sent, padded if the splits want it."""
        if self.direct is not None:
            fastpaths.note("direct_equal_split_dispatch", self.direct)
            with phases.phase("pack"):
                rows_RD = strided_rows(x_TD, plan.local.order_R, plan.local.position_TK, self.exchange.size)
        else:
            if self.analytic:
                fastpaths.note("direct_equal_split_skip", lambda: direct_refusal(self.config, self.placement) or "")
            rows_RD = self.gather(x_TD, routing, plan.local)
        note_padding(plan, self.config, analytic=self.analytic, direction="dispatch")
        with phases.phase("pack"):
            return rows_RD if plan.send_padding is None else plan.send_padding.pad(rows_RD)

    def unpack(self, received_SD: Tensor, plan: ExchangePlan) -> Tensor:
        """Received rows as the experts want them: expert by expert, padded to `pad_multiple`."""
        with phases.phase("unpack"):
            if plan.receive_padding is not None:
                received_SD = plan.receive_padding.strip(received_SD)
            rows_RD = plan.reorder.to_expert_major(received_SD)
            return rows_RD if plan.expert_padding is None else plan.expert_padding.pad(rows_RD)

    def repack(self, rows_RD: Tensor, plan: ExchangePlan) -> Tensor:
        """The mirror of `unpack`."""
        note_padding(plan, self.config, analytic=self.analytic, direction="combine")
        with phases.phase("unpermute"):
            if plan.expert_padding is not None:
                rows_RD = plan.expert_padding.strip(rows_RD)
            rows_RD = plan.reorder.to_rank_major(rows_RD)
            return rows_RD if plan.receive_padding is None else plan.receive_padding.pad(rows_RD)

    def sum_over_ranks(self, counts_E: Tensor) -> Tensor:
        """Counts summed over the mesh; every rank calls it."""
        return self.exchange.all_reduce(counts_E).wait()
