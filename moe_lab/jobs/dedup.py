"""Text that occurs twice: hashed windows of bytes, near-duplicate files, overlap of two sets of files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, UInt64

WINDOW = 50
"""Bytes in a window: longer than an import line or a signature's head, shorter than a licence banner."""

_MULTIPLIER = 0x9E3779B97F4A7C15
_BYTE_HASH = np.random.default_rng(0).integers(0, 2**64, size=256, dtype=np.uint64)


def window_hashes(text: bytes, window: int = WINDOW) -> UInt64[np.ndarray, " W"]:
    """Hash every run of `window` bytes: one uint64 per start, none when the text is shorter.

    The hash is the polynomial `sum_i h(b_i) m^(n-1-i) mod 2^64` (Karp and Rabin, 1987), built by doubling the
    window. Two different windows collide with a chance near 2^-64.
    """
    if window < 1:
        raise ValueError(f"window={window}: a window needs at least 1 byte")
    count = len(text) - window + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    power = _BYTE_HASH[np.frombuffer(text, np.uint8)]
    hashes, covered, size = np.zeros(count, np.uint64), 0, 1
    while True:
        if window & size:
            hashes = hashes * _power(size) + power[covered : covered + count]
            covered += size
        if covered == window:
            return hashes
        power = power[:-size] * _power(size) + power[size:]
        size *= 2


def _power(exponent: int) -> np.uint64:
    return np.uint64(pow(_MULTIPLIER, exponent, 2**64))


def thin(texts: Sequence[bytes], max_overlap: float, *, sample: int = 16) -> list[int]:
    """Indices of the texts to keep, in order, so that none is mostly a copy of longer ones.

    Walks from the longest text to the shortest (ties: the earlier first) and drops a text when more than
    `max_overlap` of its windows occur in those kept before. Going by length finds the small file inside the
    large one whichever comes first. Windows are sampled by hash value, one in `sample`, so equal windows are
    always sampled alike; memory is 1/`sample` of a hash per byte.
    """
    limit = np.uint64(2**64 // sample - 1)
    seen: set[int] = set()
    kept = []
    for index in sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i)):
        hashes = window_hashes(texts[index])
        marks = set(hashes[hashes <= limit].tolist())
        if len(marks & seen) <= max_overlap * len(marks):
            kept.append(index)
            seen |= marks
    return sorted(kept)


def seen_windows(texts: Sequence[bytes], others: Iterable[bytes]) -> list[Bool[np.ndarray, " _"]]:
    """For each text, which of its windows occur verbatim in any of `others`.

    Exact up to hash collisions. Memory is some 50 bytes per byte of `texts`; `others` are looked at one at a time.
    """
    hashes = [window_hashes(text) for text in texts]
    ends = np.cumsum([len(some) for some in hashes])[:-1]
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    order = np.argsort(every)
    first = np.diff(every[order], prepend=~every[order[:1]]) != 0
    wanted = every[order[first]]
    found = np.zeros(len(wanted), bool)
    if len(wanted):
        # A table on the top bits lets most windows of `others` go without a search.
        bits = len(wanted).bit_length() + 3
        shift = np.uint64(64 - bits)
        maybe = np.zeros(1 << bits, bool)
        maybe[wanted >> shift] = True
        for other in others:
            some = window_hashes(other)
            some = some[maybe[some >> shift]]
            at = np.minimum(np.searchsorted(wanted, some), len(wanted) - 1)
            found[at[wanted[at] == some]] = True
    seen = np.empty(len(every), bool)
    seen[order] = found[np.cumsum(first) - 1]
    return np.split(seen, ends) if texts else []
