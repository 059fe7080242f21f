"""The text for training the small language model: chosen from the environment, split, written to one file."""

from __future__ import annotations

import argparse
import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from tqdm import tqdm

from moe_lab.jobs.corpus_file import Corpus, Split, gzip_bits_per_byte, save_corpus, save_manifest
from moe_lab.jobs.dedup import WINDOW, seen_windows, thin
from moe_lab.jobs.options import new_file
from moe_lab.jobs.sources import DOMAINS, Roots, is_text, list_sources, read_source
from moe_lab.study.trace import Document


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """How much to take, in bytes: `total_bytes` of all domains together, held-out numbers for each of them.

    A file gives its first `train_cap` or `heldout_cap` bytes, so that no bundle dominates (32 KiB is also as
    far back as gzip looks), and none when it is shorter than `min_length`. A file is left out when more than
    `max_repeated` of its windows occur in longer files of its domain. Files are held out until there are
    `heldout_files` of them with `heldout_bytes`, or half of the domain is looked through; at most `max_overlap`
    of each one's windows occur in the training text.
    """

    seed: int = 0
    total_bytes: int = 28_800_000
    heldout_bytes: int = 350_000
    heldout_files: int = 64
    train_cap: int = 256 << 10
    heldout_cap: int = 32 << 10
    min_length: int = 512
    max_repeated: float = 0.5
    max_overlap: float = 0.3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name.startswith("max_"):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name}={value}: expected a share between 0 and 1")
            elif name != "seed" and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")


class _Text(NamedTuple):
    document: Document
    text: bytes

    def cut(self, cap: int) -> _Text:
        """The first `cap` bytes, less what would be half a character."""
        text = self.text[:cap].decode(errors="ignore").encode()
        return _Text(Document(**{**asdict(self.document), "length": len(text)}), text)


def choose(config: CorpusConfig, roots: Roots | None = None, *, progress: bool = False) -> Corpus:
    """Choose the corpus from what the environment holds; the same environment and config give the same bytes.

    The order in which files are taken, and with it the split, comes from the seed and each file's content, so
    a file keeps its place when it is renamed. Near duplicates are dropped before the split.
    Raises `ValueError` when there is no text to train on or to hold out.
    """
    roots = roots or Roots.installed()
    heldout: list[_Text] = []
    offered: dict[str, list[_Text]] = {}
    for domain in DOMAINS:
        apart, offered[domain] = _hold_out(_distinct(domain, config, roots, progress), config)
        heldout += apart
    train = _fill(offered, config.total_bytes - sum(len(t.text) for t in heldout), config.min_length)
    train, heldout, overlap = _part(train, heldout, config.max_overlap, progress)
    if not train or not heldout:
        raise ValueError(f"{roots}: {len(train)} files to train on, {len(heldout)} to hold out, expected some of both")
    about = {"config": asdict(config), "window": WINDOW, "overlap": overlap, "versions": _versions(roots)}
    return Corpus(_split(train), _split(heldout), about)


def _part(
    train: list[_Text], heldout: list[_Text], max_overlap: float, progress: bool
) -> tuple[list[_Text], list[_Text], dict[str, float]]:
    """Move held-out texts that mostly repeat the training text over to it, until none is left.

    Also returns, by domain, the share of the remaining held-out windows that occur in the training text.
    """
    apart = [(t, np.zeros(max(0, len(t.text) - WINDOW + 1), bool)) for t in heldout]
    moved = train
    while moved:
        against = tqdm([t.text for t in moved], "overlap", disable=not progress)
        seen = seen_windows([t.text for t, _ in apart], against)
        apart = [(t, before | now) for (t, before), now in zip(apart, seen, strict=True)]
        moved = [t for t, found in apart if _share(found) > max_overlap]
        apart = [(t, found) for t, found in apart if _share(found) <= max_overlap]
        train = train + moved
    found_by_domain: dict[str, list[Bool[np.ndarray, " _"]]] = {}
    for text, found in apart:
        found_by_domain.setdefault(text.document.domain, []).append(found)
    overlap = {domain: _share(np.concatenate(found)) for domain, found in found_by_domain.items()}
    return sorted(train, key=lambda t: DOMAINS.index(t.document.domain)), [t for t, _ in apart], overlap


