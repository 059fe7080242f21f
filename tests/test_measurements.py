import dataclasses
import json
import re
from pathlib import Path

import pytest

from moe_lab.study.measurement_text import lines
from moe_lab.study.measurements import Measurement, Measurements, load, measured

STORED = Path(__file__).resolve().parent.parent / "docs/results/h200_layer.json"
ROW = {
    "bench": "layer",
    "layer": "tiny",
    "arm": "loop",
    "tokens": 12,
    "dim": 8,
    "hidden_dim": 4,
    "num_experts": 4,
    "top_k": 2,
    "dtype": "float32",
    "device": "this CPU",
    "median": 2.0,
    "low": 1.5,
    "high": 3.0,
}
HERE = {"device": "this CPU", "rounds": 3}


def stored(tmp_path, **changes):
    content = {"format": "moe_lab measurements", "version": 1, "environment": HERE, "rows": [ROW]} | changes
    path = tmp_path / "out.json"
    path.write_text(json.dumps(content))
    return path


def test_a_row_from_rounds_and_single_runs():
    of = {k: v for k, v in ROW.items() if k not in ("median", "low", "high")}
    runs = [[1.0, 2.0, 3.0], [4.0], [6.0]]
    row = measured(runs, to=("dense", [[1.0], [1.0, 2.0, 9.0], [2.0]]), keep=True, **of)
    assert (row.median, row.q25, row.q75, row.mean) == (4.0, 2.0, 4.0, 3.2)
    assert (row.p90, row.p99) == pytest.approx((5.2, 5.92))
    assert (row.ratio_to, row.ratio) == ("dense", 2.0)
    assert row.low <= 4.0 <= row.high
    assert row.ratio_low <= 2.0 <= row.ratio_high <= 3.0
    assert row.repeats == (2.0, 4.0, 6.0)


def test_the_bound_is_the_larger_of_products_and_bytes():
    row = Measurement(**ROW, dense_ms=0.5, bytes_ms=1.0)
    assert (row.bound_ms, row.roofline_share) == (1.0, 0.5)
    assert Measurement(**ROW).roofline_share is None


def test_a_table_is_written_and_read_again(tmp_path):
    table = Measurements(HERE, (Measurement(**ROW, repeats=(1.5, 2.0, 3.0)), Measurement(**ROW | {"arm": "fused"})))
    path = tmp_path / "out.json"
    table.save(path)
    assert load(path) == table
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    assert table.select(arm="fused").values("arm") == ["fused"]
    frame = table.frame()
    assert list(frame.arm) == ["loop", "fused"]
    assert not {"p90", "repeats"} & set(frame)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version=2 must be 1"),
        ({"format": "x"}, "format must be"),
        ({"environment": {}}, "environment must name its device"),
        ({"environment": [1]}, "environment must be names"),
        ({"rows": {}}, "rows must be a list"),
        ({"rows": [3]}, "row 0 must be an object"),
        ({"rows": [ROW, ROW | {"colour": 1}]}, "row 1 has unknown fields: colour"),
        ({"rows": [ROW | {"tokens": 1.5}]}, "row 0: tokens=1.5 must be an integer"),
        ({"rows": [ROW | {"median": "2"}]}, "row 0: median='2' must be a finite number"),
        ({"rows": [ROW | {"median": -1.0, "low": -2.0}]}, "row 0: median=-1.0 must be a finite number"),
        ({"rows": [ROW | {"median": float("nan")}]}, "NaN is no measurement"),
        ({"rows": [ROW | {"median": 9.0}]}, "median=9.0 must lie between low=1.5 and high=3.0"),
        ({"rows": [ROW | {"ratio": 1.0}]}, "ratio=1.0 must lie between ratio_low=None"),
        ({"rows": [ROW | {"direction": "sideways"}]}, "direction='sideways' is not known"),
        ({"rows": [ROW | {"repeats": [1.0, "x"]}]}, "repeats="),
        ({"rows": [{k: v for k, v in ROW.items() if k != "arm"}]}, "row 0 lacks arm"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, changes, message):
    path = stored(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        load(path)
    assert "out.json" in str(refused.value)


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    path = stored(tmp_path)
    path.write_text(path.read_text()[:-20])
    for bad in (path, tmp_path / "absent.json"):
        with pytest.raises(ValueError, match="holds no measurements"):
            load(bad)


def test_unknown_fields_cannot_be_selected():
    table = Measurements(HERE, (Measurement(**ROW),))
    with pytest.raises(ValueError, match="field='colour' is not known"):
        table.select(colour=1)


def test_text_leaves_out_what_no_row_has():
    row = Measurement(**ROW, ratio_to="dense", ratio=1.25, ratio_low=1.0, ratio_high=1.5, rank=2, mode="compile")
    text = lines([row, dataclasses.replace(row, ratio=None, phase="experts")])
    title, head, first, second = text.splitlines()
    assert title == "tiny   T 12  D 8  F 4  E 4  K 2   layer, float32"
    assert head.split() == ["direction", "ms", "95", "%", "ratio", "95", "%"]
    wanted = "loop (rank 2) compiled|forward|2.000|[1.500, 3.000]|1.25 dense|[1.00, 1.50]"
    assert re.sub(r"  +", "|", first) == wanted
    assert second.split()[:4] == ["loop", "experts", "(rank", "2)"]


def test_the_stored_gpu_table_says_where_it_was_measured():
    table = load(STORED)
    assert table.values("device") == [table.environment["device"]] == ["NVIDIA H200"]
    row = table.select(layer="10B_2B", arm="fused", direction="forward+backward").rows[0]
    assert (row.median, row.ratio, row.peak) == (4.869967937469482, 1.2883161604457267, 724193280)
