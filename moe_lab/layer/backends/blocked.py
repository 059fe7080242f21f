"""The reference in blocks of a fixed number of rows: a row has the same bits whatever other rows its expert has."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float, Int32
from torch import Tensor

from moe_lab.kernels.blocks import fixed_elementwise, fixed_linear
from moe_lab.layer.backends.loop import each_expert
from moe_lab.layer.backends.weights import Weights


def blocked_experts(x_RD: Float[Tensor, "R D"], ends_E: Int32[Tensor, " E"], weights: Weights) -> Float[Tensor, "R D"]:
    """In any dtype. Needs the counts on the host. An expert's last block is filled up with zeros."""
    fixed = weights._replace(activation=partial(fixed_elementwise, weights.activation))
    return each_expert(x_RD, ends_E, fixed, linear=fixed_linear, backend="blocked")
