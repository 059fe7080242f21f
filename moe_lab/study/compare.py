"""Two routings of the same tokens side by side: recomputed, in another precision, another checkpoint's.

Choices differ first where the K-th and the next expert nearly tie, so each disagreement is held against the margin
between them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.layer.router import limit_groups, score
from moe_lab.study.compact import slices
from moe_lab.study.trace import RoutingTrace


class Agreement(NamedTuple):
    """How far two traces choose the same experts, by layer, over tokens valid in both.

    `assignments_L`: share of the first trace's assignments that are the second's too. `tokens_L`: share of tokens
    with the same set of experts. `gate_difference_L`: mean over tokens of half the sum over experts of
    |gate - gate|, where an expert that was not chosen has gate 0 (total variation, for gates that sum to 1); NaN
    without gates. `margin_same_L`, `margin_changed_L`: the median margin between the K-th and the next expert's
    score, in the first trace, of tokens whose set is the same and of those whose set changed; NaN without logits
    or such tokens.
    """

    assignments_L: Float[Tensor, " L"]
    tokens_L: Float[Tensor, " L"]
    gate_difference_L: Float[Tensor, " L"]
    margin_same_L: Float[Tensor, " L"]
    margin_changed_L: Float[Tensor, " L"]
    layers: tuple[int, ...]
    tokens: int

    def __repr__(self) -> str:
        lines = [f"{self.tokens:,} tokens", "layer  same experts  same sets  gates differ  margin same  margin changed"]
        for layer, *row in zip(self.layers, *(values_L.tolist() for values_L in self[:5])):
            lines.append("{:>5}  {:>12.4f}  {:>9.4f}  {:>12.4f}  {:>11.4f}  {:>14.4f}".format(layer, *row))
        return "\n".join(lines)


def agreement(first: RoutingTrace, second: RoutingTrace) -> Agreement:
    """Compare two traces of the same tokens and layers, which may be of different routers or precisions.

    Raises `ValueError` when documents, positions, layers, experts or K differ, or no token is valid in both.
    """
    for name in ("num_experts", "top_k"):
        if getattr(first, name) != getattr(second, name):
            raise ValueError(f"{name} of traces differ: {getattr(first, name)} and {getattr(second, name)}")
    if first.info.layers != second.info.layers:
        raise ValueError(f"layers of traces differ: {first.info.layers} and {second.info.layers}")
    same = first.num_tokens == second.num_tokens and torch.equal(first.position_T, second.position_T)
    if not same or not torch.equal(_document_length_T(first), _document_length_T(second)):
        raise ValueError("traces are not of the same tokens: their documents or positions differ")
    valid_T = first.valid_T & second.valid_T
    if not valid_T.any():
        raise ValueError("no token is valid in both traces: nothing to compare")
    rows = [_layer_agreement(first, second, i, valid_T) for i in range(first.num_layers)]
    shared_L, same_L, gates_L, kept_L, changed_L = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    return Agreement(shared_L, same_L, gates_L, kept_L, changed_L, first.info.layers, int(valid_T.sum()))


def reproduced(trace: RoutingTrace) -> Float[Tensor, " L"]:
    """By layer, the share of recorded assignments that the recorded logits lead to again.

    Below 1 when logits were kept in less precision than they were used in, when a bias or noise that moved the
    choice was not recorded, and when the trace's `RouterConfig` is not the router's. Ids are what ran.

    Raises `ValueError` for a trace without logits, or without valid tokens.
    """
    if trace.logits_LTE is None:
        raise ValueError("this trace has no logits_LTE: nothing to reproduce its ids from")
    if not trace.valid_T.any():
        raise ValueError("no token of the trace is valid: nothing to reproduce")
    same_L, kept_L = torch.zeros(2, trace.num_layers, dtype=torch.float64)
    for part in slices(trace.num_tokens):
        piece = trace.select(start=part.start, tokens=min(part.stop, trace.num_tokens) - part.start)
        for i, layer in enumerate(trace.info.layers):
            again_TK = piece.reroute(layer, trace.info.router, trace.top_k).expert_ids_TK
            ids_TK = torch.where(piece.valid_T[:, None], piece.expert_ids_LTK[i].long(), -1)
            same_L[i] += int(_shared(ids_TK, again_TK).sum())
            kept_L[i] += int((ids_TK >= 0).sum())
    return same_L / kept_L


def rounded(trace: RoutingTrace, dtype: torch.dtype) -> RoutingTrace:
    """The trace as its own router would have made it from logits that were rounded to `dtype`.

    What a server that keeps logits in bfloat16 or float8 does to the choice, all else equal: the logits that come
    out are those that were recorded, rounded. Scores are computed in float64, so that ties that rounding made are
    broken alike everywhere. Raises `ValueError` for a trace without logits.
    """
    if trace.logits_LTE is None:
        raise ValueError("this trace has no logits_LTE: nothing to round")
    logits = [logits_TE.to(dtype).double() for logits_TE in trace.logits_LTE]
    made = RoutingTrace.from_router_logits(
        logits, trace.info.router, trace.top_k, expert_bias_LE=trace.expert_bias_LE, layers=trace.info.layers
    )
    return made.unchecked(
        info=trace.info, document_T=trace.document_T, position_T=trace.position_T, valid_T=trace.valid_T
    )


def _document_length_T(trace: RoutingTrace) -> Tensor:
    return torch.tensor([document.length for document in trace.info.documents])[trace.document_T.long()]


def _shared(first_TK: Tensor, second_TK: Tensor) -> Tensor:
    """Which assignments of the first are the second's too; dropped ones are nobody's."""
    return ((first_TK[:, :, None] == second_TK[:, None, :]) & (first_TK[:, :, None] >= 0)).any(dim=2)


def _layer_agreement(first: RoutingTrace, second: RoutingTrace, i: int, valid_T: Tensor) -> tuple[float, ...]:
    shared, kept, difference = 0, 0, 0.0
    same, margin = [], []
    for part in slices(first.num_tokens):
        keep_T = valid_T[part]
        a_TK, b_TK = (trace.expert_ids_LTK[i, part][keep_T].long() for trace in (first, second))
        common_TK = _shared(a_TK, b_TK)
        shared += int(common_TK.sum())
        kept += int((a_TK >= 0).sum())
        same.append(common_TK.sum(dim=1) == torch.maximum((a_TK >= 0).sum(dim=1), (b_TK >= 0).sum(dim=1)))
        if first.gates_LTK is not None and second.gates_LTK is not None:
            dense = [
                torch.zeros(len(ids_TK), first.num_experts).scatter_add_(
                    1,
                    ids_TK.clamp(min=0),
                    trace.gates_LTK[i, part][keep_T].float(),  # type: ignore[index]
                )
                for trace, ids_TK in ((first, a_TK), (second, b_TK))
            ]
            difference += float((dense[0] - dense[1]).abs().sum(dtype=torch.float64)) / 2
        else:
            difference = float("nan")
        if first.logits_LTE is not None and first.top_k < first.num_experts:
            margin.append(_margin(first, i, first.logits_LTE[i, part][keep_T].float()))
    same_t = torch.cat(same)
    margin_t = torch.cat(margin) if margin else torch.full((len(same_t),), float("nan"))
    return (
        shared / max(kept, 1),
        float(same_t.double().mean()),
        difference / len(same_t),
        float(margin_t[same_t].median()) if same_t.any() else float("nan"),
        float(margin_t[~same_t].median()) if not same_t.all() else float("nan"),
    )


def _margin(trace: RoutingTrace, i: int, logits_TE: Tensor) -> Tensor:
    """The K-th best score less the next one's, as the router compares them: bias added, groups limited."""
    choice_TE = score(logits_TE, trace.info.router.score_func)
    if trace.expert_bias_LE is not None:
        choice_TE = choice_TE + trace.expert_bias_LE[i]
    best_TK = limit_groups(choice_TE, trace.info.router, trace.top_k).topk(trace.top_k + 1, dim=1).values
    return best_TK[:, -2] - best_TK[:, -1]
