import os
import re
import sys
from types import ModuleType

import pytest

from moe_lab import cli


@pytest.fixture
def job(monkeypatch):
    """A stand-in for `moe_lab.jobs.train` that takes `--steps` and refuses a negative number."""

    def add_arguments(parser):
        parser.add_argument("--steps", type=int, default=1)

    def run(args):
        if args.steps < 0:
            raise ValueError(f"steps={args.steps} must be at least 0")
        calls.append(args.steps)

    module = ModuleType("moe_lab.jobs.train")
    module.add_arguments, module.main, module.calls = add_arguments, run, (calls := [])
    monkeypatch.setitem(sys.modules, "moe_lab.jobs.train", module)
    return module


def test_a_job_gets_its_own_arguments(job):
    assert cli.main(["train", "--steps", "3"]) == 0
    assert job.calls == [3]


def test_bad_input_is_a_usage_error_without_a_traceback(job, capsys):
    assert cli.main(["train", "--steps", "-1"]) == 2
    assert capsys.readouterr().err == "moe-lab train: error: steps=-1 must be at least 0\n"


def test_a_file_that_is_not_there_is_a_usage_error(capsys, tmp_path):
    assert cli.main(["report", "--corpus", str(tmp_path / "none"), "--out", str(tmp_path / "report.json")]) == 2
    assert "moe-lab report: error: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "name", "message"),
    [
        (["sweep", "--json"], "none/sweep.json", "has no folder: make .*none' first"),
        (["bench", "layer", "--json"], "none/layer.json", "has no folder: make .*none' first"),
        (["import", "counts", "counts.csv", "--out"], "", "is a folder, must be a file"),
    ],
)
def test_results_that_could_not_be_written_are_refused_before_the_work(capsys, tmp_path, argv, name, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*argv, str(tmp_path / name)])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_only_the_chosen_job_is_imported(job, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moe_lab.jobs.train", None)  # importing it would raise
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    listed = capsys.readouterr().out
    assert all(command in listed for command in ("lab", "corpus", "train", "record"))


@pytest.mark.parametrize("argv", [[], ["brew"]])
def test_an_unknown_command_is_refused(argv):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2


def test_the_lab_serves_on_loopback_with_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    command = cli.lab_command(tmp_path, 8899, browser=False)
    assert f"--ServerApp.root_dir={tmp_path}" in command
    assert {"--ServerApp.ip=127.0.0.1", "--ServerApp.port=8899", "--no-browser"} <= set(command)
    assert "--LabApp.default_url=/lab/tree/notebooks/01_routing.ipynb" in command
    assert not [option for option in command if "token" in option or "root" in option.split("=")[0][-4:]]


def test_a_chosen_port_is_that_port_or_none(tmp_path):
    assert "--ServerApp.port_retries=0" in cli.lab_command(tmp_path, 8899, browser=True)
    assert "--ServerApp.port_retries=0" not in cli.lab_command(tmp_path, None, browser=True)
    with pytest.raises(ValueError, match="port=70000 must be from 1 to 65535"):
        cli.lab_command(tmp_path, 70000, browser=True)


@pytest.mark.parametrize(("uid", "allowed"), [(0, True), (1000, False)])
def test_root_is_allowed_only_when_root(uid, allowed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert ("--allow-root" in cli.lab_command(tmp_path, None, browser=True)) is allowed


def test_the_lab_opens_the_folder_it_is_started_in(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / cli.FIRST_NOTEBOOK).touch()
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(os, "execve", lambda path, argv, environment: started.extend((argv, environment)))
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "mine")
    cli.main(["lab", "--no-browser", "--", "--ServerApp.shutdown_no_activity_timeout=60"])
    assert f"--ServerApp.root_dir={tmp_path}" in started[0]
    assert started[0][-1] == "--ServerApp.shutdown_no_activity_timeout=60"
    assert started[1]["JUPYTER_CONFIG_PATH"].split(os.pathsep)[1:] == ["mine"]
