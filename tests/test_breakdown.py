import time
from itertools import chain

import torch

from moe_lab import phases
from moe_lab.study.breakdown import breakdown
from moe_lab.study.timing import medians

CPU = torch.device("cpu")


def layer():
    for _ in range(2):
        with phases.phase("pack"):
            time.sleep(0.01)
    with phases.phase("experts"):
        time.sleep(0.03)
    time.sleep(0.005)


def test_phases_and_the_rest_make_up_the_whole():
    found = breakdown({"layer": layer, "bare": lambda: None}, CPU, rounds=2)
    assert list(found["layer"]) == ["all", "pack", "experts", "rest"]
    assert list(found["bare"]) == ["all", "rest"]
    assert all(len(runs) == 2 for runs in found["layer"].values())
    for whole, *parts in zip(*(chain(*runs) for runs in found["layer"].values())):
        assert abs(whole - sum(parts)) < 1e-6
    pack, experts, rest = (min(medians(found["layer"][name])) for name in ("pack", "experts", "rest"))
    assert pack >= 20, "twice in a run: their sum"
    assert experts >= 30
    assert rest >= 5
