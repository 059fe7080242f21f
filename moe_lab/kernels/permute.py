"""Rows put in another order, with zero rows put in or left out. Its own gradient, by the inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("moe_lab::permute_rows", mutates_args=())
def permute_rows(rows_RD: Tensor, source_P: Tensor, target_R: Tensor) -> Tensor:
    """(P, D): row p is rows[source[p]], or zeros where source[p] is -1. Copies, no arithmetic.

    `target_R` is the inverse: row r goes to row target[r], or nowhere where that is -1. Only one of the two may
    hold -1: rows are padded or stripped, not both. So the gradient gathers too, with the two swapped, and rows
    that are left out, even NaN, reach neither the result nor the gradient.
    """
    if len(source_P) <= len(target_R):
        return rows_RD.index_select(0, source_P)
    return rows_RD.new_zeros(len(source_P), rows_RD.shape[1]).index_copy_(0, target_R, rows_RD)


@permute_rows.register_kernel("cuda")
def _(rows_RD: Tensor, source_P: Tensor, target_R: Tensor) -> Tensor:
    from moe_lab.kernels import combine

    return combine.gather_from(rows_RD.contiguous(), source_P)


@permute_rows.register_fake
def _(rows_RD: Tensor, source_P: Tensor, target_R: Tensor) -> Tensor:
    return rows_RD.new_empty(source_P.shape[0], rows_RD.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
    source_P, target_R = ctx.saved_tensors
    return permute_rows(grad_PD, target_R, source_P), None, None


permute_rows.register_autograd(_backward, setup_context=_setup)
