import argparse
import signal
import subprocess
import sys

import pytest
import torch
from moe_lab.jobs.bench_table import measurements

from moe_lab.config import MoEConfig
from moe_lab.jobs import bench
from moe_lab.study.measurements import load
from moe_lab.study.timing import Timing

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    config = MoEConfig(dim=32, hidden_dim=16, num_experts=4, top_k=2)
    monkeypatch.setitem(bench.LAYERS, "tiny", config)
    return config


def run(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.main(parser.parse_args(["layer", "--preset", "tiny", "--tokens", "12", *argv]))


def test_the_command_prints_a_table_and_writes_its_numbers(tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run("--peers", "loop,grouped", "--dtype", "float32", "--rounds", "1", "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "tiny   T 12  D 32  F 16  E 4  K 2" in printed
    stored = load(path)
    assert stored.environment["torch"] == torch.__version__
    assert stored.environment["layers"] == "1 of 1"
    assert str(stored.environment["command"]).startswith("moe-lab")
    assert stored.values("arm") == ["dense", "loop", "grouped"]
    assert stored.values("direction") == ["forward", "forward+backward"]
    assert all(row.arm in printed and row.error in (None, pytest.approx(0, abs=1e-6)) for row in stored.rows)


@pytest.mark.slow
def test_an_interrupt_keeps_the_layers_that_were_measured(tmp_path):
    path = tmp_path / "out.json"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moe_lab.jobs import bench; from moe_lab.config import MoEConfig; from moe_lab import cli\n"
        "size = dict(hidden_dim=16, num_experts=4, top_k=2)\n"
        "bench.LAYERS |= {'tiny': MoEConfig(dim=32, **size), 'large': MoEConfig(dim=64, **size)}\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = [
        "bench",
        "layer",
        "--preset",
        "tiny",
        "--preset",
        "large",
        "--dtype",
        "float32",
        "--peers",
        "loop",
        "--rounds",
    ]
    argv = [sys.executable, "-c", code, *options, "40", "--tokens", "64", "--json", str(path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("loop"):
        assert line, "ended before it printed a layer"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    stored = load(path)
    assert stored.environment["layers"] == "1 of 2"
    assert stored.values("layer") == ["tiny"]


def test_rows_of_the_table_hold_every_number_of_a_result():
    dense = bench.Row("dense", Timing(2.0, 1.9, 2.1), Timing(1.0, 1.0, 1.0), Timing(6.0, 5.9, 6.1), Timing(1, 1, 1))
    fused = bench.Row(
        "fused", Timing(4.0, 3.9, 4.1), Timing(2.0, 1.9, 2.1), Timing(9.0, 8.0, 10.0), Timing(1.5, 1.4, 1.6), 3, 5, 0.1
    )
    shape = {"T": 1, "D": 2, "F": 3, "E": 4, "K": 2}
    kernels = {"sort": Timing(0.02, 0.01, 0.03)}
    result = bench.Result("tiny", shape, 1.5, (dense, fused), kernels, {"sort": 0.01}, {"x": "y"})
    table = measurements([result], {"device": "a CPU", "dtype": "float32"})
    assert table.environment["tiny without x"] == "y"
    there, back = table.select(arm="fused").rows
    assert (there.median, there.ratio, there.dense_ms, there.error) == (4.0, 2.0, 2.0, 0.1)
    assert (back.median, back.low, back.high, back.ratio, back.dense_ms) == (9.0, 8.0, 10.0, 1.5, 6.0)
    assert (back.saved, back.peak, back.tokens, back.top_k, back.max_over_mean) == (3, 5, 1, 2, 1.5)
    assert table.select(bench="kernels").rows[0].roofline_share == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cuda"], "device='cuda' is not here"),
        (["--peers", "loop,nobody"], "peers='nobody' is not known"),
        (["--preset", "nothing"], "preset='nothing' is not known"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--rounds", "0"], "rounds=0 must be"),
        (["--tokens", "0"], "tokens=0 must be"),
    ],
)
def test_bad_options_are_named(tiny, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=message):
        run(*argv)


def test_routing_is_skewed_and_seeded(tiny):
    first, second = (bench.make_inputs(tiny, 500, CPU, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    counts = torch.bincount(first.expert_ids_TK.flatten(), minlength=4).float()
    assert counts.max() / counts.mean() > 1.1


def test_a_row_says_what_was_not_measured():
    row = bench.Row("fused", Timing(1.0, 0.9, 1.1), Timing(2.0, 1.9, 2.1))
    result = bench.Result("tiny", {"T": 1}, 1.5, (row,), {"sort": Timing(0.02, 0.01, 0.03)}, {"sort": 0.01}, {"x": "y"})
    lines = str(result).splitlines()
    assert lines[0] == "tiny   T 1   max/mean 1.50"
    assert lines[2].split() == ["fused", "1.000", "[0.900,", "1.100]", "2.00", "-", "-", "-", "-", "-"]
    assert lines[3].split()[:3] == ["sort", "0.0200", "ms"]
    assert lines[3].endswith("2.00 x its bytes (0.0100 ms)")
    assert lines[4] == "  x: not run: y"
