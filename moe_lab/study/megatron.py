"""Megatron-Core's router traces: a folder with one JSONL a rank, as traces."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from moe_lab.config import RouterConfig, ScoreFunc, check_int
from moe_lab.layer.router import gates_of, score
from moe_lab.study.compact import half
from moe_lab.study.files import read_tensors
from moe_lab.study.importers import check_range, of_documents, provenance
from moe_lab.study.info import MAX_EXPERTS, Document
from moe_lab.study.megatron_files import Record, steps_of
from moe_lab.study.trace import RoutingTrace


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
    `moe_lab.study.compare.reproduced`. The first `router_state_rank{rank}.pt` (`--moe-routing-trace-dump-weights`)
    gives the balancing bias, and the score function where `router` is not given.

    A document is one rank's forward in one step (its `micro_batch` the forward's number: a recomputed forward counts
    again, the files do not tell), its domain the rank. Of multi-token-prediction blocks and others only `block` is
    read. One step of one rank is in memory at a time. Without logits, `num_experts` must be given.

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
        raise ValueError(f"{str(folder)!r} holds no router_trace_rank*.jsonl")
    config, bias = _state(folder, sorted(found), router)
    layers: tuple[int, ...] | None = None
    for rank in sorted(found if ranks is None else set(ranks)):
        for step, forwards in steps_of(found[rank], rank, block):
            for forward in forwards:
                own = tuple(sorted(forward))
                layers = layers or own
                if own != layers:
                    raise ValueError(
                        f"rank {rank} holds layers {own}, others hold {layers}: choose ranks= of one pipeline stage"
                    )
            part = _trace(forwards, layers or (), rank, step, config, num_experts, (model, source, licence))
            yield dataclasses.replace(part, expert_bias_LE=_stacked(bias, part)) if bias else part


def _state(folder: Path, ranks: list[int], router: RouterConfig | None) -> tuple[RouterConfig, dict[int, Tensor]]:
    """How the routers choose and their balancing biases by layer, from what a rank dumped of them."""
    path = next((p for rank in ranks if (p := folder / f"router_state_rank{rank}.pt").exists()), None)
    if path is None:
        return router or RouterConfig(), {}
    state: Any = read_tensors(path)
    if not isinstance(state, dict) or not all(type(k) is int and isinstance(v, dict) for k, v in state.items()):
        raise ValueError(f"{path.name} must hold a dict by layer")
    functions = {layer.get("score_function") for layer in state.values()} & set(get_args(ScoreFunc))
    if router is None and len(functions) == 1:
        router = RouterConfig(score_func=functions.pop())
    biases = {layer: values.get("expert_bias") for layer, values in state.items()}
    return router or RouterConfig(), {layer: bias for layer, bias in biases.items() if isinstance(bias, Tensor)}


def _stacked(bias: dict[int, Tensor], part: RoutingTrace) -> Tensor:
    zero_E = torch.zeros(part.num_experts)
    rows = [bias.get(layer, zero_E).float() for layer in part.info.layers]
    if any(row.shape != zero_E.shape for row in rows):
        raise ValueError(f"router_state: expert_bias of {[tuple(r.shape) for r in rows]!r:.80}, not {part.num_experts}")
    return torch.stack(rows)


def _trace(
    forwards: list[dict[int, Record]],
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
    check_range(ids_LTK, num_experts)
    top_k = ids_LTK.shape[2]
    config.check(num_experts, top_k)
    gates_LTK = None
    if logits is not None:
        ids_LTK, gates_LTK = _by_logit(ids_LTK, logits, config)
    lengths = [len(forward[layers[0]].ids_TK) for forward in forwards]
    documents = [
        Document(f"rank {rank}/step {step}/forward {i}", f"rank {rank}", "", 0, max(1, length), step, rank, i)
        for i, length in enumerate(lengths)
    ]
    info = provenance(config, num_experts, top_k, layers, documents, *names)
    half_logits = None if logits is None else torch.stack([half(f"logits of rank {rank}", x) for x in logits])
    return of_documents(info, ids_LTK, half_logits, lengths, gates_LTK)


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
