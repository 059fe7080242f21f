"""What ships with the lab: recorded traces and a small trained model, with their provenance in `data/README.md`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_lab.models.lm import MoELM
    from moe_lab.study.trace import RoutingTrace

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder of shipped data: `data/` of a checkout, or the copy inside an installed package."""
    for folder in (_PACKAGE.parent / "data", _PACKAGE / "_data"):
        if (folder / "README.md").is_file():
            return folder
    raise FileNotFoundError(f"no data folder beside or inside {_PACKAGE}: install from a checkout or a full wheel")


def names() -> tuple[str, ...]:
    """Names of the shipped traces, for `open`."""
    return tuple(sorted(path.stem for path in (root() / "traces").glob("*.safetensors")))


def path(name: str) -> Path:
    """The file of a shipped trace. `ValueError` names the known ones."""
    if name not in names():
        raise ValueError(f"trace {name!r} is not shipped: choose one of {', '.join(names())}, or load your own file")
    return root() / "traces" / f"{name}.safetensors"


def open(name: str) -> RoutingTrace:
    """A shipped trace by name, such as `open("balanced")`."""
    from moe_lab.study.trace import RoutingTrace

    return RoutingTrace.load(path(name))


def result(name: str) -> Path:
    """The file of a stored measurement: in `docs/results` of a checkout, or its copy inside an installed package."""
    folders = (root().parent / "docs" / "results", root() / "results")
    folder = next((folder for folder in folders if folder.is_dir()), folders[-1])
    if not (folder / name).is_file():
        known = ", ".join(sorted(path.name for path in folder.glob("*")))
        raise ValueError(f"result {name!r} is not shipped: choose one of {known}")
    return folder / name


def report() -> dict[str, Any]:
    """What `moe-lab report` measured of the shipped model: bits per byte, gzip's, and domains named by experts."""
    return json.loads((root() / "lm" / "report.json").read_text())


def load_lm() -> MoELM:
    """The shipped language model, float32, in eval mode, on CPU."""
    from moe_lab.models.lm import MoELM

    return MoELM.load(root() / "lm")
