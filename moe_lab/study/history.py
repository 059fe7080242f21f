"""Routing over steps: how load moves, which experts die, how many choices change between checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.compare import agreement
from moe_lab.study.counts import CountsTrace
from moe_lab.study.load import Imbalance, Load, packing_order
from moe_lab.study.metrics import LoadImbalance, measure, null_band
from moe_lab.study.trace import RoutingTrace


class Trajectories(NamedTuple):
    """Every metric of load at every step and layer: `metrics_SLM`, M in the order of `LoadImbalance`.

    NaN where a step has no assignments.
    """

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    metrics_SLM: Float[Tensor, "S L M"]

    def metric(self, name: str) -> Float[Tensor, "S L"]:
        """One metric by the name of its field, such as "max_over_mean"."""
        if name not in LoadImbalance._fields:
            raise ValueError(f"metric={name!r} is not known: choose one of {', '.join(LoadImbalance._fields)}")
        return self.metrics_SLM[:, :, LoadImbalance._fields.index(name)]


class DeadExperts(NamedTuple):
    """Experts without assignments. `dead_SL`: how many, by step and layer. `longest_LE`: the longest run of steps
    in a row without any, by expert: one quiet step is chance, a long run is not."""

    dead_SL: Int[Tensor, "S L"]
    longest_LE: Int[Tensor, "L E"]


def window_counts(trace: RoutingTrace, tokens: int, *, shuffle: bool = True) -> CountsTrace:
    """A trace as counts over steps: each step the next `tokens` valid tokens, documents in a shuffled order.

    A rest is left out; `shuffle=False` keeps the recorded order. `ValueError` for fewer tokens than one step.
    """
    order_T = packing_order(trace) if shuffle else torch.arange(trace.num_tokens)
    order_T = order_T[trace.valid_T[order_T]]
    check_int("tokens", tokens, 1, len(order_T))
    steps = len(order_T) // tokens
    step_T = torch.full((trace.num_tokens,), -1)
    step_T[order_T[: steps * tokens]] = torch.arange(steps * tokens) // tokens
    counts_SLRE = trace.counts_by(step_T, steps).transpose(0, 1)[:, :, None].contiguous()
    return CountsTrace(counts_SLRE, tuple(range(steps)), trace.info.layers, (0,))


def step_counts(trace: RoutingTrace) -> CountsTrace:
    """A trace of a run as counts over the steps and ranks that its documents name.

    `ValueError` for documents without a step; those without a rank are rank 0's.
    """
    documents = [trace.info.documents[d] for d in trace.present_documents]
    if not documents or any(document.step is None for document in documents):
        raise ValueError("documents of this trace name no step: choose windows of it with window_counts")
    steps = sorted({document.step for document in documents if document.step is not None})
    ranks = sorted({document.rank or 0 for document in documents})
    cell_G = torch.full((len(trace.info.documents),), -1)
    for d in trace.present_documents:
        document = trace.info.documents[d]
        cell_G[d] = steps.index(document.step) * len(ranks) + ranks.index(document.rank or 0)  # type: ignore[arg-type]
    counts_LGE = trace.counts_by(cell_G[trace.document_T.long()], len(steps) * len(ranks))
    counts_SLRE = counts_LGE.unflatten(1, (len(steps), len(ranks))).transpose(0, 1).contiguous()
    return CountsTrace(counts_SLRE, tuple(steps), trace.info.layers, tuple(ranks))


def count_imbalance(counts: CountsTrace, top_k: int) -> Imbalance:
    """Load of every layer beside chance, as `imbalance` gives it for a trace: each step is a window.

    Over all ranks together, and of each rank by itself when there are several, which stand where domains do.
    Chance needs tokens: assignments of a step over `top_k`, which must be the same in every step and layer.

    Raises `ValueError` for counts of unequal steps: choose steps, or import ids.
    """
    check_int("top_k", top_k, 1, counts.num_experts)
    groups = [("all ranks", counts.counts_SLRE.sum(dim=2))]
    if len(counts.ranks) > 1:
        groups += [(f"rank {rank}", counts.counts_SLRE[:, :, r]) for r, rank in enumerate(counts.ranks)]
    loads, left_out = [], []
    for name, counts_SLE in groups:
        total_SL = counts_SLE.sum(dim=2)
        if int(total_SL.min()) != int(total_SL.max()) or not total_SL.any() or int(total_SL[0, 0]) % top_k:
            left_out.append(name)
            continue
        tokens = int(total_SL[0, 0]) // top_k
        null = null_band(tokens, top_k, counts.num_experts, windows=len(counts.steps))
        for layer, counts_SE in zip(counts.layers, counts_SLE.unbind(1)):
            metrics = LoadImbalance(*measure(counts_SE.numpy()).mean(axis=0).tolist())
            shares_E = counts_SE.sum(dim=0).double() / counts_SE.sum()
            loads.append(Load(layer, name, tokens, len(counts.steps), metrics, null, shares_E, 0))
    if not loads:
        raise ValueError(
            f"steps or layers differ in assignments, or they are no multiple of top_k={top_k}: no chance level"
        )
    return Imbalance(tuple(loads), None, tuple(left_out))


def trajectories(counts: CountsTrace) -> Trajectories:
    """The metrics of load over steps, of all ranks together."""
    counts_SLE = counts.counts_SLRE.sum(dim=2)
    some_SL = counts_SLE.sum(dim=2) > 0
    metrics_SLM = torch.full((*some_SL.shape, len(LoadImbalance._fields)), torch.nan, dtype=torch.float64)
    metrics_SLM[some_SL] = torch.from_numpy(measure(counts_SLE[some_SL].numpy()))
    return Trajectories(counts.steps, counts.layers, metrics_SLM)


def dead_experts(counts: CountsTrace) -> DeadExperts:
    """Which experts got nothing from any rank, when, and for how long."""
    dead_SLE = counts.counts_SLRE.sum(dim=2) == 0
    run_LE = torch.zeros(dead_SLE.shape[1:], dtype=torch.int64)
    longest_LE = run_LE.clone()
    for dead_LE in dead_SLE:
        run_LE = torch.where(dead_LE, run_LE + 1, 0)
        longest_LE = torch.maximum(longest_LE, run_LE)
    return DeadExperts(dead_SLE.sum(dim=2), longest_LE)


def chance_dead(num_tokens: int, top_k: int, num_experts: int) -> float:
    """Dead experts that uniform random routing leaves: E (1 - K / E)^T."""
    check_int("top_k", top_k, 1, num_experts)
    return num_experts * (1 - top_k / num_experts) ** num_tokens


def churn(traces: Sequence[RoutingTrace]) -> Float[Tensor, "S L"]:
    """By step from one trace to the next and layer, the share of assignments that the next one does not make.

    For checkpoints of one model over the same tokens. 0 when nothing changes, 1 - K / E between two independent
    uniform random routings. `ValueError` for fewer than two traces, or of different tokens.
    """
    if len(traces) < 2:
        raise ValueError(f"{len(traces)} traces: churn needs at least two, of the same tokens")
    return torch.stack([1 - agreement(before, after).assignments_L for before, after in pairwise(traces)])
