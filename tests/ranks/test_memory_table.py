import pytest
import torch

from moe_lab.jobs import memory_table
from moe_lab.models.lm import MoELM
from moe_lab.parallel import RankPool
from moe_lab.study.planner import Layout
from tests.test_lm import TINY


def test_a_row_for_every_precision_and_recompute_beside_its_plan(monkeypatch):
    """On gloo, for which the formulas are: on two GPUs the same rows say how far off they are there."""
    monkeypatch.setattr(memory_table, "LAYOUTS", {"EP 2": Layout(2, 2)})
    torch.manual_seed(0)
    with RankPool(2, backend="gloo") as pool:
        rows = memory_table.rows(pool, MoELM(TINY), torch.randint(256, (4, TINY.max_length + 1)))
    assert [(row["layout"], row["dtype"], row["recompute"]) for row in rows] == [
        ("EP 2", dtype, recompute) for dtype in ("float32", "bfloat16") for recompute in (False, True)
    ]
    for row in rows:
        assert row["counted"]["activations"] == row["planned"]["activations"]
        assert row["counted"]["peak"] == pytest.approx(row["planned"]["peak"], rel=0.1)
    least = min(rows, key=lambda row: row["counted"]["activations"])
    assert (least["dtype"], least["recompute"]) == ("bfloat16", True)
    facts = {"device": "here", "torch": "2", "sequences": 2, "length": TINY.max_length}
    lines = memory_table.text(facts | {"rows": rows}).splitlines()
    assert lines[0] == "here  torch 2  2 x 32 tokens a rank"
    assert lines[2].split()[:3] == ["EP", "2", "float32"]
    assert lines[2].split()[-1] == "+0.0%"


def test_two_gpus_are_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="1 GPUs: 2 are needed"):
        memory_table.main([str(tmp_path / "out.json")])
