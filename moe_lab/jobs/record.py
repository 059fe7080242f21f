"""Record what ships in `data/traces`: the language model's routing over held-out text and the lab's own pages.

Three traces: `balanced` with logits, `balanced_wide` with ids only over more text, and `pages`, whose text is in
`data/pages`. Held-out documents are spans of files, in the order of their hashes, so that neighbours mix domains
as shuffled packed documents do.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from moe_lab import data
from moe_lab.jobs.corpus_file import Split, load_corpus
from moe_lab.jobs.evaluate import as_tensor
from moe_lab.models.lm import MoELM
from moe_lab.study.trace import Document, RoutingTrace, record

PAGES = {
    "python": "python.py",
    "cpp": "cpp.h",
    "javascript": "javascript.js",
    "prose": "prose.md",
    "data": "data.json",
}


LENGTHS = {"narrow": 256, "wide": 512}  # bytes of a passage


class Passage(NamedTuple):
    """A span of text and where it is from."""

    document: Document
    text_B: UInt8[Tensor, " B"]


def heldout_passages(split: Split, per_domain: int, length: int) -> list[Passage]:
    """`per_domain` spans of `length` bytes from different files of each domain, placed by the files' hashes."""
    passages = []
    for domain in sorted({d.domain for d in split.documents}):
        long = [i for i, d in enumerate(split.documents) if d.domain == domain and d.length >= length]
        if len(long) < per_domain:
            raise ValueError(f"{domain}: {len(long)} held-out files of >= {length} bytes, {per_domain} are needed")
        for i in sorted(long, key=lambda i: split.documents[i].sha256)[:per_domain]:
            document, start = split.documents[i], int(split.starts_F1[i])
            offset = int(document.sha256[:8], 16) % (document.length - length + 1)
            span = Document(document.name, domain, document.sha256, document.offset + offset, length)
            passages.append(Passage(span, split.text_B[start + offset : start + offset + length]))
    return sorted(passages, key=lambda p: p.document.sha256[8:])


def page_passages(folder: Path) -> list[Passage]:
    """The lab's own page of each domain, whole."""
    passages = []
    for domain, name in PAGES.items():
        text = (folder / name).read_bytes()
        document = Document(f"pages:{name}", domain, hashlib.sha256(text).hexdigest(), 0, len(text))
        passages.append(Passage(document, as_tensor(text)))
    return passages


@torch.inference_mode()
def record_passages(
    model: MoELM, passages: Sequence[Passage], *, name: str, source: str, gates: bool = True, logits: bool = True
) -> RoutingTrace:
    """Routing of every layer over each passage by itself: its first byte has no context. `name` is the model's."""
    device = next(model.parameters()).device
    with record(model, gates=gates, logits=logits) as recorder:
        for document, text_B in tqdm(passages, desc="record", unit="passage", file=sys.stderr, delay=2):
            recorder.begin(document)
            model(text_B.long()[None].to(device))
    return recorder.trace(model=name, source=source, licence="Apache-2.0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab record`."""
    parser.add_argument("--corpus", type=Path, required=True, help="file written by moe-lab corpus")
    parser.add_argument("--lm", type=Path, help="folder of a trained model (default: the shipped one)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the traces")
    parser.add_argument("--name", default="balanced", help="first part of the traces' names")


def main(args: argparse.Namespace) -> None:
    """Write the three traces and print what they hold."""
    model = MoELM.load(args.lm) if args.lm else data.load_lm()
    split = load_corpus(args.corpus).heldout
    name, text = f"moe_lab byte LM, {args.name}", "held-out text of a Python environment"
    narrow, wide = heldout_passages(split, 8, LENGTHS["narrow"]), heldout_passages(split, 23, LENGTHS["wide"])
    pages = page_passages(data.root() / "pages")
    traces = {
        args.name: record_passages(model, narrow, name=name, source=text),
        f"{args.name}_wide": record_passages(model, wide, name=name, source=text, gates=False, logits=False),
        f"{args.name}_pages": record_passages(model, pages, name=name, source="data/pages"),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for name, trace in traces.items():
        path = args.out / f"{name}.safetensors"
        trace.save(path)
        print(f"{name}: {trace.num_tokens:,} tokens, {path.stat().st_size / 1e6:.2f} MB")
