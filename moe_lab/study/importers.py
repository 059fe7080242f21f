"""Routing that other programs wrote down, as traces: what Megatron-Core, vLLM and SGLang dump."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moe_lab.config import RouterConfig, check_int
from moe_lab.layer.router import gates_of, score
from moe_lab.study.info import MAX_EXPERTS, Document, TraceInfo
from moe_lab.study.recorder import half, small_dtype
from moe_lab.study.trace import RoutingTrace

MAX_LINE = 2**28  # characters of a record: half a million tokens


def from_routed_experts(
    sequences: Sequence[np.ndarray | Tensor],
    num_experts: int,
    *,
    router: RouterConfig | None = None,
    layers: Sequence[int] | None = None,
    model: str = "",
    source: str = "",
    licence: str = "",
) -> RoutingTrace:
    """Expert ids as servers return them: integers (tokens, layers, K), one array a sequence.

    vLLM's `prompt_routed_experts` and `routed_experts` (docs.vllm.ai, "Routed Experts Replay"), SGLang's
    `return_routed_experts` after reshaping. Each sequence is a document. Ids only: the order of a token's experts
    is the server's, gates and logits are not known. `layers` picks and numbers the layers (all, from 0).

    Raises `ValueError` for arrays that are not so, ids that no expert has, and for layers whose every slot is
    the same expert: where a model is dense, servers fill in zeros.
    """
    check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    parts = [torch.as_tensor(sequence) for sequence in sequences]
    if not parts or any(part.dim() != 3 or part.is_floating_point() or part.dtype == torch.bool for part in parts):
        raise ValueError("sequences must be a non-empty list of integer arrays (tokens, layers, K)")
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"sequences differ in layers or K: {sorted({tuple(part.shape[1:]) for part in parts})}")
    num_layers, top_k = parts[0].shape[1:]
    check_int("layers of the sequences", num_layers, 1)
    chosen = tuple(range(num_layers) if layers is None else layers)
    if any(type(layer) is not int or not 0 <= layer < num_layers for layer in chosen):
        raise ValueError(f"layers={chosen} must be from 0 to {num_layers - 1}")
    ids_LTK = torch.cat(parts).long()[:, list(chosen)].transpose(0, 1)
    _check_range(ids_LTK, num_experts)
    for layer, ids_TK in zip(chosen, ids_LTK):
        if top_k > 1 and len(ids_TK) and (ids_TK == ids_TK[0, 0]).all():
            raise ValueError(
                f"layer {layer} sends every token's {top_k} choices to expert {int(ids_TK[0, 0])}: a dense layer's "
                "placeholder? Leave it out with layers="
            )
    documents = [Document(f"sequence {i}", "unlabelled", "", 0, max(1, len(part))) for i, part in enumerate(parts)]
    info = _info(router or RouterConfig(), num_experts, top_k, chosen, documents, model, source, licence)
    return _trace(info, ids_LTK, None, [len(part) for part in parts])


class _Record(NamedTuple):
    """One line of a rank's file: a layer's choices in one forward of one step."""

    step: int
    layer: int
    ids_TK: Tensor
    logits_TE: Tensor | None


def megatron_parts(
    folder: str | Path,
    *,
    router: RouterConfig | None = None,
    num_experts: int | None = None,
    ranks: Sequence[int] | None = None,
    block: str = "decoder",
    model: str = "",
    source: str = "",
    licence: str = "",
) -> Iterator[RoutingTrace]:
    """The folder that Megatron-Core's `--moe-routing-trace-path` fills, a trace a rank and step.

    `router_trace_rank{rank}.jsonl` holds a record a step, layer and forward; `logits_rank{rank}.bin` the bfloat16
    logits, if they were captured (megatron/core/transformer/moe/router_trace.py). The recorded ids are what ran:
    they are kept, in falling order of the logits when there are any (the tracer's own order is by expert number),
    and gates are what `router` makes of the logits at those ids. How many ids the logits reproduce is told by
    `moe_lab.study.compare.reproduced`.

    A document is one rank's forward in one step (micro-batches in their order; a recomputed forward counts again,
    the files do not tell), its domain the rank. Of multi-token-prediction blocks and others only `block` is read.
    One step of one rank is in memory at a time. Without logits, `num_experts` must be given.

    Raises `ValueError`, naming file and line, for what such a folder cannot hold, and for ranks of different
    pipeline stages, whose layers differ: choose `ranks` of one stage.
    """
    folder = Path(folder)
    found = {
        int(match[1]): path
        for path in folder.glob("router_trace_rank*.jsonl")
        if (match := re.fullmatch(r"router_trace_rank(\d{1,9})\.jsonl", path.name))
    }
    if missing := set(ranks or ()) - set(found):
        raise ValueError(f"ranks={sorted(missing)} have no file in {folder.name!r}: there are {sorted(found)}")
    if not found:
        raise ValueError(f"{folder.name!r} holds no router_trace_rank*.jsonl")
    config = router or RouterConfig()
    layers: tuple[int, ...] | None = None
    for rank in sorted(found if ranks is None else set(ranks)):
        for step, forwards in _megatron_steps(found[rank], rank, block):
            for forward in forwards:
                own = tuple(sorted(forward))
                layers = layers or own
                if own != layers:
                    raise ValueError(
                        f"rank {rank} holds layers {own}, others hold {layers}: choose ranks= of one pipeline stage"
                    )
            yield _megatron_trace(forwards, layers or (), rank, step, config, num_experts, (model, source, licence))


def _megatron_steps(path: Path, rank: int, block: str) -> Iterator[tuple[int, list[dict[int, _Record]]]]:
    """Each step's forwards: records by layer. The n-th record of a layer belongs to the n-th forward."""
    by_layer: dict[int, list[_Record]] = defaultdict(list)
    step: int | None = None
    logits_path = path.with_name(f"logits_rank{rank}.bin")
    with path.open(encoding="utf-8", errors="strict") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            try:
                record = _megatron_record(line, block, logits_path)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path.name} line {number}: {error}") from None
            if record is None:
                continue
            if step is not None and record.step != step:
                yield step, _forwards(by_layer, path, step)
                by_layer.clear()
            step = record.step
            by_layer[record.layer].append(record)
    if step is not None:
        yield step, _forwards(by_layer, path, step)


