"""Which experts go together: in one token, from layer to layer, and with the kind of text."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.compact import slices
from moe_lab.study.trace import RoutingTrace


class CoActivation(NamedTuple):
    """Pairs of experts that one token chooses.

    `counts_EE`: tokens that chose both, each token's own choices on the diagonal. `lift_EE`: how much more often
    than experts with the same loads would meet by chance; NaN on the diagonal and where an expert has no tokens.
    """

    counts_EE: Int[Tensor, "E E"]
    lift_EE: Float[Tensor, "E E"]


def co_activation(trace: RoutingTrace, layer: int) -> CoActivation:
    """Count pairs of experts in one layer, over valid tokens.

    lift = n_ij T / (n_i n_j) over its value for uniform random choices of K of E, which is not 1 because a token
    takes no expert twice: (K - 1) E / (K (E - 1)). Chance is therefore 1 whatever K.

    Raises `ValueError` for a layer that was not recorded, K = 1, and a trace without valid tokens.
    """
    check_int("top_k", trace.top_k, 2)
    part, experts = trace.layer(layer), trace.num_experts
    tokens = int(trace.valid_T.sum())
    if not tokens:
        raise ValueError("no token of the trace is valid: there are no pairs")
    counts_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for piece in slices(trace.num_tokens):
        chosen_TE = _chosen(part, piece)
        counts_EE += chosen_TE.T @ chosen_TE
    load_E = counts_EE.diagonal()
    chance = (trace.top_k - 1) * experts / (trace.top_k * (experts - 1))
    lift_EE = counts_EE * tokens / (load_E[:, None] * load_E) / chance
    lift_EE.fill_diagonal_(math.nan)
    lift_EE[(load_E == 0)[:, None] | (load_E == 0)] = math.nan
    return CoActivation(counts_EE.long(), lift_EE)


def transition(trace: RoutingTrace, layer: int, to: int) -> Float[Tensor, "E E"]:
    """Where the tokens of an expert of one layer go in another: rows are shares of their choices there.

    Row i: of all choices in layer `to` of the tokens that chose expert i in layer `layer`, the share of each
    expert; NaN for an expert without tokens. Chance is every row equal to the load of layer `to`.
    """
    pairs_EE = torch.zeros(trace.num_experts, trace.num_experts, dtype=torch.float64)
    first, second = trace.layer(layer), trace.layer(to)
    for piece in slices(trace.num_tokens):
        pairs_EE += _chosen(first, piece).T @ _chosen(second, piece)
    return pairs_EE / pairs_EE.sum(dim=1, keepdim=True)


class Specialisation(NamedTuple):
    """By layer, the share of what a domain's name tells that one chosen expert tells too.

    `share_L` is I(domain; expert) / H(domain) over assignments, 0 for none and 1 for experts that each know one
    domain. `chance_L` and `high_L`: mean and upper end of the 95 % band when documents get each other's domains.
    """

    share_L: Float[Tensor, " L"]
    chance_L: Float[Tensor, " L"]
    high_L: Float[Tensor, " L"]


def specialisation(trace: RoutingTrace, *, shuffles: int = 200) -> Specialisation:
    """How far experts tell domains apart, and how far they would by chance.

    Whole documents are relabelled for the chance level, because the tokens of one are alike: two documents always
    differ a little. Fixed seed. Raises `ValueError` with fewer than two domains, or when layers dropped all.
    """
    check_int("shuffles", shuffles, 40)
    if len(trace.domains) < 2:
        raise ValueError(f"this trace has only the domain {trace.domains}: specialisation needs two")
    documents = len(trace.info.documents)
    counts_LGE = trace.counts_by(trace.document_T, documents)
    present_G = counts_LGE.sum(dim=(0, 2)) > 0
    counts_LGE = counts_LGE[:, present_G].double()
    if not counts_LGE.sum(dim=(1, 2)).all():
        raise ValueError("a layer dropped every assignment: it has no experts to tell anything")
    names = list(trace.domains)
    of_document = [document.domain for document in trace.info.documents]
    domain_G = torch.tensor([names.index(d) for d, p in zip(of_document, present_G.tolist()) if p])
    rng = np.random.default_rng(0)
    drawn_NL = torch.stack(
        [_told(counts_LGE, domain_G[torch.from_numpy(rng.permutation(len(domain_G)))]) for _ in range(shuffles)]
    )
    return Specialisation(_told(counts_LGE, domain_G), drawn_NL.mean(dim=0), drawn_NL.quantile(0.975, dim=0))


def _told(counts_LGE: Tensor, domain_G: Tensor) -> Tensor:
    """I(domain; expert) / H(domain) of every layer."""
    domains = int(domain_G.max()) + 1
    joint_LDE = counts_LGE.new_zeros(len(counts_LGE), domains, counts_LGE.shape[2]).index_add_(1, domain_G, counts_LGE)
    joint_LDE = joint_LDE / joint_LDE.sum(dim=(1, 2), keepdim=True)
    entropy = lambda p, dims: -torch.special.xlogy(p, p).sum(dim=dims)  # noqa: E731
    domain_L = entropy(joint_LDE.sum(dim=2), 1)
    expert_L = entropy(joint_LDE.sum(dim=1), 1)
    return (domain_L + expert_L - entropy(joint_LDE, (1, 2))) / domain_L


def _chosen(part: RoutingTrace, piece: slice) -> Tensor:
    """1 where a valid token chose an expert, (T, E) float64, of the one layer of `part`."""
    ids_TK = part.expert_ids_LTK[0, piece].long()
    kept_TK = (ids_TK >= 0) & part.valid_T[piece, None]
    chosen_TE = torch.zeros(len(ids_TK), part.num_experts, dtype=torch.float64)
    return chosen_TE.scatter_reduce_(1, ids_TK.clamp(min=0), kept_TK.double(), "amax")
