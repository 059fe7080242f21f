"""The corpus as a value and as a file: texts end to end, what each is, and checks on loading."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.study.trace import Document

FORMAT = "moe_lab corpus 1"


@dataclass(frozen=True)
class Split:
    """Texts laid end to end, domain by domain; text i is `text_B[starts_F1[i]:starts_F1[i + 1]]`.

    Raises `ValueError` when the starts, the documents' lengths and the bytes don't fit together, or when the
    documents of one domain are not next to each other.
    """

    text_B: UInt8[Tensor, " B"]
    starts_F1: Int64[Tensor, " F1"]
    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        ends = torch.tensor([0] + [d.length for d in self.documents]).cumsum(0)
        if not torch.equal(ends, self.starts_F1) or int(ends[-1]) != len(self.text_B):
            raise ValueError(
                f"starts_F1: {len(self.starts_F1)} starts over {len(self.text_B)} bytes do not fit "
                f"{len(self.documents)} documents of {int(ends[-1])} bytes"
            )
        changes = sum(a.domain != b.domain for a, b in zip(self.documents, self.documents[1:], strict=False))
        if changes + 1 > max(1, len(self.domains)):
            raise ValueError("documents: those of one domain must be next to each other")

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in the order of their texts."""
        return tuple(dict.fromkeys(document.domain for document in self.documents))

    def text(self, index: int) -> bytes:
        """The bytes of one document."""
        return self.text_B[self.starts_F1[index] : self.starts_F1[index + 1]].numpy().tobytes()

    def texts(self, domain: str | None = None) -> Iterator[bytes]:
        """The bytes of every document, or of those of one domain."""
        return (self.text(i) for i, d in enumerate(self.documents) if domain in (None, d.domain))

    def domain(self, name: str) -> UInt8[Tensor, " B"]:
        """All text of a domain: a view, empty when there is none."""
        mine = [i for i, d in enumerate(self.documents) if d.domain == name]
        return self.text_B[self.starts_F1[mine[0]] : self.starts_F1[mine[-1] + 1]] if mine else self.text_B[:0]

    @property
    def sha256(self) -> str:
        """Hex digest of all the text."""
        return hashlib.sha256(self.text_B.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text; `about` has the config, package versions and, by domain, the overlap left."""

    train: Split
    heldout: Split
    about: dict[str, Any]

    @property
    def train_U8(self) -> UInt8[Tensor, " B"]:
        return self.train.text_B

    @property
    def heldout_U8(self) -> UInt8[Tensor, " B"]:
        return self.heldout.text_B


def gzip_bits_per_byte(split: Split) -> dict[str, float]:
    """Bits that `gzip -9` needs per byte of text, each document by itself: by domain, then for "all".

    The sum of the compressed sizes, headers included, over the sum of the sizes.
    """
    bits = {domain: _gzip_bits(split, domain) for domain in split.domains}
    sizes = {domain: len(split.domain(domain)) for domain in split.domains}
    return {d: bits[d] / sizes[d] for d in bits} | {"all": sum(bits.values()) / max(1, sum(sizes.values()))}


def _gzip_bits(split: Split, domain: str) -> int:
    return sum(8 * len(gzip.compress(text, 9, mtime=0)) for text in split.texts(domain))


def save_corpus(corpus: Corpus, path: str | Path) -> None:
    """Write the corpus as one safetensors file; the same corpus gives the same file, byte for byte."""
    tensors = {
        "train": corpus.train.text_B,
        "train_starts": corpus.train.starts_F1,
        "heldout": corpus.heldout.text_B,
        "heldout_starts": corpus.heldout.starts_F1,
    }
    save_file(tensors, path, metadata={"corpus": json.dumps(describe(corpus))})


def save_manifest(corpus: Corpus, path: str | Path) -> None:
    """Write what the corpus is made of, without its text, as JSON.

    By split and domain, a document is a row: its source's sha256, the bytes taken from its start, its name.
    """
    shown = describe(corpus)
    parts = [f'"{key}": {json.dumps(shown[key], indent=1)}' for key in ("format", "about")]
    for key in _SPLITS:
        rows: dict[str, list[str]] = {}
        for d in shown[key]["documents"]:
            rows.setdefault(d["domain"], []).append(json.dumps([d["sha256"], d["length"], d["name"]]))
        domains = ",\n".join(f'"{domain}": [\n' + ",\n".join(some) + "\n]" for domain, some in rows.items())
        parts.append(f'"{key}": {{"sha256": "{shown[key]["sha256"]}", "documents": {{\n{domains}\n}}}}')
    Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def describe(corpus: Corpus) -> dict[str, Any]:
    """All but the text, as JSON values."""
    splits = {
        key: {"sha256": split.sha256, "documents": [asdict(d) for d in split.documents]}
        for key, split in (("train", corpus.train), ("heldout", corpus.heldout))
    }
    return {"format": FORMAT, "about": corpus.about} | splits


def load_corpus(path: str | Path) -> Corpus:
    """Read a corpus file.

    Raises `ValueError` when it is truncated, something else, or does not hold the bytes it was written with.
    """
    try:
        with safe_open(path, "pt") as file:
            shown = json.loads((file.metadata() or {}).get("corpus", "{}"))
            if shown.get("format") != FORMAT:
                raise ValueError(f"its format is {shown.get('format')!r}, expected {FORMAT!r}")
            train, heldout = (
                _load_split(file.get_tensor(key), file.get_tensor(f"{key}_starts"), shown[key]) for key in _SPLITS
            )
            return Corpus(train, heldout, dict(shown["about"]))
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: not a whole corpus file, write it again (moe-lab corpus): {error}") from error


def _load_split(text_B: Tensor, starts_F1: Tensor, shown: dict[str, Any]) -> Split:
    if text_B.dtype != torch.uint8 or starts_F1.dtype != torch.int64:
        raise ValueError(f"its text and starts are {text_B.dtype} and {starts_F1.dtype}")
    split = Split(text_B, starts_F1, tuple(Document(**document) for document in shown["documents"]))
    if split.sha256 != shown["sha256"]:
        raise ValueError(f"its text has sha256 {split.sha256}, expected {shown['sha256']}")
    return split


_SPLITS = ("train", "heldout")
