"""moe_lab: a Mixture-of-Experts layer you can see into.

Shape suffixes on tensors whose layout matters:
T tokens (or B batch, L sequence positions), D model dim, F expert hidden dim, E experts, K top-k, G groups,
e experts a group or rank, N = T*K assignments (assignment i = t*K + k), R rows (assignments that were not
dropped, sorted by expert). In traces, L is layers.
"""

from moe_lab import data, fastpaths
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.layer.experts import GroupedExperts
from moe_lab.layer.moe import MoE
from moe_lab.layer.plan import DispatchPlan
from moe_lab.layer.router import Routing, TokenChoiceTopKRouter
from moe_lab.study.trace import RoutingTrace, record

__all__ = [
    "DispatchPlan",
    "GroupedExperts",
    "LocalTokenDispatcher",
    "MoE",
    "MoEConfig",
    "RouterConfig",
    "Routing",
    "RoutingTrace",
    "TokenChoiceTopKRouter",
    "data",
    "fastpaths",
    "record",
]