def _forwards(by_layer: dict[int, list[_Record]], path: Path, step: int) -> list[dict[int, _Record]]:
    count = {len(records) for records in by_layer.values()}
    if len(count) > 1:
        raise ValueError(f"{path.name} step {step}: layers were recorded {sorted(count)} times: a forward is not whole")
    forwards = [dict(zip(by_layer, records)) for records in zip(*by_layer.values())]
    for forward in forwards:
        if len({(r.ids_TK.shape, r.logits_TE is None or r.logits_TE.shape) for r in forward.values()}) > 1:
            raise ValueError(f"{path.name} step {step}: layers of one forward differ in tokens, topk or logits")
    return forwards


def _megatron_record(line: str, block: str, logits_path: Path) -> _Record | None:
    if len(line) >= MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE:,} characters")
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    if record.get("block", "decoder") != block:
        return None
    for name in ("step", "layer", "num_tokens", "topk"):
        check_int(name, record.get(name), 0, 2**31 - 1)
    shape = (record["num_tokens"], record["topk"])
    ids_TK = integers("top_indices", record.get("top_indices"), shape)
    logits_TE = _megatron_logits(record, logits_path) if "logit_offset" in record else None
    return _Record(record["step"], record["layer"], ids_TK, logits_TE)


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


def _megatron_logits(record: dict[str, object], path: Path) -> Tensor:
    offset, size, shape = (record.get(f"logit_{name}") for name in ("offset", "bytes", "shape"))
    check_int("logit_offset", offset, 0)
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"logit_shape={shape!r:.80} must be [tokens, experts]")
    check_int("logit_shape[0]", shape[0], record["num_tokens"], record["num_tokens"])  # type: ignore[arg-type]
    check_int("logit_shape[1]", shape[1], 1, MAX_EXPERTS)
    if size != 2 * math.prod(shape):
        raise ValueError(f"logit_bytes={size!r:.80} must be {2 * math.prod(shape)}: bfloat16 of shape {shape}")
    try:
        with path.open("rb") as file:
            file.seek(offset)  # type: ignore[arg-type]
            content = file.read(size)
    except (OSError, OverflowError) as error:
        raise ValueError(f"logits of the record cannot be read: {error}") from None
    if len(content) != size:
        raise ValueError(f"{path.name} ends before byte {offset} + {size}")
    return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(shape) if content else torch.empty(*shape)


