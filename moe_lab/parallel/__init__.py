"""Experts spread over ranks: real ones (`wire`, `RankPool`) and virtual ones in one process (`VirtualRanks`)."""

from moe_lab.parallel.mesh import MeshExchange
from moe_lab.parallel.ranks import RankError, RankPool
from moe_lab.parallel.sequence import SequenceShard
from moe_lab.parallel.virtual import VirtualRanks
from moe_lab.parallel.wire import wire

__all__ = ["MeshExchange", "RankError", "RankPool", "SequenceShard", "VirtualRanks", "wire"]
