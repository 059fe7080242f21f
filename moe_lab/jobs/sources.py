"""The text that the user's own Python environment holds: what there is by domain, and how to read it again.

A source has a name, `kind:path`, with the path relative to a root of the environment:

- `stdlib:json/decoder.py`, `site:torch/version.py`, `share:jupyter/lab/static/bootstrap.js`: a file;
- `docstrings:numpy/linalg/_linalg.py`: the English paragraphs in the docstrings of a module;
- `readme:numpy-2.4.6.dist-info/METADATA`: those of a package's long description;
- `headers:numpy-2.4.6.dist-info/METADATA`: the header lines of the same file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from moe_lab.study.trace import Document

DOMAINS = ("python", "cpp", "javascript", "prose", "data")


@dataclass(frozen=True)
class Roots:
    """The three directories that names are relative to."""

    stdlib: Path
    site: Path
    share: Path

    @classmethod
    def installed(cls) -> Roots:
        """The running environment: its standard library, the directory with torch, and `<prefix>/share`."""
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise ValueError("torch is not installed: its directory is the root of 'site:' names")
        paths = sysconfig.get_paths()
        return cls(Path(paths["stdlib"]), Path(spec.origin).parents[1], Path(paths["data"]) / "share")


def read_source(name: str, roots: Roots | None = None) -> bytes:
    """The bytes of a source, read or collected again from the environment.

    Raises `ValueError` for a name that is no name, `FileNotFoundError` when the environment has no such file.
    """
    kind, _, path = name.partition(":")
    parts = PurePosixPath(path).parts
    if kind not in _KINDS or not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"source name {name!r}: expected one of {', '.join(_KINDS)}, ':' and a path below that root")
    root, collect = _KINDS[kind]
    file = getattr(roots or Roots.installed(), root).joinpath(*parts)
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no such file in this environment")
    return collect(file.read_bytes())


def find_source(document: Document, roots: Roots | None = None) -> bytes | None:
    """The bytes of a document's span, or None when this environment has no such file or another version."""
    try:
        source = read_source(document.name, roots)
    except OSError:
        return None
    if hashlib.sha256(source).hexdigest() != document.sha256:
        return None
    return source[document.offset : document.offset + document.length]


def list_sources(domain: str, roots: Roots) -> Iterator[str]:
    """Names of all sources of a domain, shelf by shelf, sorted by path; tests and licences are left out."""
    if domain not in _SHELVES:
        raise ValueError(f"domain={domain!r}: expected one of {', '.join(DOMAINS)}")
    for shelf in _SHELVES[domain]:
        root = getattr(roots, _KINDS[shelf.kind][0])
        for folder in shelf.folders:
            for file in _walk(root / folder):
                path = file.relative_to(root).as_posix()
                if path.endswith(shelf.endings) and not _LICENCE.search(file.name) and not _ODD.search(path):
                    yield f"{shelf.kind}:{path}"


def is_text(source: bytes) -> bool:
    r"""Whether a source is text somebody could have written, not numbers or binary data in disguise.

    False for bytes that are not UTF-8 or hold control characters; when runs of 200 letters and digits or more
    (base64, hex), or of 200 characters between two quotes without a space (parser tables, and with them the
    densest minified code), make up over 2 %; when escapes such as `\x9f` or `\u00e9` make up over 10 %; or when
    over 40 % of the characters that are not space are decimal digits.
    """
    try:
        source.decode()
    except UnicodeDecodeError:
        return False
    if _CONTROL.search(source):
        return False
    blobs = sum(map(len, _BLOB.findall(source)))
    escapes = sum(map(len, _ESCAPE.findall(source)))
    digits, spaces = (len(source) - len(source.translate(None, some)) for some in (b"0123456789", b" \t\r\n\f"))
    size = len(source)
    return blobs <= 0.02 * size and escapes <= 0.1 * size and digits <= 0.4 * (size - spaces)


def _docstrings(source: bytes) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return b""
    return _paragraphs("\n\n".join(ast.get_docstring(node) or "" for node in _documented(tree)))


def _documented(
    node: ast.AST,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The nodes that may have a docstring, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from _documented(child)


def _readme(source: bytes) -> bytes:
    return _paragraphs(source.decode(errors="replace").replace("\r\n", "\n").partition("\n\n")[2])


def _headers(source: bytes) -> bytes:
    lines = source.decode(errors="replace").replace("\r\n", "\n").partition("\n\n")[0].split("\n")
    return "".join(f"{line}\n" for line in lines if re.match(r"[A-Z][\w-]*: ", line)).encode()


def _paragraphs(text: str) -> bytes:
    """The paragraphs that are English sentences: no code, tables, badges, or licence."""
    return "".join(f"{p}\n\n" for p in re.split(r"\n\s*\n", text) if _is_prose(p)).encode(errors="replace")


def _is_prose(paragraph: str) -> bool:
    return (
        len(paragraph) >= 60
        and len(_NO_LETTER.findall(paragraph)) <= 0.15 * len(paragraph)
        and not paragraph.lstrip().startswith((">>>", "...", "::", ".. ", "In ["))
        and not _LEGAL.search(paragraph)
    )


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - _SKIPPED)
        for file in sorted(files):
            if (path := Path(place, file)).is_file() and not path.is_symlink():
                yield path


class _Shelf(NamedTuple):
    kind: str
    folders: tuple[str, ...]
    endings: tuple[str, ...]


_KINDS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "stdlib": ("stdlib", bytes),
    "site": ("site", bytes),
    "share": ("share", bytes),
    "docstrings": ("site", _docstrings),
    "readme": ("site", _readme),
    "headers": ("site", _headers),
}
_DOCUMENTED = (
    "IPython", "PIL", "fontTools", "ipywidgets", "jupyter_server", "matplotlib", "mpmath", "networkx",
    "numpy", "pandas", "setuptools", "sympy", "torch", "traitlets",
)  # fmt: skip
_SHELVES = {
    "python": (_Shelf("stdlib", (".",), (".py",)),),
    "cpp": (_Shelf("site", ("torch/include",), (".h", ".hpp", ".cuh")),),
    "javascript": (_Shelf("share", ("jupyter",), (".js",)),),
    "prose": (
        _Shelf("docstrings", _DOCUMENTED, (".py",)),
        _Shelf("readme", (".",), ("METADATA",)),
        _Shelf("site", (".",), (".md", ".rst")),
    ),
    "data": (
        _Shelf("site", (".",), (".json", ".csv", ".yaml", ".yml", ".toml", ".afm", ".tab", ".zi")),
        _Shelf("share", (".",), (".json",)),
        _Shelf("headers", (".",), ("METADATA",)),
    ),
}
# Folders that distributors drop, or whose files are copies, made for tests, or of another domain's kind.
_SKIPPED = {
    "__pycache__", "benchmarks", "dist-packages", "idle_test", "licenses", "node_modules", "pydoc_data",
    "site-packages", "test", "test_data", "tests",
}  # fmt: skip
_LICENCE = re.compile(r"licen[cs]e|copying|notice|copyright|authors", re.IGNORECASE)
_NO_LETTER = re.compile(r"[^\w\s]|[\d_]")
_LEGAL = re.compile(r"hereby granted|redistribution and use|without warrant|copyright \(c\)|liab(le|ility)", re.I)
_ODD = re.compile(r"[^ -~]|[\\:]")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_BLOB = re.compile(rb"""[A-Za-z0-9+/=]{200,}|"[^"\s]{200,}"|'[^'\s]{200,}'|`[^`\s]{200,}`""")
_ESCAPE = re.compile(rb"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[0-7]{3}|0x[0-9a-fA-F]+")
