"""What ranks run for tests of the benchmark over ranks."""

from typing import NamedTuple

from torch import Tensor

from moe_lab.jobs.ranks_inputs import Settings
from moe_lab.jobs.ranks_measure import Part
from moe_lab.layer.router import Routing


class Gradients(NamedTuple):
    """A rank's experts, tokens and routing, and the gradients of two steps, the second of which must be the first."""

    weights: list[Tensor]
    x_TD: Tensor
    routing: Routing
    gradients: list[Tensor]


def gradients(settings: Settings) -> Gradients:
    part = Part(settings)
    part.step()
    routing = part.routing._replace(gates_TK=part.routing.gates_TK.detach())
    return Gradients([w.detach() for w in part.moe.experts.parameters()], part.x_TD, routing, part.step())
