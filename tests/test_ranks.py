"""Load of ranks and tiles: formulas by hand, chance by simulation."""

import pytest
import torch

from moe_lab import RouterConfig
from moe_lab.layer.router import count
from moe_lab.study.ranks import (
    block_placement,
    chance_straggler,
    padded_waste,
    rank_load,
    rank_rows,
    straggler_factor,
    tile_waste,
)
from moe_lab.study.trace import RoutingTrace
from synthetic import synthetic_trace


def test_placement_by_hand():
    assert block_placement(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"num_experts=36 cannot be spread over ep=8 ranks \(36 % 8 = 4\): choose ep"):
        block_placement(36, 8)


def test_straggler_by_hand():
    counts_LE = torch.tensor([[3, 1, 0, 0], [1, 1, 1, 1]])
    assert rank_rows(counts_LE, block_placement(4, 2), 2).tolist() == [[4, 0], [2, 2]]
    assert straggler_factor(counts_LE, block_placement(4, 2), 2) == pytest.approx(1.5)
    # Another placement of the same counts: rank 0 holds experts 0 and 2.
    assert straggler_factor(counts_LE, torch.tensor([0, 1, 0, 1]), 2) == pytest.approx((3 + 2) / 4)
    assert straggler_factor(counts_LE, torch.zeros(4, dtype=torch.int64), 1) == 1.0
    with pytest.raises(ValueError, match="no rows, no straggler"):
        straggler_factor(torch.zeros(2, 4, dtype=torch.int64), block_placement(4, 2), 2)


def test_waste_by_hand():
    counts_NE = torch.tensor([[128, 1, 0, 127], [256, 256, 256, 256]])
    assert tile_waste(counts_NE).tolist() == pytest.approx([384 / 256 - 1, 0.0])
    assert tile_waste(counts_NE[0], 64).item() == pytest.approx((128 + 64 + 128) / 256 - 1)
    assert padded_waste(counts_NE).tolist() == pytest.approx([1 - 64 / 128, 0.0])


def test_a_trace_is_played_through_ranks():
    trace = synthetic_trace(tokens=1000, layers=2, experts=8, top_k=2)
    load = rank_load(trace, 4, 100, shuffle=False)
    assert (load.windows, load.layers) == (2, 2)
    largest, mean = [], []
    for window in trace.select(tokens=800).windows(400):
        for layer in range(2):
            rows = count(window.expert_ids_LTK[layer].long(), 8).view(4, 2).sum(dim=1)
            largest.append(int(rows.max()))
            mean.append(float(rows.double().mean()))
    assert load.straggler == pytest.approx(sum(largest) / sum(mean))
    assert load.rows_mean == 400 * 2 / 4
    assert load.rows_p50 == pytest.approx(sorted(largest)[1] / 2 + sorted(largest)[2] / 2)
    assert max(largest) * 0.99 < load.rows_p999 <= max(largest)
    assert "straggler" in repr(load)


def test_padding_is_on_no_rank():
    whole = synthetic_trace(tokens=1000, layers=2, experts=8, top_k=2)
    padded = whole.unchecked(valid_T=torch.arange(1000) % 5 > 0)
    rows = [count(ids_TK[padded.valid_T].long(), 8).view(4, 2).sum(dim=1) for ids_TK in whole.expert_ids_LTK]
    load = rank_load(padded, 4, 200, shuffle=False)  # all 800 real tokens
    assert (load.windows, load.rows_mean) == (1, 800 * 2 / 4)
    assert load.straggler == pytest.approx(sum(float(layer.max() / layer.double().mean()) for layer in rows) / 2)


def uniform_trace(tokens, experts, top_k, layers, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = [torch.randn(tokens, experts, generator=draw) for _ in range(layers)]
    return RoutingTrace.from_router_logits(logits, RouterConfig(), top_k)


def test_random_routing_lies_in_its_own_band():
    inside, means = 0, []
    for seed in range(20):
        load = rank_load(uniform_trace(1024, 32, 4, 3, seed), 8, 64)
        inside += load.chance_low <= load.straggler <= load.chance_high
        means.append(load.straggler)
    assert inside >= 16  # of 20 at 95 %: fewer has a probability of 0.3 %
    assert abs(sum(means) / 20 - load.chance_mean) < 0.01


def test_chance_at_the_edges():
    assert chance_straggler(64, 4, block_placement(4, 2), 2) == (1.0, 1.0, 1.0)
    few, many = (chance_straggler(tokens, 2, block_placement(16, 4), 4)[0] for tokens in (64, 65_536))
    assert 1 < many < 1.02 < few


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 10), "num_experts=16 cannot be spread over ep=3"),
        ((4, 0), "tokens_per_rank=0"),
        ((4, 10_000), "need 40,000 valid tokens, not 500"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        rank_load(synthetic_trace(tokens=500, bias=False), *arguments)
    with pytest.raises(ValueError, match="must name a rank from 0 to 1 for 16 experts"):
        rank_load(synthetic_trace(tokens=500, bias=False), 2, 10, placement=[0, 2] * 8)
