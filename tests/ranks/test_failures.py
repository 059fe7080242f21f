"""Every failure of the notebook fails as it says, and the layer's own way does not."""

import pytest
import torch

from moe_lab.jobs import failures
from moe_lab.layer.router import count
from moe_lab.parallel import RankError, RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, backend="gloo") as pool:
        yield pool


def test_expert_gradients_are_as_many_times_too_large_as_ranks(pool):
    assert pool.run(failures.expert_gradients, 16, False) == pytest.approx([4.0] * 4)
    assert pool.run(failures.expert_gradients, 16, True) == pytest.approx([1.0] * 4)


def test_settings_that_differ_raise_one_error_on_every_rank(pool):
    (message,) = set(pool.run(failures.wire_with_own_threshold, [0.1, 0.1, 0.2, 0.1]))
    assert message.startswith("equal_split_threshold differs across the mesh: 0.1 on ranks [0, 1, 3], 0.2 on ranks [2]")
    assert pool.run(failures.wire_with_own_threshold, [0.1] * 4) == ["wired"] * 4


def test_a_choice_of_each_rank_hangs_only_where_ranks_choose_differently(pool):
    assert pool.run(failures.wrong_choice_per_rank, [[2, 2, 2, 2]] * 4) == ["done"] * 4
    with pytest.raises(RankError, match="no answer within 1 s"):
        pool.run(failures.wrong_choice_per_rank, [[2, 2, 2, 2], *[[1, 2, 3, 2]] * 3], timeout=1.0)


def test_the_tail_leaks_unless_it_is_masked():
    x, weight, ends = torch.ones(4, 8), torch.ones(2, 8, 8), torch.tensor([1, 3], dtype=torch.int32)
    assert failures.wrong_tail(x, weight, ends).isnan().all()
    assert failures.masked_tail(x, weight, ends).tolist() == [24.0] * 8


def test_a_map_counts_repeated_experts_once():
    ids = torch.tensor([[0, 1], [1, 1]])
    assert failures.wrong_counts(ids, 2).tolist() == [1, 2]
    assert count(ids, 2).tolist() == [1, 3]


def test_in_place_addition_changes_the_input():
    x = torch.ones(2, 1)
    assert failures.wrong_scatter_add(x, torch.ones(1, 1), torch.tensor([1])).tolist() == [[1.0], [2.0]]
    assert x.tolist() == [[1.0], [2.0]]