def _megatron_trace(
    forwards: list[dict[int, _Record]],
    layers: tuple[int, ...],
    rank: int,
    step: int,
    config: RouterConfig,
    num_experts: int | None,
    names: tuple[str, str, str],
) -> RoutingTrace:
    logits: list[Tensor] | None = None
    ids_LTK = torch.stack([torch.cat([forward[layer].ids_TK for forward in forwards]) for layer in layers])
    first = forwards[0][layers[0]]
    if first.logits_TE is not None:
        if num_experts not in (None, first.logits_TE.shape[1]):
            raise ValueError(f"num_experts={num_experts} but logits are of {first.logits_TE.shape[1]} experts")
        num_experts = first.logits_TE.shape[1]
        logits = [torch.cat([f[layer].logits_TE for f in forwards]).float() for layer in layers]  # type: ignore[misc]
    if num_experts is None:
        raise ValueError("num_experts must be given: without logits, experts that nobody chose leave no sign")
    check_int("num_experts", num_experts, 1, MAX_EXPERTS)
    _check_range(ids_LTK, num_experts)
    top_k = ids_LTK.shape[2]
    config.check(num_experts, top_k)
    gates_LTK = None
    if logits is not None:
        ids_LTK, gates_LTK = _by_logit(ids_LTK, logits, config)
    lengths = [len(forward[layers[0]].ids_TK) for forward in forwards]
    documents = [
        Document(f"rank {rank}/step {step}/forward {i}", f"rank {rank}", "", 0, max(1, length))
        for i, length in enumerate(lengths)
    ]
    info = _info(config, num_experts, top_k, layers, documents, *names)
    half_logits = None if logits is None else torch.stack([half(f"logits of rank {rank}", x) for x in logits])
    return _trace(info, ids_LTK, half_logits, lengths, gates_LTK)


def _by_logit(ids_LTK: Tensor, logits: list[Tensor], config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Chosen experts by falling logit, dropped ones last, and the gates that their logits give them."""
    ids, gates = [], []
    for ids_TK, logits_TE in zip(ids_LTK, logits):
        dropped_TK = ids_TK < 0
        key_TK = logits_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(dropped_TK, -math.inf)
        ids_TK = ids_TK.gather(1, key_TK.sort(dim=1, descending=True, stable=True).indices)
        gates_TK = gates_of(score(logits_TE, config.score_func), ids_TK.clamp(min=0), config)
        ids.append(ids_TK)
        gates.append(gates_TK.masked_fill(ids_TK < 0, 0))
    return torch.stack(ids), torch.stack([half("gates", g) for g in gates])


def _check_range(ids_LTK: Tensor, num_experts: int) -> None:
    if ids_LTK.numel():
        low, high = (int(v) for v in ids_LTK.aminmax())
        if low < -1 or high >= num_experts:
            bad = low if low < -1 else high
            raise ValueError(f"expert id {bad} is not from 0 to {num_experts - 1} (or -1 for dropped)")


def _info(
    router: RouterConfig,
    num_experts: int,
    top_k: int,
    layers: Sequence[int],
    documents: Sequence[Document],
    model: str,
    source: str,
    licence: str,
) -> TraceInfo:
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


def _trace(
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
