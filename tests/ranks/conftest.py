"""Rank functions are imported by the ranks: this folder and its parent are on their path, in any working directory."""

import os
import sys
from pathlib import Path

FOLDERS = [str(Path(__file__).parent), str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
sys.path[:0] = FOLDERS
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
