"""Dispatch, experts and combine on a CPU, expert by expert, in buffers used again by every expert.

The rows of one expert are gathered, multiplied and added to their tokens while they are in the cache; fresh memory,
whose page faults cost more than copying it, is only the output. Sums over experts are float32 (float64 for float64),
in expert order, rounded once: the same bits on every run. Backward is written by hand in the same way. It never needs
the experts' outputs: a gate's gradient <y, dOut> is <hidden, dOut w2>.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


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
    (_, dim), hidden_dim, most = x_TD.shape, w1_EFD.shape[1], _largest(ends_E)
    token_R, gate_R1 = _row_facts(x_TD, gates_TK, order_R)
    out_TD = torch.zeros(x_TD.shape, dtype=_wide(x_TD.dtype))
    gate_SF, up_SF = _buffers(x_TD, order_R.numel() if save else most, hidden_dim, hidden_dim)
    x_CD, y_CD, hidden_CF = _buffers(x_TD, most, dim, dim, hidden_dim)
    for expert, start, end in _segments(ends_E):
        count = end - start
        rows = slice(start, end) if save else slice(0, count)
        x = torch.index_select(x_TD, 0, token_R[start:end], out=x_CD[:count])
        gate = torch.mm(x, w1_EFD[expert].T, out=gate_SF[rows])
        up = torch.mm(x, w3_EFD[expert].T, out=up_SF[rows])
        hidden = torch.ops.aten.silu.out(gate, out=hidden_CF[:count]).mul_(up)
        y = torch.mm(hidden, w2_EDF[expert].T, out=y_CD[:count])
        out_TD.index_add_(0, token_R[start:end], y.to(out_TD.dtype).mul_(gate_R1[start:end]))
    if not save:
        gate_SF, up_SF = x_TD.new_empty(0, hidden_dim), x_TD.new_empty(0, hidden_dim)
    # An output may not be the buffer of another, nor an input: `to` copies only where the dtype differs.
    return out_TD.to(x_TD.dtype), gate_SF, up_SF


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
    token_R, gate_R1 = _row_facts(x_TD, gates_TK, order_R)
    grad_x_TD = torch.zeros(x_TD.shape, dtype=_wide(x_TD.dtype))
    grad_gate_R = gates_TK.new_empty(order_R.numel())
    grads = [torch.empty(w.shape, dtype=w.dtype) for w in (w1_EFD, w2_EDF, w3_EFD)]
    _zero_empty(grads, ends_E)
    x_CD, grad_CD, dx_CD = _buffers(x_TD, most, dim, dim, dim)
    silu_CF, hidden_CF, dhidden_CF, dup_CF = _buffers(x_TD, most, *[hidden_dim] * 4)
    for expert, start, end in _segments(ends_E):
        count, token = end - start, token_R[start:end]
        weight = gate_R1[start:end].to(x_TD.dtype)
        x = torch.index_select(x_TD, 0, token, out=x_CD[:count])
        dy = torch.index_select(grad_TD, 0, token, out=grad_CD[:count])
        gate, up = gate_RF[start:end], up_RF[start:end]
        silu = torch.ops.aten.silu.out(gate, out=silu_CF[:count])
        hidden = torch.mul(silu, up, out=hidden_CF[:count])
        dhidden = torch.mm(dy, w2_EDF[expert], out=dhidden_CF[:count])  # before the gate's weight
        wide = grad_x_TD.dtype
        grad_gate_R[start:end] = torch.linalg.vecdot(hidden.to(wide), dhidden.to(wide))
        torch.mm(dy.T, hidden.mul_(weight), out=grads[1][expert])
        dhidden.mul_(weight)
        dup = torch.mul(dhidden, silu, out=dup_CF[:count])
        torch.ops.aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=silu)
        torch.mm(silu.T, x, out=grads[0][expert])
        torch.mm(dup.T, x, out=grads[2][expert])
        dx = torch.mm(silu, w1_EFD[expert], out=dx_CD[:count])
        dx.addmm_(dup, w3_EFD[expert])
        grad_x_TD.index_add_(0, token, dx.to(wide))
    grad_gates_TK = gates_TK.new_zeros(gates_TK.shape)
    grad_gates_TK.view(-1)[order_R] = grad_gate_R
    return grad_x_TD.to(x_TD.dtype), grad_gates_TK, grads[0], grads[1], grads[2]


def _row_facts(x_TD: Tensor, gates_TK: Tensor, order_R: Tensor) -> tuple[Tensor, Tensor]:
    gate_R1 = gates_TK.reshape(-1)[order_R][:, None].to(_wide(x_TD.dtype))
    return order_R.div(gates_TK.shape[1], rounding_mode="floor"), gate_R1


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
