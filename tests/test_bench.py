import argparse
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.jobs import bench, bench_inputs
from moe_lab.study.measurements import load

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    config = MoEConfig(dim=32, hidden_dim=16, num_experts=4, top_k=2)
    monkeypatch.setitem(bench_inputs.LAYERS, "tiny", config)
    return config


def run(*argv, what="layer"):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = ["--preset", "tiny", "--tokens", "12", "--dtype", "float32", "--rounds", "2"]
    return bench.main(parser.parse_args([what, *options, *argv]))


def test_the_command_prints_a_table_and_writes_its_numbers(tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run("--backends", "loop,grouped", "--peers", "torchtitan_ops", "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "tiny   T 12  D 32  F 16  E 4  K 2" in printed
    stored = load(path)
    assert stored.environment["torch"] == torch.__version__
    assert stored.environment["layers"] == "1 of 1"
    assert str(stored.environment["command"]).startswith("moe-lab")
    layer = stored.select(bench="layer")
    assert layer.values("arm") == ["dense", "copy", "loop", "grouped", "torchtitan_ops"]
    assert layer.values("direction") == ["forward", "forward+backward"]
    for row in layer.rows:
        assert None not in (row.q25, row.q75, row.p90, row.p99, row.mean, row.ratio_low, row.ratio_high)
        assert row.ratio_to == "dense"
        assert (row.bytes_ms is None) == (row.error is None) == (row.arm in ("dense", "copy"))
        assert row.error is None or 0 < row.error < 1e-6
    found = stored.select(bench="phases", arm="grouped")
    assert found.values("phase") == ["all", "plan", "pack", "experts", "combine", "rest"]
    assert stored.select(bench="phases").values("arm") == ["loop", "grouped"], "a library's arm has no phases"


@pytest.mark.parametrize(
    ("what", "arms"),
    [
        ("experts", ["dense", "copy", "loop", "padded", "grouped"]),
        ("dispatch", ["copy", "local", "torch_sort_index"]),
        ("combine", ["copy", "gather", "scatter_add", "index_add", "deterministic_2d_index"]),
    ],
)
def test_each_step_is_measured_alone(tiny, tmp_path, what, arms):
    path = tmp_path / "out.json"
    run("--json", str(path), *(["--backends", "loop,padded,grouped"] if what == "experts" else []), what=what)
    stored = load(path)
    assert stored.values("bench") == [what]
    assert stored.values("arm") == arms
    assert all(row.ratio_to == arms[0] and row.ratio > 0 for row in stored.rows)


def test_compiled_arms_stand_beside_eager_ones(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    path = tmp_path / "out.json"
    run("--compile", "--backends", "none", "--peers", "index_add", "--json", str(path), what="combine")
    stored = load(path).select(arm="index_add")
    assert [(row.mode, row.direction) for row in stored.rows] == [
        (mode, direction) for direction in ("forward", "forward+backward") for mode in ("eager", "compile")
    ]


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_measured_and_leaves_no_process(tmp_path):
    path = tmp_path / "out.json"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moe_lab.jobs import bench_inputs; from moe_lab.config import MoEConfig; from moe_lab import cli\n"
        "size = dict(hidden_dim=16, num_experts=4, top_k=2)\n"
        "bench_inputs.LAYERS |= {'tiny': MoEConfig(dim=32, **size), 'large': MoEConfig(dim=64, **size)}\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    options = "bench combine --preset tiny --preset large --dtype float32 --peers none --rounds 40 --tokens 64"
    argv = [sys.executable, "-c", code, *options.split(), "--json", str(path)]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("gather"):
        assert line, "ended before it printed anything"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    stored = load(path)
    assert stored.environment["layers"] == "0 of 2"
    assert stored.values("layer") == ["tiny"]
    assert stored.values("arm") == ["copy", "gather", "scatter_add"]
    assert stored.values("direction") == ["forward"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cuda"], "device='cuda' is not here"),
        (["--device", "tpu"], "device='tpu' is not known"),
        (["--peers", "nobody"], "peers='nobody' is not known"),
        (["--backends", "loop,nobody"], "backends='nobody' is not known"),
        (["--preset", "nothing"], "preset='nothing' is not known"),
        (["--preset", "tiny/3"], "'3' must be an integer >= 1 that divides dim=32 and hidden_dim=16"),
        (["--preset", "tiny/"], "'' must be an integer"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--rounds", "0"], "rounds=0 must be"),
        (["--tokens", "0"], "tokens=0 must be"),
        (["--ep", "2"], "^ep: for many ranks, start with torchrun"),
        (["--kinds", "equal", "--iterations", "9"], "^kinds, iterations: for many ranks, start with torchrun"),
    ],
)
def test_bad_options_are_named(tiny, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=message):
        run(*argv)


def test_a_layer_may_be_named_with_a_part_of_its_widths():
    config = bench_inputs.layer_config("10B_2B/8")
    assert (config.dim, config.hidden_dim, config.num_experts, config.top_k) == (256, 176, 36, 3)
    assert bench_inputs.layer_config("10B_2B").dim == 2048
    assert (bench_inputs.default_tokens("mixtral_8x7b/4"), bench_inputs.default_tokens("fine")) == (8192, 16384)


def test_routing_is_skewed_and_seeded(tiny):
    first, second = (bench_inputs.make_inputs(tiny, 500, CPU, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    even = bench_inputs.make_inputs(tiny, 500, CPU, torch.float32, skew=0.0)
    assert bench_inputs.imbalance(first) > 1.1 > bench_inputs.imbalance(even) >= 1.0
