"""Instruments that measure routing and never change what runs."""

from moe_lab.study.compare import Agreement, agreement, reproduced, rounded
from moe_lab.study.counts import CountsTrace
from moe_lab.study.history import churn, count_imbalance, dead_experts, trajectories, window_counts
from moe_lab.study.importers import from_routed_experts
from moe_lab.study.load import Imbalance, Load, imbalance
from moe_lab.study.megatron import megatron_parts
from moe_lab.study.metrics import (
    Interval,
    LoadImbalance,
    NullBand,
    document_bootstrap,
    load_imbalance,
    null_band,
)
from moe_lab.study.ranks import RankLoad, rank_load
from moe_lab.study.structure import co_activation, specialisation, transition
from moe_lab.study.trace import Document, Recorder, RoutingTrace, TraceInfo, record
from moe_lab.study.writer import write_trace

__all__ = [
    "Agreement",
    "CountsTrace",
    "Document",
    "Imbalance",
    "Interval",
    "Load",
    "LoadImbalance",
    "NullBand",
    "RankLoad",
    "Recorder",
    "RoutingTrace",
    "TraceInfo",
    "agreement",
    "churn",
    "co_activation",
    "count_imbalance",
    "dead_experts",
    "document_bootstrap",
    "from_routed_experts",
    "imbalance",
    "load_imbalance",
    "megatron_parts",
    "null_band",
    "rank_load",
    "record",
    "reproduced",
    "rounded",
    "specialisation",
    "trajectories",
    "transition",
    "window_counts",
    "write_trace",
]
