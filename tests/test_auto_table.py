import json

import pytest

from moe_lab import data
from moe_lab.jobs import auto_table
from moe_lab.layer import auto
from moe_lab.layer.auto import Case

CASE = Case("cpu", "float32", False, 4.0, 16, 16, 4)


@pytest.fixture(autouse=True)
def forget_the_table():
    auto.forget_table()
    yield
    auto.forget_table()


def test_regret_by_hand(monkeypatch):
    monkeypatch.setattr(auto, "table", lambda: [(CASE, {"loop": 1.0, "padded": 2.0, "batched": 0.1})])
    found = list(auto_table.regrets([(CASE, {"loop": 3.0, "padded": 2.0, "batched": 0.1})]))
    assert found == [(CASE, "loop", 0.5)]  # batched runs equal counts only, which skewed routing has not


def test_the_command_writes_its_device_and_keeps_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(auto_table.GRID, "cpu", [(4, 16, 16, 4)])
    monkeypatch.setitem(auto_table.HELD_OUT, "cpu", [(6, 16, 16, 4)])
    path = tmp_path / "table.json"
    other = {"case": CASE._replace(device="cuda")._asdict(), "ms": {"loop": 1.0}, "on": "a GPU"}
    path.write_text(json.dumps([other]))
    monkeypatch.setattr(auto, "TABLE", path)
    held_out = tmp_path / "held_out.json"
    assert auto_table.main(["--rounds", "1", "--held-out", str(held_out)]) == 0
    kept, *new = json.loads(path.read_text())
    assert kept == other
    assert [(r["case"]["dtype"], r["case"]["grad"], sorted(r["ms"])) for r in new] == [
        ("float32", False, ["batched", "buffered", "grouped", "loop", "padded"]),
        ("float32", True, ["buffered", "grouped", "loop", "padded"]),
        ("bfloat16", False, ["batched", "buffered", "grouped", "loop", "padded"]),
        ("bfloat16", True, ["buffered", "grouped", "loop", "padded"]),
    ]
    assert [row["case"]["rows"] for row in json.loads(held_out.read_text())] == [6.0] * 4
    assert "4 held-out cases: regret mean" in capsys.readouterr().out


def test_the_committed_table_chooses_well_of_shapes_that_it_does_not_hold():
    """At most a tenth longer than the fastest, in every held-out case that was measured with the table."""
    held_out = auto.read(data.result("auto_held_out.json"))
    for device in ("cpu", "cuda"):
        assert [case for case, _ in held_out if case.device == device] == list(
            auto_table.cases(device, auto_table.HELD_OUT[device])
        )
    found = list(auto_table.regrets(held_out))
    assert not {case for case, _ in held_out} & {case for case, _ in auto.table()}
    assert max(regret for *_, regret in found) <= 0.10
    assert len({name for _, name, _ in found}) == 4  # of five: no single backend is best anywhere


def test_the_committed_table_is_that_of_the_command():
    assert [case for case, _ in auto.table()] == [
        case for device in ("cpu", "cuda") for case in auto_table.cases(device, auto_table.GRID[device])
    ]


def test_four_near_shapes_regret_least_within_the_table(monkeypatch):
    """Each case of the table chosen by the others."""
    table = auto.table()

    def regret(near: int, device: str) -> float:
        monkeypatch.setattr(auto, "NEAR", near)
        found = []
        for i, (case, ms) in enumerate(table):
            if case.device == device:
                monkeypatch.setattr(auto, "table", lambda i=i: table[:i] + table[i + 1 :])
                auto.relative_times.cache_clear()
                found += [regret for *_, regret in auto_table.regrets([(case, ms)])]
        return sum(found) / len(found)

    cpu, cuda = ({near: regret(near, device) for near in range(1, 9)} for device in ("cpu", "cuda"))
    assert min(cpu, key=cpu.__getitem__) == min(cuda, key=cuda.__getitem__) == 4
    assert (cpu[4], cuda[4]) == pytest.approx((0.025, 0.011), abs=5e-4)
    assert (cpu[1], cuda[1]) == pytest.approx((0.114, 0.029), abs=5e-4)
