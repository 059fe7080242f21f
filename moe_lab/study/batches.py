"""Micro-batches of a trace as the ranks of one expert-parallel group see them: ids, and counts of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moe_lab.config import check_choice, check_int
from moe_lab.layer.placement import Placement
from moe_lab.layer.router import count
from moe_lab.layer.splits import CountMatrix
from moe_lab.study.load import packing_order
from moe_lab.study.trace import RoutingTrace


def count_matrix(expert_ids: Sequence[Tensor], placement: Placement) -> CountMatrix:
    """The counts of one micro-batch from each rank's expert ids. `ValueError` for another number of ranks."""
    if len(expert_ids) != placement.ep:
        raise ValueError(f"expert_ids of {len(expert_ids)} ranks: must be of ep={placement.ep}")
    counts = [count(placement.slot_ids(ids_TK.long()), placement.num_slots) for ids_TK in expert_ids]
    return CountMatrix(counts_RP=torch.stack(counts), reason="counted")


def micro_batches(
    trace: RoutingTrace, layer: int, ep: int, tokens_per_rank: int, *, shuffle: bool = True
) -> Iterator[list[Tensor]]:
    """Each rank's expert ids, one micro-batch after another, a rest left out.

    Documents are packed in a shuffled order, as training does; `shuffle=False` keeps the recorded order, whose
    runs of one domain put skew on ranks that no training run would see. `ValueError` for an unknown layer and
    when the trace does not fill one micro-batch.
    """
    check_choice("layer", layer, trace.info.layers)
    check_int("ep", ep, 1)
    check_int("tokens_per_rank", tokens_per_rank, 1)
    order_T = packing_order(trace) if shuffle else torch.arange(trace.num_tokens)
    order_T = order_T[trace.valid_T[order_T]]
    size = ep * tokens_per_rank
    if len(order_T) < size:
        raise ValueError(
            f"tokens_per_rank={tokens_per_rank} on ep={ep} ranks is {size:,} tokens: this trace has {len(order_T):,}"
        )
    ids_TK = trace.expert_ids_LTK[trace.info.layers.index(layer)]
    for start in range(0, len(order_T) - size + 1, size):
        yield list(ids_TK[order_T[start : start + size]].long().split(tokens_per_rank))
