"""Runs of methods: their file, means over seeds, pairs of runs, and Student's interval."""

import math

import pytest

from moe_lab.study.balance_runs import BalanceRuns, Run, estimate


def run(method, seed, bits, load=(1.0, 2.0)):
    return Run(method, seed, bits, load, 0.25, bits + 1, (3.0, 5.0), (2.0, 1.5))


RUNS = BalanceRuns(
    {"device": "none"},
    (
        run("none", 0, 2.0),
        run("bias", 0, 1.9, (1.0, 1.5)),
        run("none", 1, 3.0),
        run("bias", 1, 3.1),
        run("bias", 2, 9.0),
    ),
)


def test_methods_are_compared_in_pairs_of_one_seed():
    assert RUNS.methods == ("none", "bias")
    assert RUNS.seeds == (0, 1)
    mean, half = RUNS.paired("bias")  # -0.1 and 0.1; seed 2 has nothing to be paired with
    assert mean == pytest.approx(0)
    assert half == pytest.approx(12.706 * 0.1)  # sd 0.1414, over the root of 2
    assert RUNS.paired("none") == (0, 0)
    assert RUNS.load("bias").mean == pytest.approx((1.25 + 1.5 + 1.5) / 3)
    assert RUNS.load("bias", train=True).mean == pytest.approx(4)


def test_an_estimate_by_hand():
    mean, half = estimate([1.0, 2.0, 6.0])
    assert mean == 3
    assert half == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert math.isnan(estimate([1.0]).half)
    for values in ([], [0.0] * 12):
        with pytest.raises(ValueError, match=f"{len(values)} values"):
            estimate(values)


def test_a_file_is_read_as_it_was_written(tmp_path):
    RUNS.save(tmp_path / "runs.json")
    again = BalanceRuns.read(tmp_path / "runs.json")
    assert again.runs == RUNS.runs
    assert again.about == RUNS.about
    assert len((tmp_path / "runs.json").read_text().splitlines()) < 12


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2, "runs": []}', '{"format": 1, "runs": [{"method": "x"}]}']
)
def test_other_files_are_refused_by_name(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json does not hold runs"):
        BalanceRuns.read(tmp_path / "mine.json")
