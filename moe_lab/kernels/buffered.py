"""Dispatch, experts and combine on a CPU, expert by expert, in buffers used again by every expert.

The rows of one expert are gathered and multiplied while they are in the cache; of all rows at once there are only the
experts' outputs, from which every token takes its sum. Sums over experts are float32 (float64 for float64), in slot
order, rounded once: the same bits on every run. Backward is written by hand in the same way. It never needs the
experts' outputs: a gate's gradient <y, dOut> is <hidden, dOut w2>.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.kernels import workspace


def buffered_experts(
    x_TD: Tensor, gates_TK: Tensor, order_R: Tensor, ends_E: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor
) -> Tensor:
    """(T, D): each token through its kept experts, w2(silu(w1 x) * (w3 x)), summed under its gates.

    `order_R`: the assignment t*K + k in each row, rows sorted by expert; `ends_E`: row after each expert's last.
    Raises `ValueError` away from the CPU.
    """
    if x_TD.device.type != "cpu":
        raise ValueError(f"backend='buffered' runs on the CPU, but x is on {x_TD.device}: choose 'fused' or 'grouped'")
    tensors = (x_TD, gates_TK, w1_EFD, w2_EDF, w3_EFD)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return buffered_forward(x_TD, gates_TK, order_R, ends_E, w1_EFD, w2_EDF, w3_EFD, save)[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _segments(ends_E: Tensor) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            yield expert, start, end
        start = end


def _largest(ends_E: Tensor) -> int:
    return int(ends_E.diff(prepend=ends_E.new_zeros(1)).max()) if ends_E.numel() else 0


def _buffers(like: Tensor, rows: int, *widths: int) -> list[Tensor]:
    return [like.new_empty(rows, width) for width in widths]


@torch.library.custom_op("moe_lab::buffered_experts", mutates_args=())
def buffered_forward(
    x_TD: Tensor,
    gates_TK: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and with `save` the gate and up products (R, F), which backward needs; else these are empty."""
    (_, dim), hidden_dim, num_rows = x_TD.shape, w1_EFD.shape[1], order_R.numel()
    most = _largest(ends_E)
    token_R = _tokens(order_R, gates_TK)
    gate_SF, up_SF = _buffers(x_TD, num_rows if save else most, hidden_dim, hidden_dim)
    (x_CD,) = _buffers(x_TD, most, dim)
    y_RD = _rows_and_zeros(x_TD, num_rows)
    w1_DF, w2_FD, w3_DF = (w.mT.unbind() for w in (w1_EFD, w2_EDF, w3_EFD))
    for expert, start, end in _segments(ends_E):
        rows = slice(start, end) if save else slice(0, end - start)
        x = torch.index_select(x_TD, 0, token_R[start:end], out=x_CD[: end - start])
        gate = torch.mm(x, w1_DF[expert], out=gate_SF[rows])
        up = torch.mm(x, w3_DF[expert], out=up_SF[rows])
        torch.mm(F.silu(gate).mul_(up), w2_FD[expert], out=y_RD[start:end])
    out_TD = _sum_rows(y_RD, _positions(order_R, gates_TK), gates_TK)
    if not save:
        gate_SF, up_SF = x_TD.new_empty(0, hidden_dim), x_TD.new_empty(0, hidden_dim)
    return out_TD, gate_SF, up_SF


