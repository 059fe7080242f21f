"""Writing a trace that does not fit in memory: piece by piece into the file that `RoutingTrace.load` reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from moe_lab.study.columns import LAYER_FIELDS, TOKEN_FIELDS
from moe_lab.study.compact import small_dtype
from moe_lab.study.info import Document
from moe_lab.study.trace import METADATA_KEY, RoutingTrace
from moe_lab.study.validate import check_alike

# Names of the safetensors format (github.com/huggingface/safetensors, "Format").
DTYPES = {
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.bool: "BOOL",
}


class TraceWriter:
    """Appends traces of one model, as `RoutingTrace.concatenate` joins them, and writes them as one file.

        with TraceWriter(path) as writer:
            for part in parts:
                writer.append(part)

    A trace's file is ordered by layer, so every layer is kept in a file of its own beside the target until the
    end: twice the disk, and memory for a few parts, however many come. Documents are taken over as they come, equal
    or not. Nothing is written when the block raises. Raises `ValueError` for parts that differ in more than their
    documents and tokens, and when there is none.
    """

    def __init__(self, path: str | Path) -> None:
        self._target = Path(path)
        self._scratch: Path | None = None
        self._first: RoutingTrace | None = None
        self._documents: list[Document] = []
        self._dtypes: dict[str, torch.dtype] = {}
        self.num_tokens = 0

    def __enter__(self) -> TraceWriter:
        self._scratch = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=self._target.parent))
        return self

    def append(self, part: RoutingTrace) -> None:
        """Add the tokens of a trace. Ids are kept in int16, so that a later part may hold dropped ones."""
        if self._first is None:
            self._first = part.select(start=0, tokens=1) if part.num_tokens else part
        check_alike(self._first, part)
        document_T = part.document_T + len(self._documents)
        self._documents += part.info.documents
        self._add("document_T", document_T)
        self._add("position_T", part.position_T)
        self._add("valid_T", part.valid_T)
        for name in LAYER_FIELDS:
            value_LTX = getattr(part, name)
            if value_LTX is not None:
                wide = name == "expert_ids_LTK"
                for layer, value_TX in enumerate(value_LTX):
                    self._add(f"{name}.{layer}", value_TX.to(torch.int16) if wide else value_TX)
        self.num_tokens += part.num_tokens

    def _add(self, name: str, values: Tensor) -> None:
        assert self._scratch is not None, "append inside the with block"
        self._dtypes[name.partition(".")[0]] = values.dtype
        with (self._scratch / name).open("ab") as file:
            file.write(values.contiguous().view(torch.uint8).numpy().tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._scratch is not None
        try:
            if kind is None:
                self._finish(self._scratch)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _finish(self, scratch: Path) -> None:
        first = self._first
        if first is None:
            raise ValueError("no trace was appended: there is nothing to write")
        if first.num_experts <= 256 and not self._any_dropped(scratch, first.num_layers):
            self._narrow(scratch, first.num_layers)
        parts: list[tuple[str, list[int], list[str]]] = [(name, [self.num_tokens], [name]) for name in TOKEN_FIELDS]
        for name in LAYER_FIELDS:
            if (value := getattr(first, name)) is not None:
                shape = [first.num_layers, self.num_tokens, value.shape[2]]
                parts.append((name, shape, [f"{name}.{layer}" for layer in range(first.num_layers)]))
        if first.expert_bias_LE is not None:
            self._add("expert_bias_LE", first.expert_bias_LE)
            parts.append(("expert_bias_LE", list(first.expert_bias_LE.shape), ["expert_bias_LE"]))
        parts.sort(key=lambda part: -self._dtypes[part[0]].itemsize)  # so that every tensor is aligned
        info = dataclasses.replace(first.info, documents=tuple(self._documents))
        header: dict[str, object] = {"__metadata__": {METADATA_KEY: info.to_json()}}
        end = 0
        for name, shape, files in parts:
            start, end = end, end + sum((scratch / file).stat().st_size for file in files)
            header[name] = {"dtype": DTYPES[self._dtypes[name]], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = scratch / "whole"
        with whole.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, _, files in parts:
                for file in files:
                    with (scratch / file).open("rb") as source:
                        shutil.copyfileobj(source, out, 2**22)
                    (scratch / file).unlink()
        whole.replace(self._target)

    def _any_dropped(self, scratch: Path, num_layers: int) -> bool:
        return any((ids < 0).any() for layer in range(num_layers) for ids in _pieces(scratch, layer))

    def _narrow(self, scratch: Path, num_layers: int) -> None:
        """Ids of an expert that all fit in a byte are kept in bytes."""
        for layer in range(num_layers):
            narrow = scratch / "narrow"
            with narrow.open("wb") as out:
                for ids in _pieces(scratch, layer):
                    out.write(ids.to(torch.uint8).numpy().tobytes())
            narrow.replace(scratch / f"expert_ids_LTK.{layer}")
        self._dtypes["expert_ids_LTK"] = small_dtype(256)


def write_trace(path: str | Path, parts: Iterable[RoutingTrace]) -> None:
    """Write all parts as one file, see `TraceWriter`."""
    with TraceWriter(path) as writer:
        for part in parts:
            writer.append(part)


def _pieces(scratch: Path, layer: int) -> Iterator[Tensor]:
    with (scratch / f"expert_ids_LTK.{layer}").open("rb") as file:
        while content := file.read(2**22):
            yield torch.frombuffer(bytearray(content), dtype=torch.int16)
