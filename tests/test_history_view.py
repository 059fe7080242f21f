import pytest
import torch

from moe_lab.study.counts import CountsTrace
from moe_lab.study.history import trajectories
from moe_lab.view import history, theme

COUNTS = CountsTrace.from_tensor(torch.tensor([[[4, 0]], [[2, 2]], [[0, 0]]]), ("step", "layer", "expert"))


def test_load_over_steps_by_hand():
    got = history.load_over_steps(trajectories(COUNTS))
    assert got.values_SL[:2, 0].tolist() == [2.0, 1.0]
    assert repr(got).splitlines() == [
        "max/mean  layer 0",
        "step 0      2.000",
        "step 1      1.000",
        "step 2        nan",
    ]
    assert theme.title(history.lines(got, chance=1.1)) == "Load over steps"


def test_long_runs_show_six_steps_first_and_last_among_them():
    steps = tuple(range(0, 1000, 10))
    got = history.OverSteps("cv", steps, (0, 1), torch.zeros(100, 2))
    rows = repr(got).splitlines()
    assert len(rows) == 7
    assert (rows[1].split()[1], rows[-1].split()[1]) == ("0", "990")
    many = history.OverSteps("cv", steps, tuple(range(20)), torch.rand(100, 20))
    assert theme.png(history.lines(many)).startswith(b"\x89PNG")


def test_churn_needs_a_checkpoint_more_than_changes():
    got = history.churn_over_steps((100, 200, 300), (0,), torch.tensor([[0.5], [0.25]]))
    assert (got.name, got.steps) == ("churn", (200, 300))
    with pytest.raises(ValueError, match="must name 3 checkpoints"):
        history.churn_over_steps((100, 200), (0,), torch.zeros(2, 1))
