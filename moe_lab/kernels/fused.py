"""The routed part of a layer in few kernels: sort, gather, products, SwiGLU and the weighted sum, forward and backward.

Without gradients it is one op, `fused_forward`, since each costs the host as much as a launch. With them it is several,
so that autograd frees what each has saved or been given as soon as it has run backward: `fused_up` saves the tokens,
`fused_down` the gate and up products. Rows, hidden values and outputs of experts are never saved: backward gathers rows
again and recomputes hidden values. Nothing waits for the host.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lab.kernels.tiles import TileRows, tile_height, tile_rows

ANCHORED = 2048  # hidden width from which a second gather, 140 / F of a product, is a fair price for less memory


def fused_experts(
    x_TD: Float[Tensor, "T D"],
    gates_TK: Float[Tensor, "T K"],
    expert_ids_TK: Int[Tensor, "T K"],
    w1_EFD: Float[Tensor, "E F D"],
    w2_EDF: Float[Tensor, "E D F"],
    w3_EFD: Float[Tensor, "E F D"],
) -> Float[Tensor, "T D"]:
    """Each token through its K experts, w2(silu(w1 x) * (w3 x)), summed under its gates in float32.

    An id of -1 adds nothing. A token's bits do not depend on the rest of the batch, nor on whether gradients are kept.
    Raises `ValueError` where the kernels are not legal: away from CUDA (the Triton interpreter apart), float32 and
    float64 there, or D or F whose rows are not a multiple of 16 bytes.
    """
    _check(x_TD, w2_EDF)
    weights = (w1_EFD, w2_EDF, w3_EFD)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, gates_TK, *weights))):
        return fused_forward(x_TD, gates_TK, expert_ids_TK, *weights)
    rows = tile_rows(expert_ids_TK, len(w1_EFD))
    anchor_PF = fused_anchor(x_TD, w1_EFD, *rows) if w1_EFD.shape[1] >= ANCHORED else None
    gate_PF, up_PF, hidden_PF = fused_up(x_TD, w1_EFD, w3_EFD, anchor_PF, *rows)
    return fused_down(gate_PF, up_PF, hidden_PF, gates_TK, w2_EDF, *rows)


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


@torch.library.custom_op("moe_lab::fused_forward", mutates_args=())
def fused_forward(
    x_TD: Tensor, gates_TK: Tensor, expert_ids_TK: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor
) -> Tensor:
    """All of it, (T, D), to no gradient."""
    from moe_lab.kernels import combine, grouped_gemm, sort

    num_experts = len(w1_EFD)
    height = tile_height(expert_ids_TK.numel(), num_experts)
    rows = TileRows(*sort.tile_rows(expert_ids_TK, num_experts, height))
    *_, hidden_PF = grouped_gemm.up(_aligned(x_TD), _aligned(w1_EFD), _aligned(w3_EFD), rows, save=False)
    rows_PD = grouped_gemm.rows_product(hidden_PF, _aligned(w2_EDF), rows, transposed=True)
    return combine.combine(rows_PD, gates_TK.contiguous(), rows)


@torch.library.custom_op("moe_lab::fused_anchor", mutates_args=())
def fused_anchor(
    x_TD: Tensor, w1_EFD: Tensor, order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor
) -> Tensor:  # fmt: skip
    """A node for the gradient of w1 alone, (P, F) without memory: what comes back to it is the gate's gradient.

    Backward of `fused_up` ends before it begins, so the gradient of the up product is freed before that of w1 is
    made: wide layers peak there.
    """
    return w1_EFD.new_empty(1).expand(order_P.shape[0], w1_EFD.shape[1])


@torch.library.custom_op("moe_lab::fused_up", mutates_args=())
def fused_up(
    x_TD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, anchor_PF: Tensor | None,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gate and up products and hidden values, (P, F); the last carry no gradient.

    With an anchor, the gradient of w1 is its affair.
    """
    from moe_lab.kernels import grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    return grouped_gemm.up(_aligned(x_TD), _aligned(w1_EFD), _aligned(w3_EFD), rows, save=True)


