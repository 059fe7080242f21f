"""Keeping experts evenly used: the bias that needs no auxiliary loss."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def bias_delta(counts_E: Int[Tensor, " E"], coeff: float, *, centred: bool = True) -> Float[Tensor, " E"]:
    """Step of the balancing bias: coeff * sign(mean - count), float32.

    Loss-free balancing (Wang et al., arXiv:2408.15664, algorithm 1). `centred` subtracts the mean step, so that
    the bias keeps its sum (torchtitan); Megatron-Core does not. Once an optimizer step, counts summed over all
    data-parallel ranks. Hand-checked: counts [9, 0, 0], coeff 0.3 -> centred [-0.4, 0.2, 0.2].
    """
    counts_E = counts_E.double()
    delta_E = coeff * torch.sign(counts_E.mean() - counts_E)
    return (delta_E - delta_E.mean() if centred else delta_E).float()
