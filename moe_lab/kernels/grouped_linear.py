"""E matrix products over rows that lie sorted by expert, counts left on the device.

`torch.nn.functional.grouped_mm` as it is in bfloat16. Its fake knows no other dtype, so that float32 would not
compile: there it stands behind an op with a fake of its own. The bits are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _dense(rows: Tensor) -> Tensor:
    # None or one row counts as contiguous whatever its strides, which grouped_mm refuses.
    return rows.contiguous() if len(rows) > 1 else rows.clone(memory_format=torch.contiguous_format)


def _laid_out(weight_EIO: Tensor) -> Tensor:
    # grouped_mm wants rows or columns whole, a multiple of 16 bytes apart: weights that lie otherwise are copied.
    unit = 16 // weight_EIO.element_size()
    for weight in (weight_EIO, weight_EIO.mT):
        if weight.stride(-1) == 1 and weight.stride(-2) >= weight.shape[-1] and weight.stride(-2) % unit == 0:
            return weight_EIO
    return weight_EIO.contiguous()


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """(R, O): rows ends[e-1] .. ends[e] of x times weight[e] transposed. Accumulates in float32, rounds once."""
    if x_RI.dtype == torch.bfloat16:
        return F.grouped_mm(_dense(x_RI), _laid_out(weight_EOI.mT), offs=ends_E)
    return grouped_linear_op(x_RI, weight_EOI, ends_E)


@torch.library.custom_op("moe_lab::grouped_linear", mutates_args=())
def grouped_linear_op(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_linear` in any dtype that grouped_mm takes; gradients may have any strides."""
    return F.grouped_mm(_dense(x_RI), _laid_out(weight_EOI.mT), offs=ends_E)


@grouped_linear_op.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("moe_lab::grouped_linear_weight_grad", mutates_args=())
def grouped_linear_weight_grad(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """(E, O, I): each expert's grad transposed times its rows; exactly 0 for an expert without rows."""
    return F.grouped_mm(_dense(grad_RO).mT, _dense(x_RI), offs=ends_E)


@grouped_linear_weight_grad.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(ends_E.shape[0], grad_RO.shape[1], x_RI.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    grad_x_RI = grouped_linear_op(grad_RO, weight_EOI.mT, ends_E) if ctx.needs_input_grad[0] else None
    grad_weight_EOI = grouped_linear_weight_grad(grad_RO, x_RI, ends_E) if ctx.needs_input_grad[1] else None
    return grad_x_RI, grad_weight_EOI, None


grouped_linear_op.register_autograd(_backward, setup_context=_setup)
