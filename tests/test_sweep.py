import argparse

import pytest

from moe_lab.config import MoEConfig
from moe_lab.jobs import bench_inputs, sweep
from moe_lab.study.crossover import Point, winners
from moe_lab.study.measurements import load


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    config = MoEConfig(dim=32, hidden_dim=16, num_experts=4, top_k=2)
    monkeypatch.setitem(bench_inputs.LAYERS, "tiny", config)


def run(path, *argv):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    small = "--preset tiny --tokens 4 8 --experts 4 --top-k 2 8 --skew 0 1 --backends loop grouped"
    options = [*small.split(), "--rounds", "2", "--block-ms", "0.1"]
    return sweep.main(parser.parse_args([*options, *argv, "--json", str(path)]))


def test_points_are_measured_once_and_a_second_run_goes_on(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    run(path, "--tokens", "4")
    first = load(path)
    run(path)
    table = load(path)
    assert table.rows[: len(first.rows)] == first.rows, "what was measured stays"
    assert [won.point for won in winners(table)] == [
        Point(tokens, 4, 2, skew) for tokens in (4, 8) for skew in (0.0, 1.0)
    ], "K 8 of 4 experts is no point"
    assert table.values("arm") == ["dense", "copy", "loop", "grouped"]
    assert all(len(row.repeats) == 2 for row in table.rows)
    assert all(float(f"{row.median:.4g}") == row.median for row in table.rows)
    assert "4 points, 16 rows" in capsys.readouterr().out


def test_a_file_of_something_else_is_not_gone_on_with(tmp_path):
    path = tmp_path / "sweep.json"
    run(path, "--tokens", "4", "--skew", "0")
    with pytest.raises(ValueError, match="is of rounds 2, this run of 3"):
        run(path, "--rounds", "3")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens", "0"], "tokens=0 must be"),
        (["--skew", "-1"], "skew=-1.0 must be"),
        (["--backends", "auto"], "backends='auto' is not known"),
        (["--direction", "back"], "direction='back' is not known"),
        (["--device", "tpu"], "device='tpu' is not known"),
        (["--top-k", "8"], r"top_k=\[8\] must have one of at most experts=\[4\]"),
    ],
)
def test_bad_options_are_named(tmp_path, argv, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "sweep.json", *argv)
