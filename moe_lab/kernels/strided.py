"""Rows for round-robin routing with as many choices as a rank has experts: slices, no index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lab.kernels.rows import combine_gather


@torch.library.custom_op("moe_lab::strided_rows", mutates_args=())
def strided_rows(x_TD: Tensor, order_R: Tensor, position_TK: Tensor, num_ranks: int) -> Tensor:
    """What `gather_rows` gives where token t goes to all K experts of rank t mod `num_ranks`: x[r::num_ranks], K times.

    `order_R` and `position_TK` serve the gradient, which is that of `gather_rows`.
    """
    top_k = position_TK.shape[1]
    return torch.cat([x_TD[rank::num_ranks] for rank in range(num_ranks) for _ in range(top_k)])


@strided_rows.register_fake
def _(x_TD: Tensor, order_R: Tensor, position_TK: Tensor, num_ranks: int) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    return combine_gather(grad_RD, None, *ctx.saved_tensors), None, None, None


strided_rows.register_autograd(_backward, setup_context=_setup)
