"""Three grouped GEMMs, counts left on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from moe_lab.kernels.grouped_linear import grouped_linear
from moe_lab.layer.backends.weights import Weights


def refuse_grouped(dtype: torch.dtype, dim: int, hidden_dim: int) -> str | None:
    """Why `torch.nn.functional.grouped_mm` is not legal here, or None."""
    if dtype == torch.float64:
        return "backend='grouped' does not do float64: choose backend='loop'"
    for name, size in (("dim", dim), ("hidden_dim", hidden_dim)):
        if size * dtype.itemsize % 16:
            return (
                f"backend='grouped' needs rows of a multiple of 16 bytes, but {name}={size} in {dtype} makes "
                f"{size * dtype.itemsize}: choose backend='loop'"
            )
    return None


def grouped_experts(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """Raises `ValueError` in float64, and where D or F do not fill rows of a multiple of 16 bytes."""
    w1_EFD, w2_EDF, w3_EFD, biases, activation, _ = weights
    if reason := refuse_grouped(x_RD.dtype, *w2_EDF.shape[1:]):
        raise ValueError(reason)
    gate_RF, up_RF = grouped_linear(x_RD, w1_EFD, ends_E), grouped_linear(x_RD, w3_EFD, ends_E)
    if biases is None:
        return grouped_linear(activation(gate_RF, up_RF), w2_EDF, ends_E)
    b1_RF, b2_RD, b3_RF = (_bias_rows(bias_EO, ends_E, x_RD.shape[0]) for bias_EO in biases)
    return grouped_linear(activation(gate_RF + b1_RF, up_RF + b3_RF), w2_EDF, ends_E) + b2_RD


def _bias_rows(bias_EO: Tensor, ends_E: Tensor, num_rows: int) -> Tensor:
    """Each row's bias, as a grouped product with ones: its gradient sums in float32 and rounds once."""
    ones_R8 = bias_EO.new_ones(num_rows, 8)  # 16 bytes in the smallest dtype
    return grouped_linear(ones_R8, F.pad(bias_EO[..., None], (0, 7)), ends_E)
