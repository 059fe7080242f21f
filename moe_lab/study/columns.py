"""What a trace holds: tensors by layer and token, counted by expert and cut by layer, document and window."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.compact import slices
from moe_lab.study.info import TraceInfo
from moe_lab.study.validate import check_layout, check_values

TOKEN_FIELDS = ("document_T", "position_T", "valid_T")
LAYER_FIELDS = ("expert_ids_LTK", "gates_LTK", "logits_LTE")

Part = TypeVar("Part", bound="Columns")  # a part of a trace is a trace


@dataclass(frozen=True, eq=False, repr=False)
class Columns:
    """The recorded routing of T tokens in L layers, in the order they were recorded. All tensors are on CPU.

    `expert_ids_LTK` uint8 or int16 (only int16 can hold -1, a dropped assignment), the first expert first;
    `gates_LTK` float16 or None, 0 where dropped; `logits_LTE` float16 or None; `expert_bias_LE` float32 or
    None, the balancing bias at the time. `document_T` int32 indexes `info.documents`; `position_T` int32 is
    the token's position within its document; `valid_T` bool is False for padding, which counts nowhere. L
    indexes `info.layers`.

    Raises `ValueError` for shapes, dtypes or values that are not so. Float16 rounds the logits (to 3 digits),
    so near ties can flip when they are routed again.
    """

    info: TraceInfo
    expert_ids_LTK: Tensor
    gates_LTK: Tensor | None
    logits_LTE: Tensor | None
    expert_bias_LE: Tensor | None
    document_T: Tensor
    position_T: Tensor
    valid_T: Tensor

    def __post_init__(self) -> None:
        check_layout(self)
        check_values(self)

    # what it holds

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_LTK.shape[1]

    @property
    def num_layers(self) -> int:
        return len(self.info.layers)

    @property
    def num_experts(self) -> int:
        return self.info.num_experts

    @property
    def top_k(self) -> int:
        return self.info.top_k

    @cached_property
    def present_documents(self) -> tuple[int, ...]:
        """Documents that have tokens here, in order of first appearance."""
        return tuple(dict.fromkeys(torch.unique_consecutive(self.document_T).tolist()))

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Domains that have tokens here, in order of first appearance."""
        return tuple(dict.fromkeys(self.info.documents[d].domain for d in self.present_documents))

    @cached_property
    def domain_T(self) -> Int[Tensor, " T"]:
        """Index into `domains` of every token, int64."""
        domain_G = torch.zeros(len(self.info.documents), dtype=torch.int64)
        for document in self.present_documents:
            domain_G[document] = self.domains.index(self.info.documents[document].domain)
        return domain_G[self.document_T.long()]

    @cached_property
    def counts_LE(self) -> Int[Tensor, "L E"]:
        """Assignments kept by each expert, int64, over valid tokens."""
        return self.counts_by(torch.zeros(1, dtype=torch.int64).expand(self.num_tokens), 1)[:, 0]

    @cached_property
    def dropped_L(self) -> Int[Tensor, " L"]:
        """Assignments of valid tokens that were dropped: counts plus dropped is valid tokens times K."""
        return int(self.valid_T.sum()) * self.top_k - self.counts_LE.sum(dim=1)

    def counts_by(self, group_T: Int[Tensor, " T"], num_groups: int) -> Int[Tensor, "L G E"]:
        """Assignments by layer, group of tokens and expert; tokens of group -1 or not valid do not count."""
        # numpy, because threads that wait for each other make this 50 times slower on a busy machine
        counts = np.zeros((self.num_layers, num_groups * self.num_experts), dtype=np.int64)
        for part in slices(self.num_tokens):
            group_t = torch.where(self.valid_T[part], group_T[part].long(), -1)
            first_t1 = torch.where(group_t < 0, -1, group_t * self.num_experts).numpy()[:, None]
            for counts_N, ids_TK in zip(counts, self.expert_ids_LTK.numpy(), strict=True):
                kept_tK = (first_t1 >= 0) & (ids_TK[part] >= 0)
                cell_N = (first_t1 + ids_TK[part])[kept_tK]
                counts_N += np.bincount(cell_N, minlength=len(counts_N))
        return torch.from_numpy(counts).view(self.num_layers, num_groups, self.num_experts)

    def __repr__(self) -> str:
        parts = [name.split("_L")[0] for name in LAYER_FIELDS if getattr(self, name) is not None]
        layers = ", ".join(map(str, self.info.layers))
        return (
            f"{type(self).__name__} of {self.info.model or 'an unnamed model'}: {self.num_tokens:,} tokens, "
            f"top {self.top_k} of {self.num_experts} experts, layers {layers}, "
            f"domains {', '.join(self.domains)} ({', '.join(parts)})"
        )

    # cutting

    def select(
        self: Part,
        layer: int | None = None,
        domain: str | None = None,
        document: int | None = None,
        step: int | None = None,
        rank: int | None = None,
        micro_batch: int | None = None,
        start: int = 0,
        tokens: int | None = None,
    ) -> Part:
        """The part of one layer (a number from `info.layers`), domain, document (an index into
        `info.documents`), step, rank, micro-batch, and window: `tokens` tokens from `start` of what the others left.

        Views of this trace wherever the tokens kept are one range; otherwise (a domain in several pieces) a
        copy. Raises `ValueError` for what is not here and a window past the end.
        """
        trace = self
        if layer is not None:
            trace = trace._one_layer(layer)
        if domain is not None:
            if domain not in self.domains:
                raise ValueError(f"domain={domain!r} is not here: choose one of {', '.join(self.domains)}")
            trace = trace._tokens(_positions(trace.domain_T == trace.domains.index(domain)))
        if document is not None:
            if document not in trace.present_documents:
                raise ValueError(f"document={document!r} has no tokens here: {trace.present_documents} do")
            trace = trace._tokens(_positions(trace.document_T == document))
        for name, value in (("step", step), ("rank", rank), ("micro_batch", micro_batch)):
            if value is not None:
                trace = trace._forwards(name, value)
        if start == 0 and tokens is None:
            return trace
        check_int("start", start, 0, max(0, trace.num_tokens - 1))
        if tokens is None:
            tokens = trace.num_tokens - start
        check_int("tokens", tokens, 1, trace.num_tokens - start)
        return trace._tokens(slice(start, start + tokens))

    def layer(self: Part, layer: int) -> Part:
        """The part of one layer, by its number."""
        return self.select(layer=layer)

    def domain(self: Part, domain: str) -> Part:
        """The part of one domain."""
        return self.select(domain=domain)

    def windows(self: Part, tokens: int) -> Iterator[Part]:
        """Consecutive windows of `tokens` tokens; a shorter rest at the end is left out."""
        check_int("tokens", tokens, 1, self.num_tokens)
        starts = range(0, self.num_tokens - tokens + 1, tokens)
        return (self._tokens(slice(start, start + tokens)) for start in starts)

    def _one_layer(self: Part, layer: int) -> Part:
        if layer not in self.info.layers:
            raise ValueError(f"layer={layer!r} was not recorded: choose one of {self.info.layers}")
        i = self.info.layers.index(layer)
        parts = {
            name: value[i : i + 1]
            for name in (*LAYER_FIELDS, "expert_bias_LE")
            if (value := getattr(self, name)) is not None
        }
        return self.unchecked(info=dataclasses.replace(self.info, layers=(layer,)), **parts)

    def _forwards(self: Part, name: str, value: int) -> Part:
        known = {d: getattr(self.info.documents[d], name) for d in self.present_documents}
        if value not in known.values():
            raise ValueError(f"{name}={value!r} has no tokens here: {sorted(set(known.values()) - {None})!r:.80} have")
        wanted_G = torch.zeros(len(self.info.documents), dtype=torch.bool)
        wanted_G[[document for document, own in known.items() if own == value]] = True
        return self._tokens(_positions(wanted_G[self.document_T.long()]))

    def _tokens(self: Part, index: slice | Tensor) -> Part:
        parts = {name: getattr(self, name)[index] for name in TOKEN_FIELDS}
        for name in LAYER_FIELDS:
            if (value := getattr(self, name)) is not None:
                parts[name] = value[:, index]
        return self.unchecked(**parts)

    def unchecked(self: Part, **changes: Any) -> Part:
        """A copy with some fields changed, like `dataclasses.replace` but without its checks.

        For values that are known to be right: to check a long trace's again would cost more than to cut it.
        """
        trace = object.__new__(type(self))
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        trace.__dict__.update(values | changes)
        return trace


def _positions(keep_T: Tensor) -> slice | Tensor:
    """Indices of the True tokens, as a slice when they are one range: slices of tensors are views."""
    index = keep_T.nonzero()[:, 0]
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
