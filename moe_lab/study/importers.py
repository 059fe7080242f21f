"""Routing that other programs wrote down, as traces: what servers return, and the parts that importers share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.config import RouterConfig, check_int
from moe_lab.study.compact import small_dtype
from moe_lab.study.info import MAX_EXPERTS, Document, TraceInfo
from moe_lab.study.trace import RoutingTrace
from moe_lab.study.validate import kept_tokens


def from_routed_experts(
    sequences: Sequence[np.ndarray | Tensor],
    num_experts: int,
    *,
    valid: Sequence[np.ndarray | Tensor] | None = None,
    router: RouterConfig | None = None,
    layers: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Expert ids as servers return them: integers (tokens, layers, K), one array a sequence.

    vLLM's `prompt_routed_experts` and `routed_experts` (docs.vllm.ai, "Routed Experts Replay"), SGLang's
    `return_routed_experts` after reshaping. Each sequence is a document. Ids only: the order of a token's experts
    is the server's, gates and logits are not known. `valid` is a mask (tokens,) a sequence, False for padding;
    `layers` picks and numbers the layers (all, from 0).

    Raises `ValueError` for arrays that are not so, ids that no expert has, and for layers whose every slot is
    the same expert: where a model is dense, servers fill in zeros.
    """
    check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    parts = [torch.as_tensor(sequence) for sequence in sequences]
    if not parts or any(part.dim() != 3 or part.is_floating_point() or part.dtype == torch.bool for part in parts):
        found = ", ".join(f"{tuple(part.shape)} of {part.dtype}" for part in parts[:3]) or "none"
        raise ValueError(f"sequences must be integer arrays (tokens, layers, K), one at least: there are {found}")
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"sequences differ in layers or K: {sorted({tuple(part.shape[1:]) for part in parts})}")
    num_layers, top_k = parts[0].shape[1:]
    check_int("layers of the sequences", num_layers, 1)
    chosen = tuple(range(num_layers) if layers is None else layers)
    if any(type(layer) is not int or not 0 <= layer < num_layers for layer in chosen):
        raise ValueError(f"layers={chosen} must be from 0 to {num_layers - 1}")
    ids_LTK = torch.cat(parts).long()[:, list(chosen)].transpose(0, 1)
    check_range(ids_LTK, num_experts)
    for layer, ids_TK in zip(chosen, ids_LTK):
        if top_k > 1 and len(ids_TK) and (ids_TK == ids_TK[0, 0]).all():
            raise ValueError(
                f"layer {layer} sends every token's {top_k} choices to expert {int(ids_TK[0, 0])}: a dense layer's "
                "placeholder? Leave it out with layers="
            )
    valid_T = torch.ones(ids_LTK.shape[1], dtype=torch.bool)
    if valid is not None:
        masks = [torch.as_tensor(mask) for mask in valid]
        if [tuple(mask.shape) for mask in masks] != [(len(part),) for part in parts]:
            raise ValueError(f"valid must be a mask (tokens,) for each of the {len(parts)} sequences")
        valid_T = kept_tokens("valid", torch.cat(masks))
    documents = [Document(f"sequence {i}", "unlabelled", "", 0, max(1, len(part))) for i, part in enumerate(parts)]
    info = provenance(router or RouterConfig(), num_experts, top_k, chosen, documents, model, source, licence)
    return dataclasses.replace(of_documents(info, ids_LTK, None, [len(part) for part in parts]), valid_T=valid_T)


def integers(name: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """Nested lists of JSON as int64, never a float cut short or a string read as a number."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if math.prod(shape) == 0 and array.size == 0 and array.dtype != object:
        return torch.zeros(shape, dtype=torch.int64)
    if array.dtype.kind != "i" or array.shape != shape:
        raise ValueError(f"{name} must be integers of shape {shape}")
    return torch.from_numpy(array.astype(np.int64))


def check_range(ids_LTK: Tensor, num_experts: int) -> None:
    """Refuse expert ids that no expert has, naming one."""
    if ids_LTK.numel():
        low, high = (int(v) for v in ids_LTK.aminmax())
        if low < -1 or high >= num_experts:
            bad = low if low < -1 else high
            raise ValueError(f"expert id {bad} is not from 0 to {num_experts - 1} (or -1 for dropped)")


def provenance(
    router: RouterConfig,
    num_experts: int,
    top_k: int,
    layers: Sequence[int],
    documents: Sequence[Document],
    model: str,
    source: str,
    licence: str,
) -> TraceInfo:
    """Where a trace that was imported comes from."""
    return TraceInfo(
        model,
        source,
        licence,
        {"torch": torch.__version__},
        router,
        num_experts,
        top_k,
        tuple(layers),
        tuple(documents),
    )


def of_documents(
    info: TraceInfo,
    ids_LTK: Tensor,
    logits_LTE: Float[Tensor, "L T E"] | None,
    lengths: list[int],
    gates_LTK: Tensor | None = None,
) -> RoutingTrace:
    """Documents of these lengths, one after another."""
    length_G = torch.tensor(lengths)
    document_T = torch.arange(len(lengths)).repeat_interleave(length_G)
    first_G = length_G.cumsum(0) - length_G
    return RoutingTrace(
        info=info,
        expert_ids_LTK=ids_LTK.to(small_dtype(info.num_experts, dropped=bool((ids_LTK < 0).any()))).contiguous(),
        gates_LTK=gates_LTK,
        logits_LTE=logits_LTE,
        expert_bias_LE=None,
        document_T=document_T.int(),
        position_T=(torch.arange(len(document_T)) - first_G[document_T]).int(),
        valid_T=torch.ones(len(document_T), dtype=torch.bool),
    )
