import json

import numpy as np
import pytest

from moe_lab import data
from moe_lab.jobs.overlap import BESIDE_SHARED, exposed, kept, microseconds, pack, typical, unpack
from moe_lab.phases import Span
from moe_lab.study.timeline import Flight, RankSteps, by_exchange
from moe_lab.view.overlap import changes, trace_table, traced


@pytest.fixture(scope="module", params=["overlap.json", "h100x2_overlap.json"])
def result(request):
    return json.loads(data.result(request.param).read_text())


def a_rank(late):
    """Combine until 8 s, 2 of them hidden, its gradients until 26; computing from 3 to 5 and 7 to 9."""
    flights = [
        Flight("dispatch", 0, 0, 1),
        Flight("combine", late, late + 2, 8),
        Flight("combine gradients", 20 + late, 20 + late, 26),
    ]
    return RankSteps((Span("computing", 0.5, 0.9), Span("computing", 3, 5), Span("computing", 7, 9)), tuple(flights))


def test_of_a_layer_combine_is_kept_with_what_was_computed_meanwhile():
    ranks = [a_rank(0), a_rank(1)]
    rows = microseconds({"off": [ranks], "on": [ranks, ranks]})
    assert (len(rows["off"]), len(rows["on"])) == (1, 2)
    assert rows["off"][0] == {
        "combine": [[1_000_000, 7_000_000, 6_000_000, 2_000_000], [0, 7_000_000, 5_000_000, 2_000_000]],
        "combine gradients": [[1_000_000, 5_000_000, 6_000_000, 0], [0, 5_000_000, 5_000_000, 0]],
    }
    packed = pack([kept(rank) for rank in ranks])
    assert packed[1]["combine"] == {"flight": [1e6, 3e6, 8e6], "computing": [[3e6, 5e6], [7e6, 9e6]]}
    assert packed[1]["combine gradients"] == {"flight": [1e6, 1e6, 6e6], "computing": []}
    assert by_exchange(unpack(packed, "combine")) == {"combine": by_exchange(ranks)["combine"]}


def test_exposed_is_the_mean_of_ranks_summed_over_layers_and_a_typical_round_is_the_median_one():
    def layer(ms):
        return {name: [[0, 0, 1000 * ms, 0], [0, 0, 1000 * ms + 2000, 0]] for name in BESIDE_SHARED}

    rounds = [{"off": [layer(5), layer(1)], "on": [layer(5 - less), layer(1)]} for less in (1, 5, 2)]
    assert exposed(rounds, "off", "combine") == [8, 8, 8]
    assert exposed(rounds, "on", "combine", 0) == [5, 1, 4]
    assert typical(rounds, 0) == 2
    off, on, change = changes({"rounds": rounds}, "combine", 0)
    assert (off.median, on.median, change.median) == (6, 4, -2)


def test_in_the_file_overlap_takes_exposed_time_off_every_layer_forward_and_backward(result):
    layers = range(len(result["rounds"][0]["off"]))
    for name in BESIDE_SHARED:
        for layer in (*layers, None):
            assert changes(result, name, layer)[2].high < 0
    lines = [line.split() for line in trace_table(result).splitlines()]
    assert [line[0] for line in lines] == ["layer", *map(str, layers), "all"]


def test_in_the_file_of_gloo_nothing_is_hidden_at_once():
    for one in json.loads(data.result("overlap.json").read_text())["rounds"]:
        assert all(rank[3] == 0 for layer in one["off"] for name in BESIDE_SHARED for rank in layer[name])


def test_the_figure_shows_every_layer_and_the_intervals_of_one(result):
    above, below, *_ = traced(result).axes
    off, on = above.lines
    for line, side in ((off, "off"), (on, "on")):
        layers = range(len(result["rounds"][0][side]))
        medians = [np.median(exposed(result["rounds"], side, "combine", layer)) for layer in layers]
        np.testing.assert_allclose(line.get_ydata(), medians)
    shown = {side: by_exchange(unpack(result["shown"][side], "combine"))["combine"] for side in ("off", "on")}
    for rank in (0, 1):
        for side in ("off", "on"):
            bars = [bar for bar in below.patches if bar.get_y() + 0.4 == pytest.approx(2.4 * rank + (side == "on"))]
            whole, *hidden = (bar.get_width() for bar in bars if bar.get_height() == pytest.approx(0.8))
            part = shown[side][rank]
            assert whole == pytest.approx(1e3 * (part.exposed + part.hidden))
            assert sum(hidden) == pytest.approx(1e3 * part.hidden, abs=1e-3)
