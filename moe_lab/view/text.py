"""Text forms: every result has one, rounded at the source, so that notebooks can be compared exactly."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moe_lab.study.load import Load


class Text:
    """A value whose repr is its text form."""

    def text(self) -> str:
        """The numbers, rounded, as a table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.text()


def table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """Rows as aligned columns, those in `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def window_of(load: Load) -> str:
    """What a load is of, without its layer."""
    windows = f"{load.windows:,} window{'s' * (load.windows != 1)}"
    tokens = f"{load.tokens:,} token{'s' * (load.tokens != 1)}"
    return f"{tokens} x {windows} · {load.domain}"
