import pytest

from moe_lab.config import MoEConfig
from moe_lab.jobs import cpu_bench
from moe_lab.study.measurements import Measurements, load


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(cpu_bench, "LAYERS", {"tiny": 12})
    config = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2)
    monkeypatch.setattr(cpu_bench, "layer_config", lambda name: config)


def test_the_table_holds_every_arm_and_is_written_and_shown(tiny, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(cpu_bench, "DTYPES", ("float32",))
    monkeypatch.setattr(cpu_bench.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": "1.5 1048576\n"})())
    assert cpu_bench.main(["--json", str(tmp_path / "out.json"), "--rounds", "2"]) == 0
    measured = capsys.readouterr().out
    table = load(tmp_path / "out.json")
    assert set(table.values("arm")) == {
        *("dense", "copy", "buffered", "products", "plan", "all", *cpu_bench.PEERS, "gather", "deterministic_2d_index")
    }
    assert set(table.values("bench")) == {"layer", "parts", "combine", "memory"}
    assert cpu_bench.main(["--show", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out == measured
    assert "tiny       float32   buffered 1   transformers_eager 1   transformers_grouped_mm 1" in measured
    assert measured.count("[") == 4  # an interval for layer and combine, both directions


def test_an_interrupt_keeps_what_was_measured(tiny, monkeypatch, tmp_path):
    def rows(layer, dtype, rounds):
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu_bench, "rows_of", rows)
    with pytest.raises(KeyboardInterrupt):
        cpu_bench.main(["--json", str(tmp_path / "out.json")])
    assert load(tmp_path / "out.json") == Measurements(load(tmp_path / "out.json").environment)


def test_memory_counts_above_what_was_there(tiny, capsys):
    cpu_bench.print_memory("buffered", "tiny", "float32")
    ms, peak = capsys.readouterr().out.split()
    assert float(ms) > 0
    assert 0 <= int(peak) < 2**28
    with pytest.raises(ValueError, match=r"arm='x' is not known|arm='x'"):
        cpu_bench.main(["--memory", "x", "tiny", "float32"])
