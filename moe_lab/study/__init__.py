"""Instruments that measure routing and never change what runs."""

from moe_lab.study.load import Imbalance, Load, imbalance
from moe_lab.study.metrics import (
    Interval,
    LoadImbalance,
    NullBand,
    document_bootstrap,
    load_imbalance,
    null_band,
)
from moe_lab.study.trace import Document, Recorder, RoutingTrace, TraceInfo, record

__all__ = [
    "Document",
    "Imbalance",
    "Interval",
    "Load",
    "LoadImbalance",
    "NullBand",
    "Recorder",
    "RoutingTrace",
    "TraceInfo",
    "document_bootstrap",
    "imbalance",
    "load_imbalance",
    "null_band",
    "record",
]
