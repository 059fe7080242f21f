"""Text with every token tinted by its first expert: as HTML, where hovering names its experts, and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float, Integer
from numpy.typing import NDArray

from moe_lab.view.text import Text
from moe_lab.view.theme import INK, MUTED, OTHER_TINT, PALE_TINTS, TINTS

MAX_TOKENS = 4096
MUTED_ON_TINT = "#3e4c59"
_BLOCK = f"color:{INK};background-color:#fff;font-size:12px;line-height:1.5"
_PRE = f"white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.45;margin:2px 0;color:{INK};background-color:#fff"
NEWLINE, LINE_BREAK = "⏎", "\n"
_MARKS = {"\n": NEWLINE, "\t": "→", "\r": "␍"}


@dataclass(frozen=True, eq=False, repr=False)
class TintedText(Text):
    """Tokens (bytes each, in order) with their experts, the first one first; -1 is a dropped assignment.

    `headings` are (token, text) pairs: what to say before that token; a token's place is counted from there.
    Raises `ValueError` for lengths that differ and for more than 4,096 tokens, which no page should hold.
    """

    model: str
    layer: int
    pieces: tuple[bytes, ...]
    expert_ids_TK: Integer[NDArray[np.integer], "T K"]
    gates_TK: Float[NDArray[np.floating], "T K"] | None = None
    headings: tuple[tuple[int, str], ...] = ()

    def __post_init__(self) -> None:
        tokens = len(self.pieces)
        if not 0 < tokens <= MAX_TOKENS:
            raise ValueError(f"text of {tokens:,} tokens: show 1 to {MAX_TOKENS:,} at a time")
        for name in ("expert_ids_TK", "gates_TK"):
            value = getattr(self, name)
            if value is not None and len(value) != tokens:
                raise ValueError(f"{name} has {len(value):,} tokens, the text has {tokens:,}")

    @property
    def where(self) -> str:
        """What the experts are of."""
        return f"{self.model} · layer {self.layer}"

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """Heading, first token and end of every part."""
        starts = self.headings if self.headings and self.headings[0][0] == 0 else ((0, ""), *self.headings)
        ends = [start for start, _ in starts[1:]] + [len(self.pieces)]
        return [(heading, start, end) for (start, heading), end in zip(starts, ends, strict=True)]

    @property
    def tints(self) -> dict[int, str]:
        """Colours of the sixteen experts that are first most often here, most often first; the last eight pale."""
        experts, counts = np.unique(self.expert_ids_TK[:, 0], return_counts=True)
        order = np.lexsort((experts, -counts))
        ranked = [int(experts[i]) for i in order if experts[i] >= 0]
        return dict(zip(ranked, TINTS + PALE_TINTS, strict=False))

    def shares(self) -> list[tuple[int, str]]:
        """The experts with a tint and the share of tokens they are first for."""
        counts = Counter(self.expert_ids_TK[:, 0].tolist())
        return [(expert, _percent(counts[expert], len(self.pieces))) for expert in self.tints]

    def text(self) -> str:
        """The most used experts: the share they are first for, and what they are first for most often."""
        rows = [("expert", "first for", "most often")]
        for expert, share in self.shares()[: len(TINTS)]:
            taken = np.flatnonzero(self.expert_ids_TK[:, 0] == expert)
            common = Counter(visible(self.pieces[i]) for i in taken)
            ranked = sorted(common.items(), key=lambda item: (-item[1], item[0]))[:5]
            rows.append((str(expert), share, "  ".join(f"{piece} {count}" for piece, count in ranked)))
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{a.rjust(first)}  {b.rjust(second)}  {c}" for a, b, c in rows]
        return "\n".join([f"{self.where} · {len(self.pieces):,} tokens", *lines])

    def html(self) -> str:
        """A self-contained block of HTML, about 150 bytes a token."""
        tints, first_T, blocks = self.tints, self.expert_ids_TK[:, 0].tolist(), []
        hover_T = self._hovers()
        for heading, start, end in self.parts:
            spans = [
                f'<span style="background-color:{tints.get(first_T[begin], OTHER_TINT)}" '
                f'title="{escape(chr(10).join(hover_T[begin:stop]))}">'
                f"{escape(shown).replace(NEWLINE, NEWLINE + LINE_BREAK)}</span>"
                for begin, stop, shown in characters(self.pieces, start, end)
            ]
            label = f'<div style="color:{MUTED};margin-top:4px">{escape(heading)}</div>' if heading else ""
            blocks.append(f'{label}<pre style="{_PRE}">{"".join(spans)}</pre>')
        return f'<div style="{_BLOCK}">{self._legend(tints)}{"".join(blocks)}</div>'

    def _repr_html_(self) -> str:
        return self.html()

    def _hovers(self) -> list[str]:
        """Place, bytes, experts and gates of every token."""
        ids_TK = self.expert_ids_TK.tolist()
        gates_TK = [[""] * len(ids_K) for ids_K in ids_TK]
        if self.gates_TK is not None:
            gates_TK = [[f" {gate:.2f}" for gate in gates_K] for gates_K in self.gates_TK.tolist()]
        hovers = []
        for _, start, end in self.parts:
            for i in range(start, end):
                pairs = zip(ids_TK[i], gates_TK[i], strict=True)
                chosen = ", ".join("dropped" if expert < 0 else f"{expert}{gate}" for expert, gate in pairs)
                hovers.append(f"{i - start}: {visible(self.pieces[i])} → {chosen}")
        return hovers

    def _legend(self, tints: dict[int, str]) -> str:
        chips = [(tints[expert], str(expert), share) for expert, share in self.shares()]
        if len(rest := set(self.expert_ids_TK[:, 0].tolist()) - set(tints)):
            share = _percent(int(np.isin(self.expert_ids_TK[:, 0], list(rest)).sum()), len(self.pieces))
            chips.append((OTHER_TINT, f"{len(rest)} more", share))
        marks = " ".join(
            f'<span style="background-color:{tint};padding:0 3px;white-space:nowrap;color:{INK}">{name} '
            f'<span style="color:{MUTED_ON_TINT};font-size:10px">{share.removesuffix(" %")}</span></span>'
            for tint, name, share in chips
        )
        return f'<div style="color:{MUTED}">{escape(self.where)}, first expert (% of tokens): {marks}</div>'


def byte_pieces(text: bytes) -> tuple[bytes, ...]:
    """The tokens of a model that reads bytes."""
    return tuple(text[i : i + 1] for i in range(len(text)))


def characters(pieces: Sequence[bytes], start: int = 0, end: int | None = None) -> list[tuple[int, int, str]]:
    """Pieces `start .. end` grouped so that no UTF-8 character is cut, every piece once: (begin, stop, to show).

    What is no UTF-8 is shown piece by piece in hexadecimal.
    """
    groups, begin, end = [], start, len(pieces) if end is None else end
    while begin < end:
        shown, stop = None, begin
        while shown is None and stop < min(end, begin + 4):
            stop += 1
            shown = _decode(b"".join(pieces[begin:stop]))
        if shown is None:
            stop, shown = begin + 1, _hex(pieces[begin])
        groups.append((begin, stop, "".join(map(_mark, shown))))
        begin = stop
    return groups


def _decode(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _hex(text: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text)


def visible(piece: bytes) -> str:
    """A piece on one line, spaces and control characters visible."""
    shown = _decode(piece)
    if shown is None or not shown:
        return _hex(piece)
    return "".join(map(_mark, shown)).replace(" ", "␣")


def _mark(character: str) -> str:
    """A character that cannot be seen as one that can."""
    return _MARKS.get(character, character if character.isprintable() else _hex(character.encode()))


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.0f} %"
