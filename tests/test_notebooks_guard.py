"""The notebook tests notice what they are for: a changed digit and a cell that was never run."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.slow

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
MAKEFILE = NOTEBOOKS.parent / "Makefile"

CELLS = ["import ipywidgets", "print(6 * 7)", "slider = ipywidgets.IntSlider(3)\nslider"]


@pytest.fixture(scope="module")
def store():
    spec = importlib.util.spec_from_file_location("store", NOTEBOOKS / "store.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored(store, tmp_path_factory):
    """A notebook folder like ours, with one small notebook as `make notebooks` stores it."""
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    folder.mkdir()
    for name in ("conftest.py", "sanitize.cfg"):
        shutil.copy(NOTEBOOKS / name, folder)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, folder / "small.ipynb")
    store.main([str(folder / "small.ipynb")])
    return folder / "small.ipynb"


@pytest.fixture
def notebook(stored, tmp_path):
    """A copy to spoil."""
    shutil.copytree(stored.parent, tmp_path / "notebooks")
    return tmp_path / "notebooks" / stored.name


def nbval(notebook):
    """The command of the Makefile, on a copy."""
    options = shlex.split(re.search(r"^NBVAL := (.*)$", MAKEFILE.read_text(), re.MULTILINE).group(1))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, "notebooks"]
    return subprocess.run(command, cwd=notebook.parent.parent, capture_output=True, text=True, timeout=120)


def change(notebook, cell, **fields):
    content = nbformat.read(notebook, as_version=4)
    content.cells[cell].update(fields)
    nbformat.write(content, notebook)


def test_a_stored_notebook_passes_and_keeps_no_widget(notebook):
    assert nbval(notebook).returncode == 0
    text = notebook.read_text()
    assert "IntSlider(value=3)" in text
    assert "widget-view" not in text
    assert [cell.execution_count for cell in nbformat.read(notebook, as_version=4).cells] == [1, 2, 3]


def test_a_changed_digit_fails(notebook):
    notebook.write_text(notebook.read_text().replace('"42\\n"', '"43\\n"'))
    run = nbval(notebook)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 2 passed" in run.stdout


def test_an_unrun_cell_is_refused(notebook):
    change(notebook, 1, execution_count=None, outputs=[])
    run = nbval(notebook)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "small.ipynb was not run top-down in a fresh kernel: its cells are numbered [1, None, 3]" in run.stderr


def test_cells_run_out_of_order_are_refused(notebook):
    change(notebook, 1, execution_count=7)
    run = nbval(notebook)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "numbered [1, 7, 3]" in run.stderr


def test_a_cell_that_raises_leaves_the_file_alone(notebook, store):
    change(notebook, 1, source="print(1 / 0)")
    before = notebook.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        store.main([str(notebook)])
    assert notebook.read_bytes() == before
