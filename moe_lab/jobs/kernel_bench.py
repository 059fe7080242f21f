"""The kernels that only move rows, on CUDA, beside what their bytes take at the copy rate of the same minute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from moe_lab.jobs.bench_inputs import Inputs
from moe_lab.study import timing
from moe_lab.study.measurements import Measurement, measured

COPY_BYTES = 2**30


def kernel_rows(inputs: Inputs, rounds: int, of: dict[str, Any]) -> Iterator[Measurement]:
    """Sort, gather and combine of `backend="fused"`; the sort without the gaps between its launches."""
    from moe_lab.kernels import combine
    from moe_lab.kernels.tiles import tile_rows

    tokens, dim = inputs.x_TD.shape
    num_rows, num_experts = inputs.expert_ids_TK.numel(), len(inputs.w1_EFD)
    rows = tile_rows(inputs.expert_ids_TK, num_experts)
    rows_PD = combine.gather(inputs.x_TD, rows)
    big, other = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device=rows_PD.device)
    arms = {
        "copy": lambda: other.copy_(big),
        "gather": lambda: combine.gather(inputs.x_TD, rows),
        "combine": lambda: combine.combine(rows_PD, inputs.gates_TK, rows),
    }
    runs = timing.interleave(arms, rows_PD.device, rounds=rounds, block_ms=10)
    byte_ms = timing.summarise(timing.medians(runs.pop("copy"))).median / (2 * COPY_BYTES)
    row_bytes = dim * inputs.x_TD.element_size()
    moved = (num_rows + tokens) * row_bytes  # a token read and its rows written, or the other way round
    for name, found in runs.items():
        yield measured(found, arm=name, bytes_ms=moved * byte_ms, **of)
    sort = timing.time_replayed(lambda: tile_rows(inputs.expert_ids_TK, num_experts))
    yield Measurement(arm="sort", **sort._asdict(), **of)
