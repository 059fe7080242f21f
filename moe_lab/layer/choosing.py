"""Who takes whom: a token its best experts, both sides evened by Sinkhorn, or an expert its best tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

SINKHORN_TOLERANCE = 1e-4
SINKHORN_ROUNDS = 10_000  # far more than logits of any trained router need


def stable_topk(values_TE: Float[Tensor, "T E"], k: int) -> Int[Tensor, "T k"]:
    """Indices of the k largest values of each row, largest first; of equal values the lowest index wins.

    `torch.topk` breaks ties arbitrarily, differently on CPU and CUDA. Here value and index form one integer
    key, so no two keys are equal: the order-preserving bits of the float32 above, the reversed index below.
    """
    if values_TE.dtype != torch.float32:
        return values_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    num_values = values_TE.shape[-1]
    bits_TE = (values_TE + 0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 the same bits
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE).long()
    index_E = torch.arange(num_values - 1, -1, -1, device=values_TE.device)
    key_TE = (ordered_TE << 32) | index_E
    return num_values - 1 - (key_TE.topk(k, dim=-1).values & 0xFFFFFFFF)


@torch.no_grad()
def sinkhorn(logits_TE: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """exp(logits) with rows and columns scaled until each token sums to 1 / T and each expert to 1 / E; float64.

    Sinkhorn and Knopp's iteration as Megatron-Core runs it (`moe_utils.sinkhorn`; S-BASE, arXiv:2202.01169): rows,
    then columns, until the columns' scales move by less than 1e-4 on average. On CUDA each round asks the device.
    """
    wide_TE = logits_TE.double()
    cost_TE = (wide_TE - wide_TE.amax(dim=1, keepdim=True)).exp()  # a row's scale is free, and this cannot overflow
    tokens, experts = cost_TE.shape
    row_T, column_E = cost_TE.new_ones(tokens), cost_TE.new_ones(experts)
    for _ in range(SINKHORN_ROUNDS):
        before_E = column_E
        row_T = 1 / (tokens * (cost_TE @ column_E + 1e-8))
        column_E = 1 / (experts * (row_T @ cost_TE + 1e-8))
        if (column_E - before_E).abs().mean() <= SINKHORN_TOLERANCE:
            break
    return row_T[:, None] * cost_TE * column_E


def expert_choice(scores_TE: Float[Tensor, "T E"], room: int) -> Int[Tensor, "T K"]:
    """Every expert takes its `room` best tokens, of equal ones the first (Zhou et al., arXiv:2202.09368, section 3).

    Each token's experts, best first; K is the most that any token got, and -1 stands where a token got fewer.
    An expert looks at all tokens to choose, so that a token's experts depend on later tokens.
    """
    tokens, experts = scores_TE.shape
    taken_TE = torch.zeros(experts, tokens, dtype=torch.bool, device=scores_TE.device)
    taken_TE = taken_TE.scatter_(1, stable_topk(scores_TE.T.contiguous(), min(room, tokens)), True).T
    most = max(1, int(taken_TE.sum(dim=1).max()))
    ids_TK = stable_topk(scores_TE.masked_fill(~taken_TE, -torch.inf), most)
    return ids_TK.masked_fill(~taken_TE.gather(1, ids_TK), -1)
