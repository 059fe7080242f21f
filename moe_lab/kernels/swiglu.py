"""SwiGLU in Triton: the function inside the products, and its gradient with the gate's in one pass."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_lab.kernels.tiles import TileRows

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no instruction by name


@triton.jit
def silu(x):
    """SiLU for epilogues: x * sigmoid(x) = h + h * tanh(h) of h = x / 2.

    On a GPU tanh is one instruction with an error of at most 2^-11 (PTX ISA, `tanh.approx`), so 2^-12 |x| here, a
    sixteenth of what rounding x to bfloat16 may cost. An exponential and a reciprocal would keep the products waiting.
    """
    half = 0.5 * x
    if INTERPRETED:
        tanh = 2 * tl.sigmoid(x) - 1
    else:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, is_pure=True, pack=1)
    return half + half * tanh


class SwigluGrads(NamedTuple):
    """Gradients of the gate product, the up product and the gates; and hidden values times their row's gate."""

    gate_PF: Tensor
    up_PF: Tensor
    gates_TK: Tensor
    gated_PF: Tensor


def swiglu_backward(grad_PF: Tensor, gate_PF: Tensor, up_PF: Tensor, gates_TK: Tensor, rows: TileRows) -> SwigluGrads:
    """From the gradient of each row's hidden values *before* its gate: what the other gradients are made of.

    With h = silu(gate) * up and g the row's gate: dGate and dUp of g * grad; the gradient of g, which is <h, grad>;
    and g * h, the factor of the down product's weight gradient, which overwrites `grad_PF`. Float32 inside, one
    rounding each. Same as autograd of `silu(gate) * up` in PyTorch.
    """
    num_rows, hidden_dim = grad_PF.shape
    grad_gate_PF, grad_up_PF = torch.empty_like(gate_PF), torch.empty_like(up_PF)
    grad_gates_TK = torch.zeros_like(gates_TK)
    if num_rows:
        block = min(512, triton.next_power_of_2(hidden_dim))
        _swiglu_backward_kernel[(num_rows,)](
            grad_PF, gate_PF, up_PF, grad_gate_PF, grad_up_PF, gates_TK, grad_gates_TK,
            rows.order_P, rows.expert_M1, hidden_dim, rows.height, block,
            num_warps=max(1, block // 256),
        )  # fmt: skip
    return SwigluGrads(grad_gate_PF, grad_up_PF, grad_gates_TK, grad_PF)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, gates_ptr, grad_gates_ptr, order_ptr, expert_ptr,
    hidden_dim, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if tl.load(expert_ptr + row // HEIGHT) >= 0:
        pick = tl.load(order_ptr + row)
        weight = tl.load(gates_ptr + pick, mask=pick >= 0, other=0.0)
        dot = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, hidden_dim, BLOCK):
            col = first + tl.arange(0, BLOCK)
            at, mask = row * hidden_dim + col, col < hidden_dim
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            act = gate * sigmoid
            dot += grad * act * up
            grad *= weight
            dtype = grad_ptr.dtype.element_ty
            tl.store(grad_up_ptr + at, (grad * act).to(dtype), mask=mask)
            tl.store(grad_gate_ptr + at, (grad * up * sigmoid * (1 + gate - act)).to(dtype), mask=mask)
            tl.store(grad_ptr + at, (weight * act * up).to(dtype), mask=mask)
        tl.store(grad_gates_ptr + pick, tl.sum(dot), mask=pick >= 0)
