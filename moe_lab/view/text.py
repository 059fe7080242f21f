"""Text forms: every result has one, rounded at the source, so that notebooks can be compared exactly."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lab.study.load import Load


class Text:
    """A value whose repr is its text form."""

    def text(self) -> str:
        """The numbers, rounded, as a table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.text()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def window_of(load: Load) -> str:
    """What a load is of, without its layer."""
    windows = f"{load.windows:,} window{'s' * (load.windows != 1)}"
    return f"{load.tokens:,} tokens x {windows} · {load.domain}"
