import dataclasses

import pytest
import torch

from moe_lab.jobs.first_flip import Choices, first_flip, on_ranks, watched
from moe_lab.jobs.layouts import LAYOUTS, SHRUNK, source_text
from moe_lab.jobs.train import Trainer
from moe_lab.parallel import RankPool


def choices(values_SLTE, losses):
    ids_SLTK = values_SLTE.topk(2, dim=-1).indices.sort(dim=-1).values
    return Choices(losses, values_SLTE, ids_SLTK)


def test_the_first_flip_is_named_with_its_gaps_and_what_losses_do():
    values = torch.tensor([0.5, 0.2, 0.1, 0.3]).repeat(3, 2, 4, 1)
    moved = values.clone()
    moved[1, 1, 2] += torch.tensor([0.0, 0.125, 0.0, 0.0])  # the second expert passes the fourth
    moved[1, 1, 3] += torch.tensor([0.0, 0.0, 0.25, 0.0])
    found = first_flip(choices(values, [4.0, 2.0, 1.0]), choices(moved, [4.0, 2.0, 1.5]))
    assert found[:4] == (1, 1, 2, (3, 1))
    assert (found.gap, found.gap_on_ranks) == pytest.approx((0.1, -0.025))
    assert found[6:] == (0.25, 0.0, 0.5, 2)


def test_equal_choices_have_no_flip():
    values = torch.rand(2, 1, 3, 4)
    assert first_flip(choices(values, [1.0, 1.0]), choices(values + 1, [1.0, 1.0])) is None


@pytest.mark.slow
def test_ranks_see_the_tokens_of_one_process_in_the_batch_s_order(one_thread):
    config = dataclasses.replace(SHRUNK, steps=2)
    one = watched(Trainer(config, source_text(), "cpu"))
    with RankPool(4, backend="gloo") as pool:
        ranks = on_ranks(pool, config, LAYOUTS["dp 2 x ep 2"])
    assert one.values_SLTE.shape == (2, 2, 8 * 32, 8)
    torch.testing.assert_close(ranks.values_SLTE, one.values_SLTE, rtol=1e-5, atol=1e-7)
    assert torch.equal(ranks.ids_SLTK, one.ids_SLTK)
