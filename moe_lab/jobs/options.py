"""Options that jobs share: what must be known before minutes of work."""

from __future__ import annotations

import argparse
from pathlib import Path


def new_file(path: str) -> Path:
    """A file to write, for `type=`. Refused while options are read where there is no folder for it."""
    file = Path(path)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} is a folder, must be a file")
    if not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path!r} has no folder: make {str(file.parent)!r} first")
    return file
