from moe_lab import data
from moe_lab.study.measurements import Measurement, Measurements, load
from moe_lab.view import decoding

SIZES = {"dim": 8, "hidden_dim": 4, "num_experts": 4, "top_k": 2, "dtype": "bfloat16", "device": "by hand"}


def row(arm, mode, tokens, ms, bound):
    times = {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms}
    return Measurement(
        bench="decode", layer="tiny", arm=arm, mode=mode, tokens=tokens, bytes_ms=bound, **times, **SIZES
    )


def test_lines_are_times_the_bound_by_tokens():
    rows = [row("a", "eager", 1, 3.0, 1.5), row("a", "eager", 4, 5.0, 2.0), row("a", "graph", 4, 3.0, 2.0)]
    rows += [row("copy", "eager", 1, 1.0, None)]
    (axes,) = decoding.bounds_by_tokens(Measurements({"device": "by hand"}, tuple(rows)), "by hand").axes
    drawn = [(line.get_linestyle(), line.get_xydata().tolist()) for line in axes.lines if len(line.get_xdata())]
    assert drawn == [
        (":", [[1.0, 2.0], [4.0, 2.5]]),
        ("-", [[4.0, 1.5]]),
        ("--", [[0.0, 1.0], [1.0, 1.0]]),
    ]
    assert axes.get_title(loc="left") == "tiny\nD 8, F 4, E 4, K 2"


def test_the_stored_results_show_fused_nearest_to_the_bound():
    table = load(data.result("h100_decode.json"))
    figure = decoding.bounds_by_tokens(table, "one H100")
    assert len(figure.axes) == len(table.values("layer"))
    best = {}
    for found in table.select(mode="graph").rows:
        if found.bytes_ms is not None:
            best.setdefault((found.layer, found.tokens), []).append((found.median, found.arm))
    assert {min(arms)[1] for arms in best.values()} == {"fused"}
