import pytest

from moe_lab.config import MoEConfig
from moe_lab.jobs import decode_bench
from moe_lab.study.measurements import load


def test_the_table_holds_every_arm_and_is_written_and_shown(monkeypatch, tmp_path, capsys):
    config = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2)
    monkeypatch.setattr(decode_bench, "layer_config", lambda name: config)
    for name, value in {
        "LAYERS": ("tiny",),
        "TOKENS": (1, 6),
        "OURS": ("loop", "grouped"),
        "PEERS": (),
        "BLOCK_MS": 1.0,
    }.items():
        monkeypatch.setattr(decode_bench, name, value)
    path = tmp_path / "out.json"
    assert decode_bench.main(["--json", str(path), "--dtype", "float32", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    table = load(path)
    assert table.values("arm") == ["dense", "copy", "loop", "grouped"]
    assert (table.values("tokens"), table.values("mode")) == ([1, 6], ["eager"])
    grouped = table.select(arm="grouped", tokens=6).rows[0]
    lines = printed.splitlines()
    assert lines[2] == "tiny  D 16  F 8  E 4  K 2, eager"
    assert lines[3].split() == ["T", "rows", "an", "expert", "bound", "ms", "loop", "grouped"]
    assert [line.split()[:2] for line in lines[4:]] == [["1", "0.50"], ["6", "3.00"]]
    assert lines[5].split()[2] == f"{grouped.bytes_ms:.3f}"
    assert lines[5].split()[-2:] == [f"{grouped.median / grouped.bytes_ms:.2f}", "x"]
    assert decode_bench.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == printed


def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path):
    def rows(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_bench, "rows_of", rows)
    with pytest.raises(KeyboardInterrupt):
        decode_bench.main(["--json", str(tmp_path / "out.json")])
    assert load(tmp_path / "out.json").rows == ()


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="rounds=0 must be"):
        decode_bench.main(["--rounds", "0"])
