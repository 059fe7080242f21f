"""Losses that even the load of experts or bound the router's logits. Pure functions of what a router said."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lab.layer.router import count


def switch_loss(
    scores_TE: Float[Tensor, "T E"],
    expert_ids_TK: Int[Tensor, "T K"],
    *,
    valid_T: Bool[Tensor, " T"] | None = None,
    sequence_T: Int[Tensor, " T"] | None = None,
    counts_E: Int[Tensor, " E"] | None = None,
) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e: 1 when probabilities are uniform, more when load and probability gather on experts.

    Switch Transformer (arXiv:2101.03961, equations 4 to 6), for K choices: f are shares of assignments, detached,
    and P the mean probability over all experts; scores are divided by their sum first, so that sigmoid scores
    count alike. No balancing bias, groups, norm or scale.

    Over the micro-batch; or, with `sequence_T` (a number from 0 of each token's sequence), of every sequence and
    then averaged (DeepSeek-V3, arXiv:2412.19437, section 2.1.2); or with `counts_E`, whose shares stand for f: the
    counts of the global batch, summed over ranks and accumulation (arXiv:2501.11873). Tokens that are not valid
    and dropped assignments count nowhere. Raises `ValueError` for both, and when no token is valid.
    """
    if sequence_T is not None and counts_E is not None:
        raise ValueError("sequence_T and counts_E are two ways to count: give one")
    num_experts = scores_TE.shape[1]
    keep_T = torch.ones(len(scores_TE), dtype=torch.bool, device=scores_TE.device) if valid_T is None else valid_T
    if not keep_T.any():
        raise ValueError("no token is valid: the loss of none is undefined")
    probs_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    if sequence_T is None:
        counts_E = count(expert_ids_TK[keep_T], num_experts) if counts_E is None else counts_E
        shares_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
        return num_experts * (shares_E * probs_TE[keep_T].mean(dim=0)).sum()
    sequence_t, inverse_t = sequence_T[keep_T].unique(return_inverse=True)
    sequences = len(sequence_t)
    ids_tK = expert_ids_TK[keep_T]
    cell_tK = torch.where(ids_tK < 0, -1, inverse_t[:, None] * num_experts + ids_tK)
    counts_BE = count(cell_tK, sequences * num_experts).view(sequences, num_experts).to(probs_TE.dtype)
    shares_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    sums_BE = probs_TE.new_zeros(sequences, num_experts).index_add(0, inverse_t, probs_TE[keep_T])
    mean_BE = sums_BE / inverse_t.bincount(minlength=sequences)[:, None]
    return num_experts * (shares_BE * mean_BE).sum(dim=1).mean()


def transformers_loss(
    logits_LTE: Sequence[Float[Tensor, "T E"]], top_k: int, *, valid_T: Bool[Tensor, " T"] | None = None
) -> Float[Tensor, ""]:
    """The auxiliary loss of transformers' models: layers pooled before the product, and K left out.

    E * sum_e f_e P_e with f the choices of an expert per token, so that it is K, not 1, in balance; softmax and
    plain top-k of the logits, whatever the model's router does (`load_balancing_loss_func`).
    """
    probs, chosen = [], []
    for logits_TE in logits_LTE:
        probs_TE = logits_TE.softmax(dim=-1)
        ids_TK = probs_TE.topk(top_k, dim=-1).indices
        probs.append(probs_TE if valid_T is None else probs_TE[valid_T])
        chosen.append(ids_TK if valid_T is None else ids_TK[valid_T])
    probs_NE = torch.cat(probs)
    if not len(probs_NE):
        raise ValueError("no token is valid: the loss of none is undefined")
    num_experts = probs_NE.shape[1]
    shares_E = count(torch.cat(chosen), num_experts).to(probs_NE.dtype) / len(probs_NE)
    return num_experts * (shares_E * probs_NE.mean(dim=0)).sum()


def z_loss(logits_TE: Float[Tensor, "T E"], *, valid_T: Bool[Tensor, " T"] | None = None) -> Float[Tensor, ""]:
    """Mean over valid tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    kept_TE = logits_TE if valid_T is None else logits_TE[valid_T]
    if not len(kept_TE):
        raise ValueError("no token is valid: the loss of none is undefined")
    return kept_TE.logsumexp(dim=-1).square().mean()
