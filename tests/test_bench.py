import argparse
import json

import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.jobs import bench
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
    stored = json.loads(path.read_text())
    assert stored["environment"]["torch"] == torch.__version__
    assert stored["environment"]["command"].startswith("moe-lab")
    rows = stored["results"][0]["rows"]
    assert [row["arm"] for row in rows] == ["dense", "loop", "grouped"]
    assert all(row["arm"] in printed and row["error"] in (None, pytest.approx(0, abs=1e-6)) for row in rows)


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
