"""What makes a routing trace valid: shapes, dtypes, and values that can have been recorded."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from moe_lab.contracts import check_ids
from moe_lab.study.compact import slices
from moe_lab.study.info import TraceInfo

if TYPE_CHECKING:
    from moe_lab.study.columns import Columns

OPTIONAL_FIELDS = ("gates_LTK", "logits_LTE", "expert_bias_LE")


def check_layout(trace: Columns) -> None:
    """Raise `ValueError` for a tensor of the wrong kind, dtype or shape."""
    if not isinstance(trace.info, TraceInfo):
        raise ValueError(f"info={trace.info!r:.80} must be a TraceInfo")
    ids = trace.expert_ids_LTK
    if not isinstance(ids, Tensor) or ids.ndim != 3:
        raise ValueError("expert_ids_LTK must be a tensor of 3 dimensions: layers, tokens, choices")
    layers, tokens, experts = trace.num_layers, ids.shape[1], trace.num_experts
    small = (torch.uint8, torch.int16) if experts <= 256 else (torch.int16,)
    expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "expert_ids_LTK": (small, (layers, tokens, trace.top_k)),
        "gates_LTK": ((torch.float16,), (layers, tokens, trace.top_k)),
        "logits_LTE": ((torch.float16,), (layers, tokens, experts)),
        "expert_bias_LE": ((torch.float32,), (layers, experts)),
        "document_T": ((torch.int32,), (tokens,)),
        "position_T": ((torch.int32,), (tokens,)),
        "valid_T": ((torch.bool,), (tokens,)),
    }
    for name, (dtypes, shape) in expected.items():
        value = getattr(trace, name)
        if value is None and name in OPTIONAL_FIELDS:
            continue
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
            raise ValueError(f"{name} must be a dense CPU tensor")
        if value.dtype not in dtypes:
            raise ValueError(f"{name} is {value.dtype}: must be {' or '.join(map(str, dtypes))}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: must be {shape}, like the rest")


def check_values(trace: Columns) -> None:
    """Raise `ValueError` for ids out of range, NaN, and documents or positions that do not exist."""
    check_ids("expert_ids_LTK", trace.expert_ids_LTK, trace.num_experts)
    for name in OPTIONAL_FIELDS:
        value = getattr(trace, name)
        if value is not None and not all(layer.isfinite().all() for layer in value):
            raise ValueError(f"{name} holds NaN or infinity")
    if trace.gates_LTK is not None and trace.expert_ids_LTK.dtype != torch.uint8:
        for ids_TK, gates_TK in zip(trace.expert_ids_LTK, trace.gates_LTK, strict=True):
            if gates_TK[ids_TK < 0].any():
                raise ValueError("gates_LTK must be 0 where expert_ids_LTK is -1 (dropped)")
    if not trace.num_tokens:
        return
    if trace.valid_T.contiguous().view(torch.uint8).max() > 1:  # a file can hold a bool of 2
        raise ValueError("valid_T must hold bytes 0 and 1 only")
    low, high = (int(v) for v in trace.document_T.aminmax())
    if low < 0 or high >= len(trace.info.documents):
        bad = low if low < 0 else high
        raise ValueError(f"document_T holds {bad}: info has documents 0..{len(trace.info.documents) - 1}")
    length_G = torch.tensor([document.length for document in trace.info.documents])
    for part in slices(trace.num_tokens):
        position_t = trace.position_T[part]
        outside_t = (position_t < 0) | (position_t >= length_G[trace.document_T[part].long()])
        if not outside_t.any():
            continue
        token = part.start + int(outside_t.int().argmax())
        document = trace.info.documents[int(trace.document_T[token])]
        raise ValueError(
            f"position_T of token {token} is {int(trace.position_T[token])}, outside document "
            f"{document.name!r} of length {document.length}"
        )


def check_alike(first: Columns, other: Columns) -> None:
    """Raise `ValueError` unless two traces differ in their documents and tokens only."""
    for field in dataclasses.fields(TraceInfo):
        a, b = getattr(first.info, field.name), getattr(other.info, field.name)
        if field.name != "documents" and a != b:
            raise ValueError(f"{field.name} of traces differ: {a!r:.80} and {b!r:.80}")
    for name in OPTIONAL_FIELDS:
        if (getattr(first, name) is None) != (getattr(other, name) is None):
            raise ValueError(f"{name} is in one trace but not in another")
    if first.expert_bias_LE is not None and not torch.equal(first.expert_bias_LE, other.expert_bias_LE):  # type: ignore[arg-type]
        raise ValueError("expert_bias_LE of traces differ")


def kept_tokens(name: str, mask: Shaped[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which tokens an attention mask keeps, on CPU: those of True, or of a number above 0.

    Raises `ValueError` for a mask with numbers below 0: an additive one says the opposite, 0 for tokens.
    """
    if not bool((mask >= 0).all()):
        raise ValueError(
            f"{name} holds {float(mask.min()):g}: must be True or 1 for tokens, False or 0 for padding; of an additive "
            f"mask take {name} == 0"
        )
    return mask.bool().cpu()
