"""Counts with named dimensions, from tensors, JSON and CSV."""

import json
from itertools import product

import pytest
import torch

from moe_lab.study.counts import CountsTrace

COUNTS_SLRE = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)


def test_dimensions_are_known_by_name():
    trace = CountsTrace.from_tensor(COUNTS_SLRE.permute(3, 1, 0, 2).numpy(), ("expert", "layer", "step", "rank"))
    assert torch.equal(trace.counts_SLRE, COUNTS_SLRE)
    assert torch.equal(trace.counts_LE, COUNTS_SLRE.sum(dim=(0, 2)))
    assert torch.equal(CountsTrace.from_tensor(COUNTS_SLRE[0, 0, 0], ["expert"]).counts_LE, COUNTS_SLRE[0, 0, :1])


def test_parts_are_chosen_by_name():
    trace = CountsTrace(COUNTS_SLRE, (100, 200), (3, 5, 7), (0, 1))
    part = trace.select(step=200, layer=5)
    assert (part.steps, part.layers, part.ranks) == ((200,), (5,), (0, 1))
    assert torch.equal(part.counts_SLRE, COUNTS_SLRE[1:, 1:2])
    with pytest.raises(ValueError, match=r"layer=4 is not here: choose one of \(3, 5, 7\)"):
        trace.select(layer=4)


def test_records_may_leave_zeros_out():
    records = [{"step": 9, "expert": 1, "count": 5}, {"step": 4, "expert": 0, "count": 2}]
    trace = CountsTrace.from_records(records, num_experts=3)
    assert (trace.steps, trace.layers, trace.ranks) == ((4, 9), (0,), (0,))
    assert trace.counts_SLRE.squeeze().tolist() == [[2, 0, 0], [0, 5, 0]]
    assert CountsTrace.from_records(records).num_experts == 2


def test_files_hold_the_same(tmp_path):
    trace = CountsTrace.from_tensor(COUNTS_SLRE, ("step", "layer", "rank", "expert"))
    (tmp_path / "nested.json").write_text(
        json.dumps({"dims": ["step", "layer", "rank", "expert"], "counts": COUNTS_SLRE.tolist()})
    )
    cells = [(*slr, e) for slr in product(range(2), range(3), range(2)) for e in range(4)]
    records = [dict(zip(("step", "layer", "rank", "expert", "count"), (*c, int(COUNTS_SLRE[c])))) for c in cells]
    (tmp_path / "records.json").write_text(json.dumps(records))
    rows = [",".join(map(str, record.values())) for record in records]
    (tmp_path / "rows.csv").write_text("\n".join(["step,layer,rank,expert,count", *rows]) + "\n")
    for name in ("nested.json", "records.json", "rows.csv"):
        loaded = CountsTrace.load(tmp_path / name)
        assert torch.equal(loaded.counts_SLRE, trace.counts_SLRE)
        assert (loaded.steps, loaded.layers, loaded.ranks) == (trace.steps, trace.layers, trace.ranks)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"dims": ["expert"], "counts": [1, -2]}', "counts_SLRE holds -2"),
        ("a.json", '{"dims": ["expert"], "counts": [1.5]}', "nested lists of integers"),
        ("a.json", '{"dims": ["layer", "expert"], "counts": [[1], [2, 3]]}', "as long as each other"),
        ("a.json", '{"dims": ["layer"], "counts": [1]}', "'expert' among them"),
        ("a.json", '{"dims": ["expert", "expert"], "counts": [[1]]}', "must be different names"),
        ("a.json", '{"dims": ["time", "expert"], "counts": [[1]]}', "must be different names"),
        ("a.json", '{"dims": ["layer", "expert"], "counts": [1]}', "counts have 1 dimensions"),
        ("a.json", '{"dims": ["expert"], "counts": [99999999999999999999]}', "nested lists of integers"),
        ("a.json", '{"dims": ["expert"], "counts": []}', "nested lists of integers"),
        ("a.json", "[" * 100_000, "is no file of counts"),
        ("a.json", "3", "must hold"),
        ("a.json", "[]", "there must be at least one record"),
        ("a.json", '[{"expert": 1}]', "record 1 has 'expert': must have 'expert' and 'count'"),
        ("a.json", "[[1, 2]]", "a list must be of records"),
        ("a.csv", "Expert,Tokens\n1,2\n", "record 1 has 'Expert', 'Tokens': must have 'expert' and 'count'"),
        ("a.json", '[{"expert": 1, "count": 1, "node": 2}]', "record 1 has 'expert', 'count', 'node'"),
        ("a.json", '[{"expert": 1, "count": true}]', "record 1: count=True"),
        ("a.json", '[{"expert": 99999, "count": 1}]', "record 1: expert=99999"),
        ("a.json", '[{"expert": 1, "count": 1}, {"expert": 1, "count": 1}]', "record 2: .* is counted twice"),
        ("a.csv", "expert,count\n1,x\n", "line 2: 'x' is no integer"),
        ("a.csv", "expert,count\n1,-1\n", "line 2: '-1' is no integer"),
        ("a.csv", "expert,count\n1,²\n", "line 2: '²' is no integer"),
        ("a.csv", "expert,count\n1\n", "line 2 has 1 cells, the header 2"),
        ("a.csv", "expert,expert\n1,2\n", "names a column twice"),
        ("a.csv", 'expert,count\n1,"2\n', "line 2: unexpected end of data"),
        ("a.csv", "", "at least one record"),
        ("none.csv", None, "No such file"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        CountsTrace.load(tmp_path / name)


def test_too_many_cells_are_refused_before_they_are_made():
    records = [{"step": i, "layer": i, "rank": i, "expert": 30_000, "count": 1} for i in range(100)]
    with pytest.raises(ValueError, match="are more than 134,217,728 cells"):
        CountsTrace.from_records(records)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.zeros(1, 1, 1, 0, dtype=torch.int64), "holds no counts"),
        (torch.zeros(1, 1, 1, 2), "must be an int64 CPU tensor"),
        (torch.zeros(1, 1, 2, dtype=torch.int64), "must be an int64 CPU tensor"),
        (torch.zeros(1, 2, 1, 2, dtype=torch.int64), r"layers=\(0,\) must be 2 different integers"),
    ],
)
def test_values_are_checked(counts, message):
    with pytest.raises(ValueError, match=message):
        CountsTrace(counts, (0,), (0,), (0,))


def test_a_table_saved_by_excel_is_read(tmp_path):
    (tmp_path / "excel.csv").write_text("\ufeffexpert, count\n0, 5\n1, 7\n", encoding="utf-8")
    assert CountsTrace.load(tmp_path / "excel.csv").counts_LE.tolist() == [[5, 7]]
