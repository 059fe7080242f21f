"""One layer's recorded logits under several choices, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lab.study.choice import Choice, rerouted
from moe_lab.study.load import Load
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.windows import window_loads
from moe_lab.view.text import Text, table


@dataclass(frozen=True, eq=False, repr=False)
class ChoiceComparison(Text):
    """One layer's recorded logits under several choices.

    `loads` over all tokens as one window; `kept_C` the share of recorded assignments that are still made;
    `top_gate_C` the mean share of a token's weight that its heaviest expert has.
    """

    names: tuple[str, ...]
    choices: tuple[Choice, ...]
    loads: tuple[Load, ...]
    kept_C: tuple[float, ...]
    top_gate_C: tuple[float, ...]

    def text(self) -> str:
        """One line a choice."""
        rows = [("", "max/mean", "95 % of chance", "cv", "dead", "kept", "heaviest gate", "choice")]
        for name, choice, load, kept, top in zip(
            self.names, self.choices, self.loads, self.kept_C, self.top_gate_C, strict=True
        ):
            low, high = (band.max_over_mean for band in (load.null.low, load.null.high))
            rows.append(
                (
                    name,
                    f"{load.metrics.max_over_mean:.2f}",
                    f"{low:.2f} - {high:.2f}",
                    f"{load.metrics.cv:.3f}",
                    f"{load.metrics.dead_experts:.0f}",
                    f"{100 * kept:.0f} %",
                    f"{100 * top:.0f} %",
                    str(choice),
                )
            )
        load = self.loads[0]
        where = f"open-loop · layer {load.layer} · {load.tokens:,} tokens · {load.domain} · one rank"
        return f"{where}\n{table(rows, left=(0, 7))}"


def compare_choices(
    trace: RoutingTrace, layer: int, choices: Mapping[str, Choice], *, domain: str | None = None
) -> ChoiceComparison:
    """Route one layer's recorded logits under each choice.

    Raises `ValueError` for a trace without logits and for settings that cannot choose.
    """
    part = trace.select(layer=layer, domain=domain)
    recorded_TE = _chosen(part.expert_ids_LTK[0].long(), part)
    loads, kept, top = [], [], []
    for choice in choices.values():
        routing = choice.route(part, layer)
        chosen_TE = _chosen(routing.expert_ids_TK, part)
        kept.append(float((recorded_TE & chosen_TE).sum() / recorded_TE.sum()))
        gates_TK = routing.gates_TK[part.valid_T]
        top.append(float((gates_TK.amax(dim=1) / gates_TK.sum(dim=1)).mean()))
        loads.append(window_loads(rerouted(part, choice), domain=domain).loads[0])
    return ChoiceComparison(tuple(choices), tuple(choices.values()), tuple(loads), tuple(kept), tuple(top))


def _chosen(ids_TK: Int[Tensor, "T K"], trace: RoutingTrace) -> Bool[Tensor, "T E"]:
    """Which experts each valid token has."""
    chosen_TE = torch.zeros(len(ids_TK), trace.num_experts + 1, dtype=torch.bool)
    chosen_TE.scatter_(1, torch.where(ids_TK < 0, trace.num_experts, ids_TK), True)
    return chosen_TE[:, :-1] & trace.valid_T[:, None]
