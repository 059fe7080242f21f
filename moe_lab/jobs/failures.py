"""The wrong way, on purpose: short programs that fail as Mixture-of-Experts code is known to fail.

Each is what a notebook reproduces beside the layer's own way; nothing else may call them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import MoEConfig
from moe_lab.layer.moe import MoE
from moe_lab.parallel.wire import wire


def wrong_choice_per_rank(splits: list[list[int]]) -> str:
    """Rank function: a rank whose own splits are even skips the exchange of sizes. The others wait for it."""
    own = splits[dist.get_rank()]
    if len(set(own)) > 1:  # the mistake: peers decide from other splits, and so otherwise
        gathered = [torch.empty(len(own), dtype=torch.int64) for _ in splits]
        dist.all_gather(gathered, torch.tensor(own))
    rows = torch.zeros(max(map(max, splits)) * len(splits), 4)
    dist.all_to_all_single(torch.empty_like(rows), rows)
    return "done"


def wire_with_own_threshold(thresholds: list[float]) -> str:
    """Rank function: wire a layer whose threshold differs by rank, and say what it raised."""
    threshold = thresholds[dist.get_rank()]
    config = MoEConfig(dim=8, hidden_dim=8, num_experts=8, top_k=2)
    config = config.replace(equal_split="adaptive", equal_split_threshold=threshold)
    try:
        wire(MoE(config), dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "wired"


def wrong_scatter_add(shared_TD: Tensor, rows_RD: Tensor, token_R: Tensor) -> Tensor:
    """Adds into what the shared experts returned, whoever else may hold it."""
    return shared_TD.index_add_(0, token_R, rows_RD)


def wrong_tail(x_RD: Tensor, weight_EDO: Tensor, ends_E: Tensor) -> Tensor:
    """A grouped product over a buffer longer than its last expert's rows, all of it summed: (O,).

    What lies after the last offset is memory as it was. It is made NaN here, so that a leak shows.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        return F.grouped_mm(x_RD, weight_EDO, offs=ends_E).sum(dim=0)
    finally:
        torch.use_deterministic_algorithms(before)


def masked_tail(x_RD: Tensor, weight_EDO: Tensor, ends_E: Tensor) -> Tensor:
    """The same, reading only rows that some expert wrote."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        out_RO = F.grouped_mm(x_RD, weight_EDO, offs=ends_E)
    finally:
        torch.use_deterministic_algorithms(before)
    written_R1 = torch.arange(len(out_RO))[:, None] < ends_E[-1]
    return out_RO.where(written_R1, 0.0).sum(dim=0)  # not times 0: NaN times 0 is NaN


def wrong_counts(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """(E,) tokens of each expert by a boolean (T, E) map: an expert that a token has twice counts once."""
    map_TE = torch.zeros(len(expert_ids_TK), num_experts, dtype=torch.bool)
    return map_TE.scatter_(1, expert_ids_TK, True).sum(dim=0)


def expert_gradients(tokens: int, divide: bool) -> float:
    """Rank function: the norm of this rank's w1 gradient over that of one rank with all tokens.

    Every rank's loss is the mean over its own tokens, as data parallelism has it; experts get the gradients of all
    ranks' losses, summed. Without `divide` by the ranks they are as many times too large.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    one = MoE(MoEConfig(dim=8, hidden_dim=8, num_experts=8, top_k=2, backend="loop")).double()
    torch.manual_seed(0)
    layer = MoE(one.config).double()
    wire(layer, dist.group.WORLD)
    x_RTD = torch.randn(size, tokens, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one(x_RTD.flatten(0, 1)).square().sum(dim=-1).mean().backward()
    layer(x_RTD[rank]).square().sum(dim=-1).mean().backward()
    got, expected = layer.experts.w1_EFD.grad, one.experts.w1_EFD.grad
    assert got is not None
    assert expected is not None
    return float((got / size if divide else got).norm() / expected.chunk(size)[rank].norm())
