"""The routed part of a layer in few kernels: gather, products, SwiGLU and the weighted sum, forward and backward.

Two ops with gradients, so that autograd frees what each has saved as soon as it has run backward:
`fused_up` saves the tokens, `fused_down` the gate and up products. Rows, hidden values and outputs of experts are
never saved: backward gathers rows again and recomputes hidden values. Nothing waits for the host.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.kernels.tiles import TileRows


def fused_experts(
    x_TD: Float[Tensor, "T D"],
    gates_TK: Float[Tensor, "T K"],
    rows: TileRows,
    w1_EFD: Float[Tensor, "E F D"],
    w2_EDF: Float[Tensor, "E D F"],
    w3_EFD: Float[Tensor, "E F D"],
) -> Float[Tensor, "T D"]:
    """Each token through its K experts, w2(silu(w1 x) * (w3 x)), summed under its gates in float32.

    Raises `ValueError` where the kernels are not legal: away from CUDA (the Triton interpreter apart), float32 and
    float64 there, or D or F whose rows are not a multiple of 16 bytes.
    """
    _check(x_TD, w2_EDF)
    weights = (w1_EFD, w2_EDF, w3_EFD)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gates_TK, *weights))
    gate_up_2PF, hidden_PF = fused_up(x_TD, w1_EFD, w3_EFD, *rows, save)
    return fused_down(gate_up_2PF, hidden_PF, gates_TK, w2_EDF, *rows)


def _check(x_TD: Tensor, w2_EDF: Tensor) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x_TD.device.type != "cuda" and not interpreted:
        raise ValueError(f"backend='fused' needs CUDA, but x is on {x_TD.device}: choose 'grouped' or 'loop'")
    if x_TD.dtype not in (torch.bfloat16, torch.float16) and not (interpreted and x_TD.dtype == torch.float32):
        raise ValueError(
            f"backend='fused' computes in bfloat16 or float16, not {x_TD.dtype}: choose 'grouped' or 'loop'"
        )
    for name, size in (("dim", w2_EDF.shape[1]), ("hidden_dim", w2_EDF.shape[2])):
        if size * x_TD.element_size() % 16:
            raise ValueError(
                f"backend='fused' needs rows of a multiple of 16 bytes, but {name}={size} in {x_TD.dtype} makes "
                f"{size * x_TD.element_size()}: choose 'loop'"
            )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor as tensor maps want it: dense, on a 16-byte address."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@torch.library.custom_op("moe_lab::fused_up", mutates_args=())
def fused_up(
    x_TD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gate and up products (2, P, F), empty unless `save`, and hidden values (P, F), which carry no gradient."""
    from moe_lab.kernels import grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    return grouped_gemm.up(_aligned(x_TD), _aligned(w1_EFD), _aligned(w3_EFD), rows, save=save)


@torch.library.custom_op("moe_lab::fused_up_backward", mutates_args=())
def fused_up_backward(
    grad_gate_up_2PF: Tensor, x_TD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w1 and w3."""
    from moe_lab.kernels import combine, grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    grad_gate_up_2PF = _aligned(grad_gate_up_2PF)
    grad_PD = grouped_gemm.input_grad(grad_gate_up_2PF, _aligned(w1_EFD), _aligned(w3_EFD), rows)
    grad_TD = combine.combine(grad_PD, None, rows)
    del grad_PD
    x_PD = combine.gather(_aligned(x_TD), rows)
    grad_w1, grad_w3 = (grouped_gemm.weight_grad(grad_gate_up_2PF[i], x_PD, rows) for i in (0, 1))
    return grad_TD, grad_w1, grad_w3


@torch.library.custom_op("moe_lab::fused_down", mutates_args=())
def fused_down(
    gate_up_2PF: Tensor, hidden_PF: Tensor, gates_TK: Tensor, w2_EDF: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> Tensor:  # fmt: skip
    """(T, D): hidden values through w2, each token's K rows summed under its gates."""
    from moe_lab.kernels import combine, grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    rows_PD = grouped_gemm.rows_product(hidden_PF, _aligned(w2_EDF), rows, transposed=True)
    return combine.combine(rows_PD, gates_TK.contiguous(), rows)


@torch.library.custom_op("moe_lab::fused_down_backward", mutates_args=())
def fused_down_backward(
    grad_TD: Tensor, gate_up_2PF: Tensor, gates_TK: Tensor, w2_EDF: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the gate and up products, of the gates and of w2."""
    from moe_lab.kernels import combine, grouped_gemm, swiglu

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    grad_PD = combine.gather(_aligned(grad_TD), rows)
    grad_PF = grouped_gemm.rows_product(grad_PD, _aligned(w2_EDF), rows, transposed=False)
    grad_gate_up_2PF, grad_gates_TK, gated_PF = swiglu.swiglu_backward(
        grad_PF, gate_up_2PF, gates_TK.contiguous(), rows
    )
    grad_w2 = grouped_gemm.weight_grad(grad_PD, gated_PF, rows)
    return grad_gate_up_2PF, grad_gates_TK, grad_w2


@fused_up.register_fake
def _(x_TD, w1_EFD, w3_EFD, order_P, position_TK, starts_E1, expert_M1, save):
    num_rows, hidden_dim = order_P.shape[0], w1_EFD.shape[1]
    return x_TD.new_empty(2, num_rows if save else 0, hidden_dim), x_TD.new_empty(num_rows, hidden_dim)


@fused_up_backward.register_fake
def _(grad_gate_up_2PF, x_TD, w1_EFD, w3_EFD, *rows):
    return tuple(t.new_empty(t.shape) for t in (x_TD, w1_EFD, w3_EFD))


@fused_down.register_fake
def _(gate_up_2PF, hidden_PF, gates_TK, w2_EDF, *rows):
    return hidden_PF.new_empty(gates_TK.shape[0], w2_EDF.shape[1])


@fused_down_backward.register_fake
def _(grad_TD, gate_up_2PF, gates_TK, w2_EDF, *rows):
    return tuple(t.new_empty(t.shape) for t in (gate_up_2PF, gates_TK, w2_EDF))


def _setup_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # hidden values have none, and zeros of their size would be allocated
    ctx.save_for_backward(*inputs[:-1])


def _up_backward(ctx: Any, grad_gate_up_2PF: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_gate_up_2PF is None:
        return (None,) * 8
    return *fused_up_backward(grad_gate_up_2PF, *ctx.saved_tensors), *(None,) * 5


def _setup_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_up_2PF, _, *rest = inputs
    ctx.save_for_backward(gate_up_2PF, *rest)


def _down_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_gate_up_2PF, grad_gates_TK, grad_w2 = fused_down_backward(grad_TD, *ctx.saved_tensors)
    return grad_gate_up_2PF, None, grad_gates_TK, grad_w2, *(None,) * 4


fused_up.register_autograd(_up_backward, setup_context=_setup_up)
fused_down.register_autograd(_down_backward, setup_context=_setup_down)
