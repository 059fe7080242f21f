"""What the trained model is worth: bits per byte beside gzip's, and what its experts know of the kind of text."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moe_lab import data
from moe_lab.jobs.corpus_file import Corpus, Split, gzip_bits_per_byte, load_corpus
from moe_lab.jobs.options import new_file
from moe_lab.jobs.record import Passage, record_passages
from moe_lab.jobs.train import heldout_bits
from moe_lab.models.lm import MoELM
from moe_lab.study.domains import Classification, byte_explains, byte_histograms, classify, domain_histograms
from moe_lab.study.trace import Document

WINDOW = 256


def passages(split: Split, files: int | None, length: int, per_file: int) -> Iterator[Passage]:
    """The first `per_file` passages of at most `length` bytes of the first `files` files of each domain."""
    taken = dict.fromkeys(split.domains, 0)
    for i, document in enumerate(split.documents):
        if files is not None and taken[document.domain] >= files:
            continue
        taken[document.domain] += 1
        text_B = split.text_B[split.starts_F1[i] : split.starts_F1[i + 1]]
        for offset in range(0, min(len(text_B), per_file * length), length):
            piece_B = text_B[offset : offset + length]
            span = Document(document.name, document.domain, document.sha256, document.offset + offset, len(piece_B))
            yield Passage(span, piece_B)


def domains_report(model: MoELM, corpus: Corpus, train_files: int, per_file: int) -> dict[str, Any]:
    """Windows of held-out text named by centroids of training text: from experts, and from bytes alone.

    Each by the nearest centroid as it is, and after whitening by the training windows (see `nearest_centroid`).
    The share of the first expert's entropy that the byte explains is by layer, over the held-out windows.
    """
    length = model.config.max_length
    spans = [
        list(passages(corpus.train, train_files, length, 1)),
        list(passages(corpus.heldout, None, length, per_file)),
    ]
    traces = [record_passages(model, s, name="reported", source="corpus", gates=False, logits=False) for s in spans]
    texts = [torch.cat([p.text_B for p in s]) for s in spans]
    experts = [domain_histograms(t, WINDOW) for t in traces]
    characters = [byte_histograms(t, b, WINDOW) for t, b in zip(traces, texts, strict=True)]
    return {
        "window": WINDOW,
        "by_experts": _named(classify(experts[1], experts[0])),
        "by_experts_whitened": _named(classify(experts[1], experts[0], whiten=True)),
        "by_bytes": _named(classify(characters[1], characters[0])),
        "by_bytes_whitened": _named(classify(characters[1], characters[0], whiten=True)),
        "byte_explains_by_layer": [round(share, 4) for share in byte_explains(traces[1], texts[1]).tolist()],
    }


def _named(result: Classification) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "windows": int(result.confusion_DD.sum()),
        "domains": list(result.domains),
        "confusion": result.confusion_DD.tolist(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab report`."""
    parser.add_argument("--corpus", type=Path, required=True, help="file written by moe-lab corpus")
    parser.add_argument("--lm", type=Path, help="folder of a trained model (default: the shipped one)")
    parser.add_argument("--out", type=new_file, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train-files", type=int, default=60, help="training files a domain that make centroids")
    parser.add_argument("--per-file", type=int, default=2, help="passages of each held-out file to name")


def main(args: argparse.Namespace) -> None:
    """Evaluate over the whole held-out text and write the report."""
    corpus = load_corpus(args.corpus)
    model = (MoELM.load(args.lm) if args.lm else data.load_lm()).to(args.device)
    report = {
        "corpus": {"train_sha256": corpus.train.sha256, "heldout_sha256": corpus.heldout.sha256},
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "bits_per_byte": heldout_bits(model, corpus),
        "gzip_bits_per_byte": gzip_bits_per_byte(corpus.heldout),
        "domains": domains_report(model, corpus, args.train_files, args.per_file),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
