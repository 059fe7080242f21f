"""Moving rows between tokens and assignments, deterministic in both directions.

`gather_rows` copies each assignment's token row; `combine_gather` sums each token's K rows under their gates.
Each is the other's gradient: with the permutation and its inverse at hand (`order_R` and `position_TK` of a
`DispatchPlan`), neither direction needs an atomic or a scatter, so two runs agree to the bit on any device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("moe_lab::gather_rows", mutates_args=())
def gather_rows(x_TD: Tensor, order_R: Tensor, position_TK: Tensor) -> Tensor:
    """Rows (R, D) = x[order // K], a copy of each assignment's token.

    The gradient of x[t] is the sum of its rows' gradients, as `combine_gather` sums.
    """
    return x_TD.index_select(0, _token(order_R, position_TK))


@torch.library.custom_op("moe_lab::combine_gather", mutates_args=())
def combine_gather(rows_RD: Tensor, gates_TK: Tensor | None, order_R: Tensor, position_TK: Tensor) -> Tensor:
    """Each token's K rows summed under its gates, (T, D); None weighs all by one. Dropped slots (-1) add nothing.

    Accumulates in float32 (float64 for float64 rows) in slot order k = 0..K-1 and rounds once to the rows'
    dtype, so the result does not depend on how experts were ordered. Gradients gather too:
    dRow = gate * dOut[token], rounded once, and dGate = <row, dOut[token]>, accumulated in float32.
    """
    return combine_gather_in_pytorch(rows_RD, gates_TK, order_R, position_TK)


def combine_gather_in_pytorch(rows_RD: Tensor, gates_TK: Tensor | None, order_R: Tensor, position_TK: Tensor) -> Tensor:
    """`combine_gather`, in one pass on a CPU, else a slot at a time."""
    num_tokens, top_k = position_TK.shape
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    if rows_RD.numel() == 0:
        return rows_RD.new_zeros(num_tokens, rows_RD.shape[1])
    dropless = position_TK.numel() == order_R.numel()
    if rows_RD.device.type == "cpu":
        return _combine_bags(rows_RD.to(wide), gates_TK, position_TK, dropless).to(rows_RD.dtype)
    out_TD = torch.zeros(num_tokens, rows_RD.shape[1], dtype=wide, device=rows_RD.device)
    for k in range(top_k):
        position_T = position_TK[:, k]
        picked_TD = rows_RD.index_select(0, position_T if dropless else position_T.clamp(min=0)).to(wide)
        if gates_TK is not None:
            picked_TD *= gates_TK[:, k, None]
        if not dropless:
            picked_TD.masked_fill_((position_T < 0)[:, None], 0)  # not a product: 0 * NaN is NaN
        out_TD += picked_TD
    return out_TD.to(rows_RD.dtype)


@combine_gather.register_kernel("cuda")
def _(rows_RD: Tensor, gates_TK: Tensor | None, order_R: Tensor, position_TK: Tensor) -> Tensor:
    if rows_RD.dtype == torch.float64 or rows_RD.numel() == 0:
        return combine_gather_in_pytorch(rows_RD, gates_TK, order_R, position_TK)
    from moe_lab.kernels import combine

    gates_TK = None if gates_TK is None else gates_TK.contiguous()
    return combine.sum_rows(rows_RD.contiguous(), gates_TK, position_TK.contiguous())


def _combine_bags(rows_RD: Tensor, gates_TK: Tensor | None, position_TK: Tensor, dropless: bool) -> Tensor:
    """`embedding_bag` is this very sum in one pass over the rows, where these are as wide as the gates."""
    weights_TK = torch.ones_like(position_TK, dtype=rows_RD.dtype) if gates_TK is None else gates_TK.to(rows_RD.dtype)
    if dropless:
        return F.embedding_bag(position_TK, rows_RD.contiguous(), mode="sum", per_sample_weights=weights_TK)
    kept_TK = position_TK >= 0
    starts_T = torch.zeros(len(position_TK), dtype=torch.int64)
    torch.cumsum(kept_TK[:-1].sum(dim=1), 0, out=starts_T[1:])
    return F.embedding_bag(
        position_TK[kept_TK], rows_RD.contiguous(), starts_T, mode="sum", per_sample_weights=weights_TK[kept_TK]
    )


@torch.library.custom_op("moe_lab::combine_gather_backward", mutates_args=())
def combine_gather_backward(
    grad_TD: Tensor, rows_RD: Tensor, gates_TK: Tensor, order_R: Tensor, position_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Row and gate gradients of `combine_gather`; dOut is gathered once for both."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    picked_RD = grad_TD.index_select(0, _token(order_R, position_TK)).to(wide)
    dot_R = torch.linalg.vecdot(rows_RD.to(wide), picked_RD).to(gates_TK.dtype)
    grad_gates_TK = gates_TK.new_zeros(gates_TK.shape)
    grad_gates_TK.view(-1)[order_R] = dot_R
    gate_R = gates_TK.reshape(-1).index_select(0, order_R)
    return picked_RD.mul_(gate_R[:, None]).to(rows_RD.dtype), grad_gates_TK


def _token(order_R: Tensor, position_TK: Tensor) -> Tensor:
    return order_R.div(position_TK.shape[1], rounding_mode="floor")


@gather_rows.register_fake
def _(x_TD: Tensor, order_R: Tensor, position_TK: Tensor) -> Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


@combine_gather.register_fake
def _(rows_RD: Tensor, gates_TK: Tensor | None, order_R: Tensor, position_TK: Tensor) -> Tensor:
    return rows_RD.new_empty(position_TK.shape[0], rows_RD.shape[1])


@combine_gather_backward.register_fake
def _(
    grad_TD: Tensor, rows_RD: Tensor, gates_TK: Tensor, order_R: Tensor, position_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return rows_RD.new_empty(rows_RD.shape), gates_TK.new_empty(gates_TK.shape)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gather_rows_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor | None, ...]:
    return combine_gather(grad_RD, None, *ctx.saved_tensors), None, None


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, gates_TK, order_R, position_TK = inputs
    # Without gates the row gradient needs no rows: keeping them would keep the experts' outputs alive.
    ctx.save_for_backward(None if gates_TK is None else rows_RD, gates_TK, order_R, position_TK)


def _combine_gather_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    rows_RD, gates_TK, order_R, position_TK = ctx.saved_tensors
    if gates_TK is None:
        return gather_rows(grad_TD, order_R, position_TK), None, None, None
    grads = combine_gather_backward(grad_TD, rows_RD, gates_TK, order_R, position_TK)
    return *grads, None, None


gather_rows.register_autograd(_gather_rows_backward, setup_context=_save_plan)
combine_gather.register_autograd(_combine_gather_backward, setup_context=_save_all)
