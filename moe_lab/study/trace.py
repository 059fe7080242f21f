"""Recorded routing: which experts every token of some text was sent to, in every layer.

A `RoutingTrace` is a value: integers and half-precision numbers with their provenance. It can be cut by
layer, domain, document and window, routed again under other settings, and kept in one safetensors file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.config import RouterConfig, check_int
from moe_lab.layer.router import Routing, count, route, score
from moe_lab.study.info import Document, TraceInfo
from moe_lab.study.recorder import Recorder, half, record, small_dtype
from moe_lab.study.validate import OPTIONAL_FIELDS, check_alike, check_layout, check_values

__all__ = ["Document", "Recorder", "RoutingTrace", "TraceInfo", "record"]

METADATA_KEY = "moe_lab_trace"
TOKEN_FIELDS = ("document_T", "position_T", "valid_T")
LAYER_FIELDS = ("expert_ids_LTK", "gates_LTK", "logits_LTE")


@dataclass(frozen=True, eq=False, repr=False)
class RoutingTrace:
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
        return self.counts_by(torch.zeros(self.num_tokens, dtype=torch.int64), 1)[:, 0]

    @cached_property
    def dropped_L(self) -> Int[Tensor, " L"]:
        """Assignments of valid tokens that were dropped: counts plus dropped is valid tokens times K."""
        return int(self.valid_T.sum()) * self.top_k - self.counts_LE.sum(dim=1)

    def counts_by(self, group_T: Int[Tensor, " T"], num_groups: int) -> Int[Tensor, "L G E"]:
        """Assignments by layer, group of tokens and expert; tokens of group -1 or not valid do not count."""
        # numpy, because threads that wait for each other make this 50 times slower on a busy machine
        group_T = torch.where(self.valid_T, group_T.long(), -1)
        first_T = torch.where(group_T < 0, -1, group_T * self.num_experts).numpy()
        counts = np.zeros((self.num_layers, num_groups * self.num_experts), dtype=np.int64)
        for part in slices(self.num_tokens):
            first_t1 = first_T[part, None]
            for counts_N, ids_TK in zip(counts, self.expert_ids_LTK.numpy(), strict=True):
                kept_tK = (first_t1 >= 0) & (ids_TK[part] >= 0)
                cell_N = (first_t1 + ids_TK[part])[kept_tK]
                counts_N += np.bincount(cell_N, minlength=len(counts_N))
        return torch.from_numpy(counts).view(self.num_layers, num_groups, self.num_experts)

    def __repr__(self) -> str:
        parts = [name.split("_L")[0] for name in LAYER_FIELDS if getattr(self, name) is not None]
        layers = ", ".join(map(str, self.info.layers))
        return (
            f"RoutingTrace of {self.info.model or 'an unnamed model'}: {self.num_tokens:,} tokens, "
            f"top {self.top_k} of {self.num_experts} experts, layers {layers}, "
            f"domains {', '.join(self.domains)} ({', '.join(parts)})"
        )

    # cutting

    def select(
        self,
        layer: int | None = None,
        domain: str | None = None,
        document: int | None = None,
        step: int | None = None,
        rank: int | None = None,
        micro_batch: int | None = None,
        start: int = 0,
        tokens: int | None = None,
    ) -> RoutingTrace:
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

    def layer(self, layer: int) -> RoutingTrace:
        """The part of one layer, by its number."""
        return self.select(layer=layer)

    def domain(self, domain: str) -> RoutingTrace:
        """The part of one domain."""
        return self.select(domain=domain)

    def windows(self, tokens: int) -> Iterator[RoutingTrace]:
        """Consecutive windows of `tokens` tokens; a shorter rest at the end is left out."""
        check_int("tokens", tokens, 1, self.num_tokens)
        starts = range(0, self.num_tokens - tokens + 1, tokens)
        return (self._tokens(slice(start, start + tokens)) for start in starts)

    def _one_layer(self, layer: int) -> RoutingTrace:
        if layer not in self.info.layers:
            raise ValueError(f"layer={layer!r} was not recorded: choose one of {self.info.layers}")
        i = self.info.layers.index(layer)
        parts = {
            name: value[i : i + 1]
            for name in (*LAYER_FIELDS, "expert_bias_LE")
            if (value := getattr(self, name)) is not None
        }
        return self._with(info=dataclasses.replace(self.info, layers=(layer,)), **parts)

    def _forwards(self, name: str, value: int) -> RoutingTrace:
        known = {d: getattr(self.info.documents[d], name) for d in self.present_documents}
        if value not in known.values():
            raise ValueError(f"{name}={value!r} has no tokens here: {sorted(set(known.values()) - {None})!r:.80} have")
        wanted_G = torch.zeros(len(self.info.documents), dtype=torch.bool)
        wanted_G[[document for document, own in known.items() if own == value]] = True
        return self._tokens(_positions(wanted_G[self.document_T.long()]))

    def _tokens(self, index: slice | Tensor) -> RoutingTrace:
        parts = {name: getattr(self, name)[index] for name in TOKEN_FIELDS}
        for name in LAYER_FIELDS:
            if (value := getattr(self, name)) is not None:
                parts[name] = value[:, index]
        return self._with(**parts)

    def _with(self, **changes: Any) -> RoutingTrace:
        """A part of a trace that was checked needs no second check of its values."""
        trace = object.__new__(RoutingTrace)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        trace.__dict__.update(values | changes)
        return trace

    # routing

    def routing(self, layer: int) -> Routing:
        """One layer's decision as it was recorded; tokens that are not valid come out dropped.

        Gates are the recorded ones in float32. Without recorded logits, scores and logits are NaN: unknown.
        Raises `ValueError` for a layer that was not recorded, and for a trace without gates.
        """
        trace = self._one_layer(layer)
        if trace.gates_LTK is None:
            raise ValueError("this trace has no gates_LTK, only expert ids: routing() needs gates")
        if trace.logits_LTE is None:
            logits_TE = torch.full((1, 1), math.nan).expand(self.num_tokens, self.num_experts)
        else:
            logits_TE = trace.logits_LTE[0].float()
        scores_TE = score(logits_TE, self.info.router.score_func)
        ids_TK = trace.expert_ids_LTK[0].long()
        return self._drop_invalid(Routing(trace.gates_LTK[0].float(), ids_TK, scores_TE, logits_TE, ids_TK))

    def reroute(
        self,
        layer: int,
        config: RouterConfig,
        top_k: int,
        *,
        use_bias: bool = True,
        temperature: float = 1.0,
    ) -> Routing:
        """What another router would have chosen from one layer's recorded logits / `temperature`.

        Open-loop: the logits are those of the recorded model, and what its later layers would have made of
        the new choice is not known. `use_bias` keeps the recorded balancing bias. Tokens that are not valid
        come out dropped. `force_load_balance="random"` draws from a fixed seed.

        Raises `ValueError` for a trace without logits, a layer that was not recorded, settings that cannot
        choose, and a temperature that is not positive.
        """
        trace = self._one_layer(layer)
        if trace.logits_LTE is None:
            raise ValueError("this trace has no logits_LTE, only what was chosen: reroute() needs logits")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature!r} must be a positive number")
        bias_E = trace.expert_bias_LE[0] if use_bias and trace.expert_bias_LE is not None else None
        logits_TE = trace.logits_LTE[0].float() / temperature
        generator = torch.Generator().manual_seed(0)
        return self._drop_invalid(route(logits_TE, config, top_k, expert_bias_E=bias_E, generator=generator))

    def _drop_invalid(self, routing: Routing) -> Routing:
        invalid_T1 = ~self.valid_T[:, None]
        ids_TK = routing.expert_ids_TK.masked_fill(invalid_T1, -1)
        gates_TK = routing.gates_TK.masked_fill(invalid_T1, 0.0)
        counts_E = count(ids_TK, self.num_experts)
        return routing._replace(gates_TK=gates_TK, expert_ids_TK=ids_TK, counts_E=counts_E)

    # making and keeping

    @classmethod
    def from_router_logits(
        cls,
        logits: Sequence[Tensor],
        router: RouterConfig,
        top_k: int,
        *,
        valid: Tensor | None = None,
        expert_bias_LE: Tensor | None = None,
        layers: Sequence[int] | None = None,
        step: int | None = None,
        rank: int | None = None,
        micro_batch: int | None = None,
        model: str = "",
        source: str = "",
        licence: str = "",
    ) -> RoutingTrace:
        """What a router chooses from logits that somebody kept: one tensor a layer, (T, E) or (B, L, E).

        Made for `output_router_logits` of transformers, whose tensors are (B*L, E). `valid` is the attention mask:
        (B, L), each row a document of its own, or (T,). `expert_bias_LE` is the balancing bias, if there was one;
        `step`, `rank` and `micro_batch` say which forward of a run it was.
        Ids and gates are computed here, in float32 (float64 for such logits): as exact as the logits, whose near
        ties may have gone the other way.

        Raises `ValueError` for logits that differ in shape, are not finite, or cannot be routed so.
        """
        if not logits or not all(isinstance(x, Tensor) and x.dim() in (2, 3) for x in logits):
            raise ValueError("logits must be a non-empty sequence of tensors (T, E) or (B, L, E), one a layer")
        if len({x.shape for x in logits}) > 1:
            raise ValueError(f"logits of layers differ in shape: {[tuple(x.shape) for x in logits]!r:.200}")
        shape = logits[0].shape[:-1] if valid is None or logits[0].dim() == 3 else valid.shape
        if math.prod(shape) != logits[0].shape[:-1].numel() or (valid is not None and valid.shape != shape):
            raise ValueError(f"valid {tuple(shape)} does not fit logits {tuple(logits[0].shape)}")
        biases = [None] * len(logits) if expert_bias_LE is None else expert_bias_LE.detach().float().cpu().unbind()
        if len(biases) != len(logits):
            raise ValueError(f"expert_bias_LE has {len(biases)} layers where logits has {len(logits)}")
        flat = [x.detach().flatten(0, -2).to("cpu", torch.promote_types(x.dtype, torch.float32)) for x in logits]
        routings = [route(x, router, top_k, expert_bias_E=b) for x, b in zip(flat, biases, strict=True)]
        rows, length = (1, shape[0]) if len(shape) == 1 else shape
        token_T = torch.arange(rows * length, dtype=torch.int32)
        return cls(
            info=TraceInfo(
                model=model,
                source=source,
                licence=licence,
                versions={"torch": torch.__version__},
                router=router,
                num_experts=flat[0].shape[1],
                top_k=top_k,
                layers=tuple(range(len(flat)) if layers is None else layers),
                documents=tuple(
                    Document(f"sequence {b}", "unlabelled", "", 0, max(length, 1), step, rank, micro_batch)
                    for b in range(rows)
                ),
            ),
            expert_ids_LTK=torch.stack([r.expert_ids_TK for r in routings]).to(small_dtype(flat[0].shape[1])),
            gates_LTK=torch.stack([half("gates", r.gates_TK) for r in routings]),
            logits_LTE=torch.stack([half(f"logits of layer {i}", x) for i, x in enumerate(flat)]),
            expert_bias_LE=None if expert_bias_LE is None else expert_bias_LE.detach().float().cpu(),
            document_T=token_T // max(length, 1),
            position_T=token_T % max(length, 1),
            valid_T=torch.ones(len(token_T), dtype=torch.bool) if valid is None else valid.bool().cpu().reshape(-1),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, provenance as JSON in its header; an older file is replaced whole."""
        tensors = {
            field.name: value.contiguous()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, scratch, metadata={METADATA_KEY: self.info.to_json()})
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Read what `save` wrote; tensors stay mapped to the file until they are touched.

        Raises `ValueError`, naming the file, for one that is missing, cut short, foreign, or holds values
        that no trace can have.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.name != "info"]
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(METADATA_KEY)
                if text is None:
                    raise ValueError(f"its header has no {METADATA_KEY!r}, so it is not a routing trace")
                names = set(file.keys())
                if unknown := names - set(known):
                    raise ValueError(f"unknown tensors {sorted(unknown)!r:.200}")
                if missing := set(known) - names - set(OPTIONAL_FIELDS):
                    raise ValueError(f"tensors {sorted(missing)} are missing")
                info = TraceInfo.from_json(text)
                tensors = {name: file.get_tensor(name) for name in names}
            return cls(info, **{name: tensors.get(name) for name in known})  # type: ignore[arg-type]
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a readable routing trace: {error}") from error

    @staticmethod
    def concatenate(traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """The tokens of several traces of the same model and layers, one after another.

        Equal documents become one. Raises `ValueError` when anything but the documents differs.
        """
        if not traces:
            raise ValueError("traces=[] holds no trace to concatenate")
        first, documents = traces[0], dict[Document, int]()
        columns: dict[str, list[Tensor]] = {name: [] for name in (*TOKEN_FIELDS, *LAYER_FIELDS)}
        for trace in traces:
            check_alike(first, trace)
            new_G = torch.tensor([documents.setdefault(d, len(documents)) for d in trace.info.documents])
            for name, column in columns.items():
                if (value := getattr(trace, name)) is not None:
                    column.append(new_G[value.long()].int() if name == "document_T" else value)
        parts = {n: torch.cat(c, dim=int(n in LAYER_FIELDS)) if c else None for n, c in columns.items()}
        return first._with(info=dataclasses.replace(first.info, documents=tuple(documents)), **parts)


def slices(num_tokens: int, size: int = 2**17) -> Iterator[slice]:
    """All tokens in pieces, so that what is computed of a long trace fits in memory."""
    return (slice(start, start + size) for start in range(0, num_tokens, size))


def _positions(keep_T: Tensor) -> slice | Tensor:
    """Indices of the True tokens, as a slice when they are one range: slices of tensors are views."""
    index = keep_T.nonzero()[:, 0]
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index
