"""The command line: `moe-lab lab | corpus | train | record | report | balance | bench | sweep | ...`, see `JOBS`.

`lab` lives here; every other command is a module of `moe_lab.jobs`, imported only when it is chosen, that
offers `add_arguments(parser)` and `main(args)`. Bad input is a `ValueError`, or an `OSError` of a file that is not
there, shown as a usage error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

FIRST_NOTEBOOK = "notebooks/01_routing.ipynb"
DEFAULT_PORT = 8888

JOBS = {
    "corpus": "collect the training text from this Python environment",
    "train": "train the small MoE language model",
    "record": "record routing traces of a trained model over held-out text",
    "report": "measure a trained model: bits per byte beside gzip, what its experts know of the text",
    "balance": "train small models under every method of balancing: loss against imbalance",
    "bench": "measure a layer against its dense bound and other libraries",
    "sweep": "measure which backend wins over tokens, experts, top-k and skew",
    "timeline": "tell waiting from transfer in the profiler traces of all ranks",
    "determinism": "compare a layer's bits in many surroundings, and time batch invariance",
    "import": "turn what a run dumped into a trace",
}
MODULES = {"import": "importing"}  # where a command cannot be its module's name


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (2 for bad input, 130 after Ctrl-C)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(chosen=argv[0] if argv else None)
    args = parser.parse_args(argv)
    try:
        return args.main(args) or 0
    except (ValueError, OSError) as error:
        print(f"moe-lab {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser, with the options of the `chosen` command only."""
    parser = argparse.ArgumentParser(prog="moe-lab", description="See what a Mixture-of-Experts layer does.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    add_lab_arguments(lab)
    lab.set_defaults(main=lab_main)
    for name, summary in JOBS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:
            job = importlib.import_module(f"moe_lab.jobs.{MODULES.get(name, name)}")
            job.add_arguments(command)
            command.set_defaults(main=job.main)
    return parser


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `moe-lab lab`."""
    parser.add_argument("--port", type=int, help=f"this port or none (default: {DEFAULT_PORT} or the next free)")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    parser.add_argument("jupyter", nargs="*", metavar="-- OPTION", help="further options of JupyterLab")


def lab_main(args: argparse.Namespace) -> None:
    """Become JupyterLab, opened on the first notebook; it prints its address with its token."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise ValueError("JupyterLab is not installed: pip install 'moe-lab[lab]'")
    command = lab_command(notebook_root(), args.port, browser=not args.no_browser)
    sys.stdout.flush()
    os.execve(command[0], [*command, *args.jupyter], lab_environment())


def lab_command(root: Path, port: int | None, *, browser: bool) -> list[str]:
    """The command that serves `root` on 127.0.0.1, token on, asking nothing of the network."""
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"port={port} must be from 1 to 65535")
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={root}",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={DEFAULT_PORT if port is None else port}",
        f"--LabApp.default_url=/lab/tree/{FIRST_NOTEBOOK}",
        "--Application.log_level=WARN",
        "--LabApp.extension_manager=readonly",
    ]
    if port is not None:
        command.append("--ServerApp.port_retries=0")
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return command


def lab_environment() -> dict[str, str]:
    """This environment, where JupyterLab also reads `labconfig/` of this package: no news, no update checks."""
    paths = [str(Path(__file__).resolve().parent), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    return os.environ | {"JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}


def notebook_root() -> Path:
    """The folder that holds `notebooks/`: the current one, else the checkout this package runs from."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / FIRST_NOTEBOOK).is_file():
            return root
    raise ValueError(f"no {FIRST_NOTEBOOK} here: run moe-lab lab in a checkout of the project")
