"""Recorded routing: which experts every token of some text was sent to, in every layer.

A `RoutingTrace` is a value: integers and half-precision numbers with their provenance. It can be cut by
layer, domain, document and window, routed again under other settings, and kept in one safetensors file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.config import RouterConfig
from moe_lab.contracts import check_finite
from moe_lab.layer.router import Routing, count, route, score
from moe_lab.study.columns import LAYER_FIELDS, TOKEN_FIELDS, Columns
from moe_lab.study.compact import half, small_dtype
from moe_lab.study.info import Document, TraceInfo
from moe_lab.study.recorder import Recorder, record
from moe_lab.study.validate import OPTIONAL_FIELDS, check_alike, kept_tokens

__all__ = ["Document", "Recorder", "RoutingTrace", "TraceInfo", "record"]

METADATA_KEY = "moe_lab_trace"


@dataclass(frozen=True, eq=False, repr=False)
class RoutingTrace(Columns):
    """The recorded routing of T tokens in L layers: what `Columns` holds, routed, joined and kept in files.

    Float16 rounds the logits (to 3 digits), so near ties can flip when they are routed again.
    """

    # routing

    def routing(self, layer: int) -> Routing:
        """One layer's decision as it was recorded; tokens that are not valid come out dropped.

        Gates are the recorded ones in float32. Without recorded logits, scores and logits are NaN: unknown.
        Raises `ValueError` for a layer that was not recorded, and for a trace without gates.
        """
        trace = self.layer(layer)
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
        trace = self.layer(layer)
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
        logits: Sequence[Tensor] | Tensor,
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

        Made for `output_router_logits` of transformers, whose tensors are (B*L, E); one tensor (L, T, E) will do.
        `valid` is the attention mask: (B, L), each row a document of its own, or (T,). `expert_bias_LE` is the
        balancing bias, if there was one; `step`, `rank` and `micro_batch` say which forward of a run it was.
        Ids and gates are computed here, in float32 (float64 for such logits): as exact as the logits, whose near
        ties may have gone the other way.

        Raises `ValueError` for logits that differ in shape, are not finite, or cannot be routed so.
        """
        logits = list(logits)  # of one tensor (L, T, E) its layers
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
        for layer, logits_TE in enumerate(flat):
            check_finite(f"layer {layer}: logits", logits_TE)
        routings = [route(x, router, top_k, expert_bias_E=b) for x, b in zip(flat, biases, strict=True)]
        rows, length = (1, shape[0]) if len(shape) == 1 else shape
        token_T = torch.arange(rows * length, dtype=torch.int32)
        valid_T = (
            torch.ones(len(token_T), dtype=torch.bool) if valid is None else kept_tokens("valid", valid).reshape(-1)
        )
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
            valid_T=valid_T,
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
        return first.unchecked(info=dataclasses.replace(first.info, documents=tuple(documents)), **parts)
