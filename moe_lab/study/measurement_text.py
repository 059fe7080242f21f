"""Measurements as aligned text, a table for each layer and bench."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_lab.study.measurements import Measurement

HEADS = ("", "direction", "ms", "95 %", "IQR", "p90", "p99", "ratio", "95 %", "roofline", "saved", "peak", "error")


def lines(rows: Iterable[Measurement]) -> str:
    """Rows of one layer and bench as aligned text; saved and peak in MiB, empty columns left out."""
    rows = list(rows)
    head = rows[0]
    of = f"T {head.tokens}  D {head.dim}  F {head.hidden_dim}  E {head.num_experts}  K {head.top_k}"
    title = f"{head.layer}   {of}   {head.bench}, {head.dtype}"
    title += f", {head.ranks} ranks" if head.ranks > 1 else ""
    title += "" if head.max_over_mean is None else f"   max/mean {head.max_over_mean:.2f}"
    table: list[list[str]] = [list(HEADS)]
    table += [_cells(row) for row in rows]
    kept = [i for i in range(len(table[0])) if any(cells[i] for cells in table[1:])]
    widths = [max(len(cells[i]) for cells in table) for i in kept]
    shown = []
    for cells in table:
        padded = [cells[i].ljust(w) if i < 2 else cells[i].rjust(w) for i, w in zip(kept, widths)]
        shown.append("  ".join(padded).rstrip())
    return "\n".join([title, *shown])


def _cells(row: Measurement) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def pair(low: float | None, high: float | None, form: str) -> str:
        return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"

    name = row.arm if row.phase == "all" else f"{row.arm} {row.phase}"
    name += f" (rank {row.rank})" if row.rank is not None else ""
    return [
        name + {"eager": "", "compile": " compiled", "graph": " replayed"}[row.mode],
        row.direction,
        number(row.median, ".3f"),
        pair(row.low, row.high, ".3f"),
        pair(row.q25, row.q75, ".3f"),
        number(row.p90, ".3f"),
        number(row.p99, ".3f"),
        number(row.ratio, ".2f") + (f" {row.ratio_to}" if row.ratio_to else ""),
        pair(row.ratio_low, row.ratio_high, ".2f"),
        number(row.roofline_share, ".2f"),
        *(number(None if size is None else size / 2**20, ".0f") for size in (row.saved, row.peak)),
        number(row.error, ".1e"),
    ]
