"""nbval compares nothing for a cell that was never run: refuse such notebooks before any cell is."""

import pytest


def pytest_collection_modifyitems(items):
    """Refuse a notebook whose cells are not numbered 1, 2, 3, ... from top to bottom."""
    for path, cells in notebooks(items).items():
        counts = [cell.execution_count for cell in cells if cell.source.strip()]
        if counts != list(range(1, len(counts) + 1)):
            raise pytest.UsageError(
                f"{path.name} was not run top-down in a fresh kernel: its cells are numbered {counts}; "
                f"run `make notebooks NOTEBOOKS=notebooks/{path.name}`"
            )


def notebooks(items):
    """The code cells of each collected notebook."""
    cells = {}
    for item in items:
        if hasattr(item, "cell"):
            cells.setdefault(item.path, []).append(item.cell)
    return cells
