"""Deterministic scatter-add: rows added into place in index order, the same bits on every run.

PyTorch's own `scatter_add` is deterministic on CPU and, under its deterministic mode, on CUDA. The mode is
global, so the op switches it on only around its own call and gives back what the caller had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def deterministic_mode() -> Iterator[None]:
    """PyTorch's deterministic mode inside the block; the caller's setting, warn-only too, afterwards."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@torch.library.custom_op("moe_lab::deterministic_scatter_add", mutates_args=())
def deterministic_scatter_add(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """`out` (T, D) plus each row of `src` (R, D) at its `index`: (R,) row numbers, or (R, D) as `scatter_add` takes.

    Functional: `out` is left alone. Adds in row order; on CPU in float32 (float64 for float64) with one rounding
    at the end, on CUDA as PyTorch's deterministic kernel does, with at most one rounding an addition.
    Gradients: dOut passes through, dSrc gathers.
    """
    _check(out, index, src)
    with deterministic_mode():
        return out.contiguous().scatter_add(0, _as_2d(index, src), src)


def _check(out: Tensor, index: Tensor, src: Tensor) -> None:
    if out.dim() != 2 or src.dim() != 2 or out.shape[1] != src.shape[1] or out.dtype != src.dtype:
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype} and src {tuple(src.shape)} {src.dtype} must be (T, D) and (R, D) "
            "of one dtype"
        )
    if index.shape not in (src.shape, src.shape[:1]):
        raise ValueError(f"index {tuple(index.shape)} must be (R,) or (R, D) for src {tuple(src.shape)}")


def _as_2d(index: Tensor, src: Tensor) -> Tensor:
    return index if index.dim() == 2 else index[:, None].expand_as(src)


@deterministic_scatter_add.register_fake
def _(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    return out.new_empty(out.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    grad_src = grad.index_select(0, index) if index.dim() == 1 else grad.gather(0, index)
    return grad, None, grad_src


deterministic_scatter_add.register_autograd(_backward, setup_context=_setup)