@torch.library.custom_op("moe_lab::fused_input_grad", mutates_args=())
def fused_input_grad(
    grad_gate_PF: Tensor, grad_up_PF: Tensor, w1_EFD: Tensor, w3_EFD: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> Tensor:  # fmt: skip
    """Gradient of x, (T, D), from those of the gate and up products."""
    from moe_lab.kernels import combine, grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    grads = _aligned(grad_gate_PF), _aligned(grad_up_PF)
    return combine.combine(grouped_gemm.input_grad(*grads, _aligned(w1_EFD), _aligned(w3_EFD), rows), None, rows)


@torch.library.custom_op("moe_lab::fused_weight_grads", mutates_args=())
def fused_weight_grads(
    x_TD: Tensor, grads_PF: Sequence[Tensor],
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> list[Tensor]:  # fmt: skip
    """The weight gradient (E, F, D) of each product of x, from the product's own; rows are gathered once for all."""
    from moe_lab.kernels import combine, grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    x_PD = combine.gather(_aligned(x_TD), rows)
    return [grouped_gemm.weight_grad(_aligned(grad_PF), x_PD, rows) for grad_PF in grads_PF]


@torch.library.custom_op("moe_lab::fused_down", mutates_args=())
def fused_down(
    gate_PF: Tensor, up_PF: Tensor, hidden_PF: Tensor, gates_TK: Tensor, w2_EDF: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> Tensor:  # fmt: skip
    """(T, D): hidden values through w2, each token's K rows summed under its gates."""
    from moe_lab.kernels import combine, grouped_gemm

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    rows_PD = grouped_gemm.rows_product(hidden_PF, _aligned(w2_EDF), rows, transposed=True)
    return combine.combine(rows_PD, gates_TK.contiguous(), rows)


@torch.library.custom_op("moe_lab::fused_down_backward", mutates_args=())
def fused_down_backward(
    grad_TD: Tensor, gate_PF: Tensor, up_PF: Tensor, gates_TK: Tensor, w2_EDF: Tensor,
    order_P: Tensor, position_TK: Tensor, starts_E1: Tensor, expert_M1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the gate product, the up product, the gates and w2."""
    from moe_lab.kernels import combine, grouped_gemm, swiglu

    rows = TileRows(order_P, position_TK, starts_E1, expert_M1)
    grad_PD = combine.gather(_aligned(grad_TD), rows)
    grad_PF = grouped_gemm.rows_product(grad_PD, _aligned(w2_EDF), rows, transposed=False)
    grads = swiglu.swiglu_backward(grad_PF, gate_PF, up_PF, gates_TK.contiguous(), rows)
    return grads.gate_PF, grads.up_PF, grads.gates_TK, grouped_gemm.weight_grad(grad_PD, grads.gated_PF, rows)


@fused_forward.register_fake
def _(x_TD, *others):
    return x_TD.new_empty(x_TD.shape)


@fused_anchor.register_fake
def _(x_TD, w1_EFD, order_P, *rows):
    return w1_EFD.new_empty(1).expand(order_P.shape[0], w1_EFD.shape[1])


@fused_up.register_fake
def _(x_TD, w1_EFD, w3_EFD, anchor_PF, order_P, *rows):
    return tuple(x_TD.new_empty(order_P.shape[0], w1_EFD.shape[1]) for _ in range(3))


@fused_input_grad.register_fake
def _(grad_gate_PF, grad_up_PF, w1_EFD, w3_EFD, order_P, position_TK, *rows):
    return grad_gate_PF.new_empty(position_TK.shape[0], w1_EFD.shape[2])


@fused_weight_grads.register_fake
def _(x_TD, grads_PF, order_P, position_TK, starts_E1, expert_M1):
    return [x_TD.new_empty(starts_E1.shape[0] - 1, grad_PF.shape[1], x_TD.shape[1]) for grad_PF in grads_PF]


@fused_down.register_fake
def _(gate_PF, up_PF, hidden_PF, gates_TK, w2_EDF, *rows):
    return hidden_PF.new_empty(gates_TK.shape[0], w2_EDF.shape[1])


@fused_down_backward.register_fake
def _(grad_TD, gate_PF, up_PF, gates_TK, w2_EDF, *rows):
    return tuple(t.new_empty(t.shape) for t in (gate_PF, up_PF, gates_TK, w2_EDF))


def _setup_anchor(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, _, *rows = inputs
    ctx.save_for_backward(x_TD, *rows)


def _anchor_backward(ctx: Any, grad_gate_PF: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, *rows = ctx.saved_tensors
    return None, *fused_weight_grads(x_TD, [grad_gate_PF], *rows), *(None,) * 4


def _setup_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, w1_EFD, w3_EFD, anchor_PF, *rows = inputs
    ctx.set_materialize_grads(False)  # hidden values have none, and zeros of their size would be allocated
    ctx.anchored = anchor_PF is not None
    ctx.save_for_backward(x_TD, w1_EFD, w3_EFD, *rows)


def _up_backward(ctx: Any, grad_gate_PF: Tensor | None, grad_up_PF: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_gate_PF is None or grad_up_PF is None:
        return (None,) * 8
    x_TD, w1_EFD, w3_EFD, *rows = ctx.saved_tensors
    grad_TD = fused_input_grad(grad_gate_PF, grad_up_PF, w1_EFD, w3_EFD, *rows)
    if ctx.anchored:
        (grad_w3,) = fused_weight_grads(x_TD, [grad_up_PF], *rows)
        return grad_TD, None, grad_w3, grad_gate_PF, *(None,) * 4
    return grad_TD, *fused_weight_grads(x_TD, [grad_gate_PF, grad_up_PF], *rows), None, *(None,) * 4


def _setup_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate_PF, up_PF, _, *rest = inputs
    ctx.save_for_backward(gate_PF, up_PF, *rest)


def _down_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_gate_PF, grad_up_PF, grad_gates_TK, grad_w2 = fused_down_backward(grad_TD, *ctx.saved_tensors)
    return grad_gate_PF, grad_up_PF, None, grad_gates_TK, grad_w2, *(None,) * 4


fused_anchor.register_autograd(_anchor_backward, setup_context=_setup_anchor)
fused_up.register_autograd(_up_backward, setup_context=_setup_up)
fused_down.register_autograd(_down_backward, setup_context=_setup_down)
