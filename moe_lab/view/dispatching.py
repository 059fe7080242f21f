"""Dispatch drawn: every assignment as a line from its token to its row among its expert's."""

from __future__ import annotations

from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from moe_lab.layer.plan import DispatchPlan
from moe_lab.view import theme
from moe_lab.view.pictures import heading, inset
from moe_lab.view.text import Text, table
from moe_lab.view.theme import MUTED, SERIES, WIDTH


class PlanText(Text):
    """A plan as a table: what each row holds."""

    def __init__(self, plan: DispatchPlan) -> None:
        self.plan = plan

    def text(self) -> str:
        """Rows in order: expert, token, slot."""
        plan = self.plan
        expert_R = [e for e, count in enumerate(plan.counts_E.tolist()) for _ in range(count)]
        rows = [["row", *map(str, range(plan.num_rows))], ["expert", *map(str, expert_R)]]
        rows.append(["token", *map(str, plan.token_R.tolist())])
        rows.append(["slot", *(str(i % plan.top_k) for i in plan.order_R.tolist())])
        return table(rows)


def permutation(plan: DispatchPlan) -> Figure:
    """Assignments in token order above, in expert order below, coloured by expert."""
    with theme.style():
        drawn = theme.figure(WIDTH, 240)
        axes = inset(drawn, left=54, right=16, bottom=36, top=48)
        heading(axes, "Assignments to rows", f"{plan.num_tokens} tokens x {plan.top_k} · {plan.num_experts} experts")
        order = plan.order_R.tolist()
        expert_R = [e for e, count in enumerate(plan.counts_E.tolist()) for _ in range(count)]
        colours = [SERIES[e % len(SERIES)] for e in expert_R]
        lines = [((i, 1), (row, 0)) for row, i in enumerate(order)]
        axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.2))
        axes.scatter(order, [1] * len(order), c=colours, s=14, zorder=3)
        axes.scatter(range(len(order)), [0] * len(order), c=colours, s=14, zorder=3)
        for token in range(plan.num_tokens):
            axes.annotate(str(token), ((token + 0.5) * plan.top_k - 0.5, 1.12), ha="center", color=MUTED)
        start = 0
        for expert, count in enumerate(plan.counts_E.tolist()):
            if count:
                middle = (start + (count - 1) / 2, -0.22)
                axes.annotate(f"expert {expert}", middle, ha="center", color=SERIES[expert % len(SERIES)])
            start += count
        axes.set(xlim=(-0.8, plan.num_tokens * plan.top_k - 0.2), ylim=(-0.3, 1.25), xticks=[])
        axes.set_yticks([0, 1], ["rows", "tokens"])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.tick_params(length=0)
    return drawn
