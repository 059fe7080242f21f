"""One truth about versions: pyproject.toml, with constraints.txt and environment.yml agreeing."""

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from rattler import MatchSpec

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in sum(EXTRAS.values(), PROJECT["dependencies"])]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in found)
    return {pin.name.lower().replace("_", "-"): Version(str(pin.specifier)[2:]) for pin in found}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement):
    assert pins()[requirement.name.lower()] in requirement.specifier


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_installed_versions_are_within_bounds(requirement):
    try:
        installed = Version(metadata.version(requirement.name))
    except metadata.PackageNotFoundError:
        assert requirement.name in str(EXTRAS["peers"]), "only the peers may be absent"
    else:
        assert installed in requirement.specifier


def test_pins_name_no_build_of_torch():
    assert pins()["torch"] == Version("2.13.0")


def test_environment_asks_for_the_same_python():
    specs = [MatchSpec(spec) for spec in ENVIRONMENT["dependencies"] if isinstance(spec, str)]
    bounds = {spec.name.normalized: str(spec.version) for spec in specs}
    assert bounds["python"] == PROJECT["requires-python"]
    assert set(bounds) == {"python", "pip"}


def test_environment_installs_this_project_with_its_pins():
    (pip,) = [entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[lab,test]"]
    assert {"lab", "test"} <= set(EXTRAS)


def test_make_lists_its_targets():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("lab", "test", "test-fast", "lint", "notebooks", "soak"):
        assert re.search(rf"^  make {target} ", listed, re.MULTILINE)


def test_make_refuses_an_old_python(tmp_path):
    (old := tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.1\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"needs Python 3.11 or newer; PYTHON={old} is Python 3.10.1" in run.stderr
