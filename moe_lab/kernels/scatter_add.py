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


@torch.library.custom_op("moe_lab::deterministic_scatter_add_", mutates_args=("out",))
def deterministic_scatter_add_(out: Tensor, index: Tensor, src: Tensor) -> None:
    """`deterministic_scatter_add` into `out` itself, bit for bit the same. No gradients: for inference only.

    Whoever calls it makes sure that nobody still needs what `out` held: see `may_overlap`.
    """
    _check(out, index, src)
    with deterministic_mode():
        out.scatter_add_(0, _as_2d(index, src), src)


@deterministic_scatter_add_.register_fake
def _(out: Tensor, index: Tensor, src: Tensor) -> None:
    return None


def byte_range(tensor: Tensor) -> tuple[int, int]:
    """Addresses from a tensor's first byte to after its last; what lies between strides counts as its own."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def may_overlap(a: Tensor, b: Tensor) -> bool:
    """Whether writing one tensor may change the other, on the safe side.

    Disjoint halves of one storage do not overlap; interleaved views count as overlapping, though they share no byte.
    """
    (a_start, a_end), (b_start, b_end) = byte_range(a), byte_range(b)
    return a.device == b.device and a_start < b_end and b_start < a_end


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
