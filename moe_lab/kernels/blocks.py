"""Products and elementwise functions whose rows have the same bits whatever rows lie beside them.

Libraries choose by a product's sizes how it is computed: few rows may be a product of vectors, more rows other tiles,
and each adds in its own order. An elementwise loop of PyTorch on the CPU computes what does not fill its vectors by
another formula than the rest (silu, sigmoid, softplus), and so again at the ends of each thread's share. Here every
call has a fixed number of rows, the last one filled with zeros, so that only one kernel ever runs; within it all rows
are treated alike, which tests hold. The same bits, that is, on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = {"cpu": 32, "cuda": 1024}  # rows of every product
ALIGNED = 64  # bytes: some products read unaligned rows another way, and add in another order
SERIAL = 32768  # elements from which PyTorch's elementwise loops may use several threads on the CPU
VECTORS = 64  # elements in the longest step of such a loop; what is left at its end goes another way


def fixed_linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(R, O): `F.linear` in blocks of a fixed number of rows. The gradient of x keeps the promise too.

    Weights' gradients are sums over all rows: whatever else is in the batch is in them.
    """
    return fixed_linear_op(x_RI, weight_OI, bias_O)


@torch.library.custom_op("moe_lab::fixed_linear", mutates_args=())
def fixed_linear_op(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """`fixed_linear` as an op with a gradient."""
    return _product(x_RI, weight_OI.mT, bias_O)


def _product(x_RI: Tensor, weight_IO: Tensor, bias_O: Tensor | None = None) -> Tensor:
    size, x_RI = BLOCK[x_RI.device.type], x_RI.contiguous()
    blocks = -(-len(x_RI) // size)
    out_PO = x_RI.new_empty(blocks * size, weight_IO.shape[1])
    for x_BI, out_BO in zip(x_RI.split(size), out_PO.split(size)):
        x_BI = _whole(x_BI, size)
        if bias_O is None:
            torch.mm(x_BI, weight_IO, out=out_BO)
        else:
            torch.addmm(bias_O, x_BI, weight_IO, out=out_BO)
    return out_PO[: len(x_RI)]


def _whole(x_BI: Tensor, size: int) -> Tensor:
    """A block of `size` rows that all begin on the same kind of address: itself, or a copy."""
    inner, per_line = x_BI.shape[1], ALIGNED // x_BI.element_size()
    if len(x_BI) == size and x_BI.data_ptr() % ALIGNED == 0 and inner % per_line == 0:
        return x_BI
    return F.pad(x_BI, (0, -inner % per_line, 0, size - len(x_BI)))[:, :inner]


@fixed_linear_op.register_fake
def _(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("moe_lab::fixed_linear_input_grad", mutates_args=())
def fixed_linear_input_grad(grad_RO: Tensor, weight_OI: Tensor) -> Tensor:
    """(R, I): the gradient of x in blocks of a fixed number of rows."""
    return _product(grad_RO, weight_OI)


@fixed_linear_input_grad.register_fake
def _(grad_RO: Tensor, weight_OI: Tensor) -> Tensor:
    return grad_RO.new_empty(grad_RO.shape[0], weight_OI.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_RI, weight_OI, _ = inputs
    ctx.save_for_backward(x_RI, weight_OI)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, ...]:
    x_RI, weight_OI = ctx.saved_tensors
    for_x, for_weight, for_bias = ctx.needs_input_grad
    return (
        fixed_linear_input_grad(grad_RO, weight_OI) if for_x else None,
        grad_RO.mT @ x_RI if for_weight else None,
        grad_RO.sum(dim=0) if for_bias else None,
    )


fixed_linear_op.register_autograd(_backward, setup_context=_setup)


def fixed_elementwise(function: Callable[..., Tensor], *tensors_RF: Tensor) -> Tensor:
    """(R, F): `function` of tensors of that shape, elementwise or along rows, gradients as well.

    On CUDA elements are computed alike wherever they are. On the CPU a call takes rows that one thread goes through
    in whole vectors, or else a single row, whose elements are treated by their column.
    """
    num_rows, width = tensors_RF[0].shape
    if tensors_RF[0].device.type != "cpu" or not num_rows:
        return function(*tensors_RF)
    unit = vector_rows(width)
    size = max(1, SERIAL // (unit * width) * unit) if unit * width % VECTORS == 0 else 1
    padding = (0, 0, 0, -num_rows % unit)
    parts = zip(*(F.pad(tensor_RF, padding).split(size) for tensor_RF in tensors_RF))
    return torch.cat([function(*part) for part in parts])[:num_rows]


def vector_rows(width: int) -> int:
    """Rows that fill whole vectors on the CPU, to a multiple of which rows are padded; 1 where that is too many."""
    rows = VECTORS // math.gcd(width, VECTORS)
    return rows if rows * width <= SERIAL else 1
