"""Run notebooks top-down in a fresh kernel and store what a reader should see: `python notebooks/store.py FILE...`

Kept are text, HTML, pictures, counts and tags. Widget views go, because a stored view without its state opens as
"Error displaying widget"; widget state, timestamps and version numbers go, because they change at every run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 180  # seconds, as in the notebook tests


def main(paths: Iterable[str]) -> None:
    """Run and store each notebook in place. A cell that raises leaves its file as it was."""
    for path in map(Path, paths):
        notebook = strip(run(path))
        nbformat.write(notebook, path)
        cells = sum(cell.execution_count is not None for cell in notebook.cells if cell.cell_type == "code")
        print(f"{path}: {cells} cells, {path.stat().st_size / 1e3:.0f} kB")


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; raises `nbclient.exceptions.CellExecutionError` at the first error."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(path.parent)}},
        store_widget_state=False,
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute()


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without what changes from run to run or cannot be shown without a kernel."""
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]
    return notebook


if __name__ == "__main__":
    main(sys.argv[1:])