def _distinct(domain: str, config: CorpusConfig, roots: Roots, progress: bool) -> list[_Text]:
    """The domain's files that are text and not copies of one another, in the order of their seeded hash."""
    found: dict[str, _Text] = {}
    for name in tqdm(list(list_sources(domain, roots)), f"read {domain}", disable=not progress):
        source = read_source(name, roots)
        sha256 = hashlib.sha256(source).hexdigest()
        if len(source) >= config.min_length and sha256 not in found:
            text = _Text(Document(name, domain, sha256, 0, len(source)), source).cut(config.train_cap)
            if is_text(text.text):
                found[sha256] = text
    order = sorted(found, key=lambda sha256: hashlib.sha256(f"{config.seed} {sha256}".encode()).digest())
    texts = [found[sha256] for sha256 in order]
    return [texts[i] for i in thin([t.text for t in texts], config.max_repeated)]


def _hold_out(texts: list[_Text], config: CorpusConfig) -> tuple[list[_Text], list[_Text]]:
    """Part a domain into texts to hold out, looked for in its first half, and texts to offer for training."""
    pool = [t.cut(config.heldout_cap) for t in texts[: min(3 * config.heldout_files, len(texts) // 2)]]
    seen = seen_windows([t.text for t in pool], (t.text for t in texts[len(pool) :]))
    heldout: dict[str, _Text] = {}
    size = 0
    for text, found in zip(pool, seen, strict=True):
        if len(heldout) >= config.heldout_files and size >= config.heldout_bytes:
            break
        if _share(found) <= config.max_overlap:
            heldout[text.document.sha256] = text
            size += text.document.length
    return list(heldout.values()), [t for t in texts if t.document.sha256 not in heldout]


def _fill(offered: dict[str, list[_Text]], size: int, min_length: int) -> list[_Text]:
    """Share `size` bytes evenly among the domains; what a small one cannot use goes to the larger ones."""
    sizes = {domain: sum(len(t.text) for t in texts) for domain, texts in offered.items()}
    taken: dict[str, list[_Text]] = {}
    left = size
    for place, domain in enumerate(sorted(offered, key=lambda d: (sizes[d], d))):
        quota = left // (len(offered) - place)
        taken[domain] = []
        for text in offered[domain]:
            if quota < min_length:
                break
            taken[domain].append(text.cut(quota))
            quota -= taken[domain][-1].document.length
        left -= sum(t.document.length for t in taken[domain])
    return [text for domain in offered for text in taken[domain]]


def _split(texts: Sequence[_Text]) -> Split:
    joined = torch.frombuffer(bytearray(b"".join(t.text for t in texts)), dtype=torch.uint8)
    starts_F1 = torch.tensor([0] + [t.document.length for t in texts]).cumsum(0)
    return Split(joined, starts_F1, tuple(t.document for t in texts))


def _share(found: Bool[np.ndarray, " _"]) -> float:
    return float(found.mean()) if len(found) else 0.0


def _versions(roots: Roots) -> dict[str, str]:
    """Versions of Python and of all packages installed beside torch, from the names of their `.dist-info`."""
    names = sorted(path.name.removesuffix(".dist-info") for path in roots.site.glob("*.dist-info"))
    return {"python": platform.python_version()} | dict(name.split("-", 1) for name in names)


def table(corpus: Corpus) -> str:
    """Files and megabytes of each domain, the overlap left, and what gzip makes of the held-out files."""
    gzip_bits = gzip_bits_per_byte(corpus.heldout)
    lines = [f"{'domain':<12}{'files':>7}{'MB':>8}{'held-out':>10}{'MB':>8}{'overlap':>9}{'gzip -9 bits/byte':>19}"]
    for domain in (*corpus.heldout.domains, "all"):
        row = f"{domain:<12}"
        for split, width in ((corpus.train, 7), (corpus.heldout, 10)):
            whole = domain == "all"
            files = len(split.documents) if whole else sum(d.domain == domain for d in split.documents)
            size = len(split.text_B if whole else split.domain(domain))
            row += f"{files:>{width},}{size / 1e6:>8.2f}"
        overlap = corpus.about["overlap"].get(domain)
        row += f"{overlap:>9.2%}" if overlap is not None else " " * 9
        lines.append(row + f"{gzip_bits[domain]:>19.3f}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moe-lab corpus`."""
    parser.add_argument("--out", type=new_file, required=True, help="corpus file to write (.safetensors)")
    parser.add_argument("--manifest", type=Path, help="also write the list of files with their hashes (JSON)")
    parser.add_argument("--seed", type=int, default=CorpusConfig.seed, help="another seed, another split")


def main(args: argparse.Namespace) -> None:
    """Choose the corpus, write it, print what it holds."""
    corpus = choose(CorpusConfig(seed=args.seed), progress=True)
    save_corpus(corpus, args.out)
    if args.manifest:
        save_manifest(corpus, args.manifest)
    print(table(corpus))
    print(f"overlap: share of the held-out {WINDOW}-byte windows that occur in the training text")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")
