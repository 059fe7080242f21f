"""The rules of the house that a machine can hold: import arrows, portable text, readable notebooks."""

import ast
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_lab"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Later may import earlier. Rooms in one row may import each other.
ARROWS = [
    {"config", "contracts", "fastpaths", "phases"},
    {"kernels"},
    {"layer"},
    {"parallel"},
    {"models"},
    {"study"},
    {"data"},
    {"jobs"},
    {"view"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(ARROWS) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """Full names of everything a module imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield from (f"{source}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    assert room_of(path) in RANK, "a new room needs its place in ARROWS"
    for name in imports(path):
        if name.split(".")[0] == "moe_lab":
            target = name.split(".")[1] if "." in name else "moe_lab"
            assert target in RANK, f"{name}: import from the room that defines it"
            assert RANK[target] <= RANK[room_of(path)], f"{name} is downstream of {room_of(path)}"


def test_the_record_of_fast_paths_imports_nothing_of_ours():
    assert not [name for name in imports(PACKAGE / "fastpaths.py") if name.startswith("moe_lab")]


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) != "view"], ids=name_of)
def test_only_the_view_needs_the_lab_extra(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"matplotlib", "ipywidgets", "IPython"}


def test_shapes_in_signatures_are_checked_in_tests():
    from moe_lab.config import RouterConfig
    from moe_lab.layer.router import route

    with pytest.raises(TypeError, match="logits_TE"):
        route(torch.zeros(3), RouterConfig(), 1)


# --- text ---

FOLDERS = ("moe_lab", "notebooks", "tests", "docs", "data", ".ci")
SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yml",
    ".yaml",
    ".cfg",
    ".json",
    ".jsonl",
    ".ipynb",
    ".safetensors",
    "",
}
ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/*-])/(?:home|root|work|workspace|tmp|Users|mnt|opt|srv)/\w[^\s\"']*")
WORKPLACE = re.compile(
    r"\b(?:workplace|sub-?agents?|issues?[ #]*\d+|(?:DESIGN|SPEC|NOTEBOOKS|EXAMPLES|ANCHORS|BRIEF|DEVELOPERS)\.md)\b"
)
MARKDOWN_FILE = re.compile(r"(?<![\w/:.-])([\w.-]+/)*[\w-]+\.md\b")


def files():
    inside = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    for path in sorted([*ROOT.iterdir(), *inside]):  # .git is a file in a working tree beside another
        hidden = {"__pycache__", ".ipynb_checkpoints", ".git", ".coverage"} & set(path.parts)
        if path.is_file() and path.suffix in SUFFIXES and not hidden and path != Path(__file__):
            yield path


def text_of(path):
    """What a reader could read: a notebook without its pictures, a safetensors file's header."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little")).decode()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return re.sub(r'"image/(png|jpeg)": "[^"]*"', "", text)
    return text


@pytest.mark.parametrize("pattern", [ABSOLUTE_PATH, WORKPLACE], ids=["paths", "words"])
def test_nothing_depends_on_one_machine(pattern):
    found = {
        str(path.relative_to(ROOT)): hits
        for path in files()
        if (hits := [match.group() for match in pattern.finditer(text_of(path))])
    }
    assert not found


def test_pages_name_only_pages_that_exist():
    for page in (path for path in files() if path.suffix == ".md"):
        text = re.sub(r"\w+://\S+", "", page.read_text(encoding="utf-8"))
        for match in MARKDOWN_FILE.finditer(text):
            named = match.group()
            assert (ROOT / named).is_file() or (page.parent / named).is_file(), f"{page.name} names {named}"


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("saved to /home/ann/run.json", True),
        ('open("/tmp/x")', True),
        ("https://example.org/home/x", False),
        ("moe_lab/work/plan", False),
        ("T/tmp/e", False),
    ],
)
def test_absolute_paths_are_recognised(text, refused):
    assert bool(ABSOLUTE_PATH.search(text)) is refused


# --- notebooks ---


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_cells(path):
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_are_short_and_define_nothing(path):
    for cell in code_cells(path):
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 12, source
        assert not source.rstrip().endswith(";"), source
        tree = ast.parse(TransformerManager().transform_cell(source))
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not [node for node in ast.walk(tree) if isinstance(node, definitions)], source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_prose_comes_before_each_cell(path):
    kinds = [cell["cell_type"] for cell in cells(path)]
    assert kinds[0] == "markdown"
    assert ("code", "code") not in list(pairwise(kinds))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_outputs_need_no_kernel(path):
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
    for cell in code_cells(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_most_cells_are_compared(path):
    tags = [set(cell["metadata"].get("tags", [])) for cell in code_cells(path)]
    unchecked = [tag for tag in tags if tag & {"nbval-ignore-output", "nbval-skip", "raises-exception"}]
    assert len(unchecked) <= len(tags) / 3
