"""Dispatch, experts and combine on a CPU, expert by expert, in buffers used again by every expert.

The rows of one expert are gathered and multiplied while they are in the cache; of all rows at once there are only the
experts' outputs, from which every token takes its sum. Threads share the experts, unless one has more than a thread's
share of all rows. Sums over experts are float32 (float64 for float64), in slot order, rounded once: the same bits on
every run. Backward is written by hand in the same way. It never needs the experts' outputs: a gate's gradient
<y, dOut> is <hidden, dOut w2>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.kernels import crew
from moe_lab.kernels.bags import positions, rows_and_zeros, sum_bags, wide

FILL = 16
aten = torch.ops.aten


class Segment(NamedTuple):
    """The rows start .. end of one expert."""

    expert: int
    start: int
    end: int


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


def _segments(ends_E: Tensor) -> list[Segment]:
    """Experts with rows, those with most first."""
    ends = ends_E.tolist()
    segments = (Segment(expert, start, end) for expert, (start, end) in enumerate(zip([0, *ends], ends)))
    return sorted((s for s in segments if s.end > s.start), key=lambda s: s.start - s.end)


def _for_each(segments: list[Segment], work: Callable[[Iterator[Segment]], None]) -> None:
    """Threads share the experts; where one expert would keep a thread longer than the rest, they share products."""
    rows = [s.end - s.start for s in segments]
    if segments and rows[0] * torch.get_num_threads() <= sum(rows):
        crew.share(work, segments)
    else:
        work(iter(segments))


def _filled(rows: int, dtype: torch.dtype) -> int:
    """Rows that a product is given. In 16 bits the library compiles one for each number of rows: keep these few."""
    return -(-rows // FILL) * FILL if dtype.itemsize == 2 else rows


def _buffers(like: Tensor, segments: list[Segment], *widths: int) -> list[Tensor]:
    most = max((_filled(s.end - s.start, like.dtype) for s in segments), default=0)
    return [like.new_empty(most, width) for width in widths]


def _gathered(rows: Tensor, index: Tensor, out: Tensor) -> Tensor:
    """rows[index], and zeros up to a filled number of rows: what is computed from these is zero."""
    filled = _filled(len(index), rows.dtype)
    torch.index_select(rows, 0, index, out=out[: len(index)])
    out[len(index) : filled] = 0
    return out[:filled]


def _copied(rows: Tensor, out: Tensor) -> Tensor:
    """The same of rows that lie together; not copied where they need not be."""
    filled = _filled(len(rows), rows.dtype)
    if filled == len(rows):
        return rows
    out[: len(rows)] = rows
    out[len(rows) : filled] = 0
    return out[:filled]


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
    token_P, segments = F.pad(_tokens(order_R, gates_TK), (0, FILL)), _segments(ends_E)
    gate_SF, up_SF = (x_TD.new_empty(num_rows if save else 0, hidden_dim) for _ in range(2))
    y_RD = rows_and_zeros(x_TD, num_rows)
    w1_DF, w2_FD, w3_DF = (w.mT.unbind() for w in (w1_EFD, w2_EDF, w3_EFD))

    def work(mine: Iterator[Segment]) -> None:
        row_CD, gate_CF, up_CF = _buffers(x_TD, segments, dim, hidden_dim, hidden_dim)
        for expert, start, end in mine:
            rows = _filled(end - start, x_TD.dtype)  # filled up with any rows: what comes of them is not read
            y = y_RD[start:end]
            x = torch.index_select(x_TD, 0, token_P[start : start + rows], out=_place(y, row_CD[:rows]))
            gate = torch.mm(x, w1_DF[expert], out=gate_CF[:rows])
            up = torch.mm(x, w3_DF[expert], out=up_CF[:rows])
            if save:
                gate_SF[start:end], up_SF[start:end] = gate[: end - start], up[: end - start]
            hidden = aten.silu.out(gate, out=gate).mul_(up)
            _put(torch.mm(hidden, w2_FD[expert], out=x), y)

    _for_each(segments, work)
    return sum_bags(y_RD, positions(order_R, gates_TK), gates_TK).to(x_TD.dtype), gate_SF, up_SF


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
    (_, dim), hidden_dim, num_rows = x_TD.shape, w1_EFD.shape[1], order_R.numel()
    token_R, segments = _tokens(order_R, gates_TK), _segments(ends_E)
    weight_R1 = gates_TK.reshape(-1)[order_R][:, None].to(x_TD.dtype)
    grad_gate_R = gates_TK.new_empty(num_rows)
    dw1_EFD, dw2_EDF, dw3_EFD = grads = [torch.empty(w.shape, dtype=w.dtype) for w in (w1_EFD, w2_EDF, w3_EFD)]
    for expert in set(range(len(w1_EFD))) - {s.expert for s in segments}:
        for grad in grads:
            grad[expert].zero_()
    dx_RD = rows_and_zeros(x_TD, num_rows)

    def work(mine: Iterator[Segment]) -> None:
        row_CD, *buffers = _buffers(x_TD, segments, dim, *[hidden_dim] * 5)
        gate_CF, up_CF, silu_CF, hidden_CF, dhidden_CF = buffers
        for expert, start, end in mine:
            tokens, weight, rows = token_R[start:end], weight_R1[start:end], _place(dx_RD[start:end], row_CD)
            dy = _gathered(grad_TD, tokens, rows)
            gate, up = _copied(gate_RF[start:end], gate_CF), _copied(up_RF[start:end], up_CF)
            count, filled = end - start, slice(len(dy))
            silu = aten.silu.out(gate, out=silu_CF[filled])
            hidden = torch.mul(silu, up, out=hidden_CF[filled])
            dhidden = torch.mm(dy, w2_EDF[expert], out=dhidden_CF[filled])  # before the gate's weight
            hidden[:count].mul_(weight)
            torch.mm(dy.T, hidden, out=dw2_EDF[expert])
            products = torch.mul(silu, up, out=hidden).mul_(dhidden)
            grad_gate_R[start:end] = products[:count].sum(1, dtype=wide(x_TD.dtype))
            dhidden[:count].mul_(weight)
            dup = torch.mul(dhidden, silu, out=hidden)
            dgate = aten.silu_backward.grad_input(dhidden.mul_(up), gate, grad_input=silu)
            x = _gathered(x_TD, tokens, rows)  # where dy was
            torch.mm(dgate.T, x, out=dw1_EFD[expert])
            torch.mm(dup.T, x, out=dw3_EFD[expert])
            _put(torch.mm(dgate, w1_EFD[expert], out=x).addmm_(dup, w3_EFD[expert]), dx_RD[start:end])

    _for_each(segments, work)
    grad_gates_TK = gates_TK.new_zeros(gates_TK.shape)
    grad_gates_TK.view(-1)[order_R] = grad_gate_R
    dx_TD = sum_bags(dx_RD, positions(order_R, gates_TK)).to(x_TD.dtype)
    return dx_TD, grad_gates_TK, dw1_EFD, dw2_EDF, dw3_EFD


def _place(out: Tensor, buffer: Tensor) -> Tensor:
    """Where an expert's rows lie, before its products and after: in the output itself, if that is of their dtype."""
    return out if out.dtype == buffer.dtype else buffer


def _put(rows: Tensor, out: Tensor) -> None:
    """Out = rows, unless they lie there, without those that fill up."""
    if rows.dtype != out.dtype:
        out.copy_(rows[: len(out)])


def _tokens(order_R: Tensor, gates_TK: Tensor) -> Tensor:
    """The token of each row."""
    return order_R.div(gates_TK.shape[1], rounding_mode="floor")


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
