"""Counts of assignments by step, layer, rank and expert: what many runs keep when they keep no ids."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moe_lab.config import check_int
from moe_lab.study.info import MAX_EXPERTS

DIMS = ("step", "layer", "rank", "expert")
MAX_CELLS = 2**27
MAX_FILE = 2**30


@dataclass(frozen=True, eq=False, repr=False)
class CountsTrace:
    """Assignments kept by each expert: `counts_SLRE` int64, with the names of steps S, layers L and ranks R.

    Which tokens they came from is not known, so nothing that needs ids (traffic without duplicates,
    co-activation) can be had from it. Raises `ValueError` for negative counts and names that do not fit.
    """

    counts_SLRE: Tensor
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        counts = self.counts_SLRE
        if not isinstance(counts, Tensor) or counts.dim() != 4 or counts.dtype != torch.int64 or counts.is_cuda:
            raise ValueError("counts_SLRE must be an int64 CPU tensor: steps, layers, ranks, experts")
        if not counts.numel():
            raise ValueError(f"counts_SLRE of shape {tuple(counts.shape)} holds no counts")
        if int(counts.min()) < 0:
            raise ValueError(f"counts_SLRE holds {int(counts.min())}: counts cannot be negative")
        check_int("experts", counts.shape[3], 1, MAX_EXPERTS)
        for name, names, size in zip(("steps", "layers", "ranks"), (self.steps, self.layers, self.ranks), counts.shape):
            if len(names) != size or len(set(names)) != size or any(type(n) is not int or n < 0 for n in names):
                raise ValueError(f"{name}={names!r:.80} must be {size} different integers >= 0")

    @property
    def num_experts(self) -> int:
        return self.counts_SLRE.shape[3]

    @property
    def counts_LE(self) -> Int[Tensor, "L E"]:
        """Over all steps and ranks."""
        return self.counts_SLRE.sum(dim=(0, 2))

    def __repr__(self) -> str:
        return (
            f"CountsTrace: {len(self.steps):,} steps, {len(self.layers)} layers, {len(self.ranks)} ranks, "
            f"{self.num_experts} experts, {int(self.counts_SLRE.sum()):,} assignments"
        )

    def select(self, *, step: int | None = None, layer: int | None = None, rank: int | None = None) -> CountsTrace:
        """The part of one step, layer or rank, by its name. `ValueError` for one that is not here."""
        counts = self.counts_SLRE
        names = {"step": self.steps, "layer": self.layers, "rank": self.ranks}
        for dim, (name, wanted) in enumerate({"step": step, "layer": layer, "rank": rank}.items()):
            if wanted is not None:
                if wanted not in names[name]:
                    raise ValueError(f"{name}={wanted!r} is not here: choose one of {names[name]!r:.80}")
                counts = counts.narrow(dim, names[name].index(wanted), 1)
                names[name] = (wanted,)
        return CountsTrace(counts, names["step"], names["layer"], names["rank"])

    @classmethod
    def from_tensor(cls, counts: Tensor | np.ndarray, dims: Sequence[str]) -> CountsTrace:
        """Counts whose dimensions are named, in any order: some of "step", "layer", "rank", and "expert".

        A dimension that is not named has one entry. `ValueError` for other names and counts that are no integers.
        """
        values = torch.as_tensor(counts)
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"counts are {values.dtype}: must be integers")
        if sorted(set(dims)) != sorted(dims) or not set(dims) <= set(DIMS) or "expert" not in dims:
            raise ValueError(f"dims={tuple(dims)} must be different names of {DIMS}, 'expert' among them")
        if values.dim() != len(dims):
            raise ValueError(f"counts have {values.dim()} dimensions, dims={tuple(dims)} names {len(dims)}")
        present = [dim for dim in DIMS if dim in dims]
        values = values.detach().cpu().long().permute([list(dims).index(dim) for dim in present])
        for place, dim in enumerate(DIMS):
            if dim not in dims:
                values = values.unsqueeze(place)
        return cls(values.contiguous(), *(tuple(range(size)) for size in values.shape[:3]))

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], *, num_experts: int | None = None) -> CountsTrace:
        """One count a record: "expert", "count", and any of "step", "layer", "rank" (0 where left out).

        What no record names is 0. Without `num_experts` experts end at the highest one named: say how many there
        are when the last ones may be dead. `ValueError` for other fields, values that are no integers >= 0, and
        for a cell that is named twice.
        """
        cells: dict[tuple[int, int, int, int], int] = {}
        for number, record in enumerate(records, 1):
            if not {"expert", "count"} <= set(record) <= {*DIMS, "count"}:
                found = ", ".join(map(repr, record))
                raise ValueError(
                    f"record {number} has {found:.120}: must have 'expert' and 'count', and of the rest only {DIMS[:3]}"
                )
            for name, value in record.items():
                limit = MAX_EXPERTS - 1 if name == "expert" else 2**62 if name == "count" else 2**31 - 1
                try:
                    check_int(name, value, 0, limit)
                except ValueError as error:
                    raise ValueError(f"record {number}: {error}") from None
            cell = tuple(record.get(dim, 0) for dim in DIMS)
            if cell in cells:
                raise ValueError(f"record {number}: {dict(zip(DIMS, cell))} is counted twice")
            cells[cell] = record["count"]
        if not cells:
            raise ValueError("no counts: there must be at least one record")
        names = [sorted({cell[dim] for cell in cells}) for dim in range(3)]
        experts = max(cell[3] for cell in cells) + 1
        if num_experts is not None:
            check_int("num_experts", num_experts, experts, MAX_EXPERTS)
            experts = num_experts
        shape = (*map(len, names), experts)
        if math.prod(shape) > MAX_CELLS:
            raise ValueError(f"{shape} steps, layers, ranks and experts are more than {MAX_CELLS:,} cells")
        place = [{name: i for i, name in enumerate(of)} for of in names]
        counts = torch.zeros(shape, dtype=torch.int64)
        index = torch.tensor([[place[d][cell[d]] for d in range(3)] + [cell[3]] for cell in cells]).unbind(1)
        counts[index] = torch.tensor(list(cells.values()))
        return cls(counts, *map(tuple, names))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, num_experts: int | None = None) -> CountsTrace:
        """Read counts from a JSON or CSV file.

        JSON: {"dims": ["step", "layer", "expert"], "counts": nested lists}, or a list of records (`from_records`).
        CSV: a header and a record a line: step,layer,rank,expert,count.

        Raises `ValueError`, naming the file, for anything else.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_FILE:
                raise ValueError(f"is larger than {MAX_FILE:,} bytes")
            if path.suffix == ".csv":
                return cls.from_records(_csv_records(path), num_experts=num_experts)
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, list):
                if not all(isinstance(record, dict) for record in content):
                    raise ValueError("a list must be of records, such as {'layer': 0, 'expert': 3, 'count': 17}")
                return cls.from_records(content, num_experts=num_experts)
            if not isinstance(content, dict) or set(content) != {"dims", "counts"}:
                raise ValueError("must hold {'dims': [...], 'counts': [...]} or a list of records")
            if not isinstance(content["dims"], list) or not all(isinstance(d, str) for d in content["dims"]):
                raise ValueError("dims must be a list of names")
            counts = _nested(content["counts"])
            trace = cls.from_tensor(counts, content["dims"])
            if num_experts not in (None, trace.num_experts):
                raise ValueError(f"num_experts={num_experts} but counts are of {trace.num_experts}")
            return trace
        except (OSError, RecursionError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is no file of counts: {error}") from error


def _nested(counts: object) -> np.ndarray:
    try:
        array = np.asarray(counts)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind != "i":
        raise ValueError("counts must be nested lists of integers, as long as each other")
    return array


def _csv_records(path: Path) -> Iterable[dict[str, int]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # Excel begins a file with a mark
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) != len(header):
                raise ValueError(f"its header names a column twice: {header!r:.80}")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header {len(header)}")
                yield dict(zip(header, (_integer(cell, reader.line_num) for cell in cells)))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None


def _integer(cell: str, line: int) -> int:
    text = cell.strip()
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ValueError(f"line {line}: {cell!r:.40} is no integer >= 0")
    return int(text)
