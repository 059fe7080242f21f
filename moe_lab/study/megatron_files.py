"""The files of Megatron-Core's router tracer: records of a rank, read a step at a time."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.importers import integers
from moe_lab.study.info import MAX_EXPERTS

MAX_LINE = 2**28  # characters of a record: half a million tokens


class Record(NamedTuple):
    """One line of a rank's file: a layer's choices in one forward of one step."""

    step: int
    layer: int
    ids_TK: Tensor
    logits_TE: Tensor | None


def steps_of(path: Path, rank: int, block: str) -> Iterator[tuple[int, list[dict[int, Record]]]]:
    """Each step's forwards: records by layer. The n-th record of a layer belongs to the n-th forward."""
    by_layer: dict[int, list[Record]] = defaultdict(list)
    step: int | None = None
    logits_path = path.with_name(f"logits_rank{rank}.bin")
    with path.open(encoding="utf-8", errors="strict") as file:
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            try:
                record = _record(line, block, logits_path)
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


def _forwards(by_layer: dict[int, list[Record]], path: Path, step: int) -> list[dict[int, Record]]:
    count = {len(records) for records in by_layer.values()}
    if len(count) > 1:
        raise ValueError(f"{path.name} step {step}: layers were recorded {sorted(count)} times: a forward is not whole")
    forwards = [dict(zip(by_layer, records)) for records in zip(*by_layer.values())]
    for forward in forwards:
        if len({(r.ids_TK.shape, r.logits_TE is None or r.logits_TE.shape) for r in forward.values()}) > 1:
            raise ValueError(f"{path.name} step {step}: layers of one forward differ in tokens, topk or logits")
    records = [record for forward in forwards for record in forward.values()]
    if len({(r.ids_TK.shape[1], r.logits_TE is None or r.logits_TE.shape[1]) for r in records}) > 1:
        raise ValueError(f"{path.name} step {step}: forwards differ in topk or logits")
    return forwards


def _record(line: str, block: str, logits_path: Path) -> Record | None:
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
    logits_TE = _logits(record, logits_path) if "logit_offset" in record else None
    return Record(record["step"], record["layer"], ids_TK, logits_TE)


def _logits(record: dict[str, object], path: Path) -> Tensor:
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