@torch.library.custom_op("moe_lab::buffered_experts_backward", mutates_args=())
def buffered_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    gates_TK: Tensor,
    order_R: Tensor,
    ends_E: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the gates, w1, w2 and w3. Weights of an expert without rows get exactly 0."""
    (_, dim), hidden_dim, most = x_TD.shape, w1_EFD.shape[1], _largest(ends_E)
    token_R, weight_R1 = _tokens(order_R, gates_TK), gates_TK.reshape(-1)[order_R][:, None].to(x_TD.dtype)
    grad_gate_R = gates_TK.new_empty(order_R.numel())
    dw1_EFD, dw2_EDF, dw3_EFD = grads = [torch.empty(w.shape, dtype=w.dtype) for w in (w1_EFD, w2_EDF, w3_EFD)]
    _zero_empty(grads, ends_E)
    x_CD, grad_CD = _buffers(x_TD, most, dim, dim)
    silu_CF, hidden_CF, dhidden_CF, dup_CF = _buffers(x_TD, most, *[hidden_dim] * 4)
    dx_RD = _rows_and_zeros(x_TD, order_R.numel())
    for expert, start, end in _segments(ends_E):
        count, token, weight = end - start, token_R[start:end], weight_R1[start:end]
        x = torch.index_select(x_TD, 0, token, out=x_CD[:count])
        dy = torch.index_select(grad_TD, 0, token, out=grad_CD[:count])
        gate, up = gate_RF[start:end], up_RF[start:end]
        silu = torch.ops.aten.silu.out(gate, out=silu_CF[:count])
        hidden = torch.mul(silu, up, out=hidden_CF[:count])
        dhidden = torch.mm(dy, w2_EDF[expert], out=dhidden_CF[:count])  # before the gate's weight
        grad_gate_R[start:end] = (hidden * dhidden).sum(1, dtype=_wide(x_TD.dtype))
        torch.mm(dy.T, hidden.mul_(weight), out=dw2_EDF[expert])
        dhidden.mul_(weight)
        dup = torch.mul(dhidden, silu, out=dup_CF[:count])
        dgate = torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=silu)
        torch.mm(dgate.T, x, out=dw1_EFD[expert])
        torch.mm(dup.T, x, out=dw3_EFD[expert])
        torch.mm(dgate, w1_EFD[expert], out=dx_RD[start:end]).addmm_(dup, w3_EFD[expert])
    grad_gates_TK = gates_TK.new_zeros(gates_TK.shape)
    grad_gates_TK.view(-1)[order_R] = grad_gate_R
    return _sum_rows(dx_RD, _positions(order_R, gates_TK)), grad_gates_TK, dw1_EFD, dw2_EDF, dw3_EFD


def _tokens(order_R: Tensor, gates_TK: Tensor) -> Tensor:
    """The token of each row."""
    return order_R.div(gates_TK.shape[1], rounding_mode="floor")


def _positions(order_R: Tensor, gates_TK: Tensor) -> Tensor:
    """(T, K): the row of each assignment; of a dropped one the row after the last, which holds zeros."""
    num_rows = order_R.numel()
    position_N = order_R.new_full((gates_TK.numel(),), num_rows)
    position_N[order_R] = torch.arange(num_rows)
    return position_N.view(gates_TK.shape)


def _rows_and_zeros(like: Tensor, num_rows: int) -> Tensor:
    rows = workspace.take(like, num_rows + 1, like.shape[1])
    rows[num_rows] = 0
    return rows


def _sum_rows(rows_RD: Tensor, position_TK: Tensor, gates_TK: Tensor | None = None) -> Tensor:
    """(T, D): the K rows of each token under their gates, summed in float32 at least, rounded once."""
    dtype = rows_RD.dtype
    if dtype == _wide(dtype):
        weights = None if gates_TK is None else gates_TK.to(dtype)
        return F.embedding_bag(position_TK, rows_RD, per_sample_weights=weights, mode="sum")
    # embedding_bag would round gates to the rows' dtype.
    total_TD = torch.zeros(len(position_TK), rows_RD.shape[1])
    slot_TD = rows_RD.new_empty(total_TD.shape)
    for k, position_T in enumerate(position_TK.T):
        torch.index_select(rows_RD, 0, position_T, out=slot_TD)
        if gates_TK is None:
            total_TD.add_(slot_TD)
        else:
            total_TD.addcmul_(slot_TD, gates_TK[:, k : k + 1])
    return total_TD.to(dtype)


def _zero_empty(grads: list[Tensor], ends_E: Tensor) -> None:
    used = {expert for expert, _, _ in _segments(ends_E)}
    for expert in set(range(ends_E.numel())) - used:
        for grad in grads:
            grad[expert].zero_()


@buffered_forward.register_fake
def _(x_TD, gates_TK, order_R, ends_E, w1_EFD, w2_EDF, w3_EFD, save):
    rows = order_R.shape[0] if save else 0
    gate_RF, up_RF = (x_TD.new_empty(rows, w1_EFD.shape[1]) for _ in range(2))
    return x_TD.new_empty(x_TD.shape), gate_RF, up_RF


@buffered_backward.register_fake
def _(grad_TD, x_TD, gates_TK, order_R, ends_E, w1_EFD, w2_EDF, w3_EFD, gate_RF, up_RF):
    return tuple(t.new_empty(t.shape) for t in (x_TD, gates_TK, w1_EFD, w2_EDF, w3_EFD))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 8
    x, gates, w1, w2, w3 = buffered_backward(grad_TD.contiguous(), *ctx.saved_tensors)
    return x, gates, None, None, w1, w2, w3, None


buffered_forward.register_autograd(_backward, setup_context=_setup)
