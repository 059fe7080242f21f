import dataclasses

import pytest
import sharding_jobs as jobs
import torch

from moe_lab import MoEConfig, RouterConfig
from moe_lab.parallel import RankPool
from moe_lab.parallel.ranks import RankError
from moe_lab.parallel.sharding import check_layout, expert_dim
from tests.test_lm import TINY


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, backend="gloo") as pool:
        yield pool


def config(num_experts, **moe):
    return dataclasses.replace(TINY, moe=TINY.moe.replace(num_experts=num_experts, **moe))


def relative(got, expected):
    assert got.keys() == expected.keys()
    return max(float((got[name] - grad).norm() / grad.norm()) for name, grad in expected.items())


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_first_gradients_equal_one_process(pool, ep, checkpointing):
    """FSDP 4, dp 2 x ep 2 and EP 4, each parameter on its own; counts and bias to the bit."""
    loss, grads, counts, bias = jobs.one_process(TINY)
    got = pool.run(jobs.sharded, TINY, ep, checkpointing=checkpointing)[0]
    assert got[0] == pytest.approx(loss, rel=1e-6)
    assert relative(got[1], grads) < 1e-5
    assert torch.equal(got[2], counts)
    assert torch.equal(got[3], bias)
    routed = got[4]
    assert len(routed) == TINY.num_layers * (1 + checkpointing)
    if checkpointing:  # backward runs the last block first
        for first, again in zip(routed[:2], reversed(routed[2:]), strict=True):
            assert torch.equal(first, again)


def test_two_ranks_with_half_of_the_experts_each():
    _, grads, counts, bias = jobs.one_process(TINY)
    with RankPool(2, backend="gloo") as pool:
        got = pool.run(jobs.sharded, TINY, 2)[0]
    assert relative(got[1], grads) < 1e-5
    assert torch.equal(got[2], counts)
    assert torch.equal(got[3], bias)


def test_float64_gradients_differ_by_rounding_alone(pool):
    _, grads, *_ = jobs.one_process(TINY, dtype=torch.float64)
    assert relative(pool.run(jobs.sharded, TINY, 2, dtype=torch.float64)[0][1], grads) < 1e-12


@pytest.mark.parametrize(("ep", "sp"), [(1, 4), (2, 2), (1, 2)])
@pytest.mark.parametrize("length", [32, 31, 9, 5])
def test_sequences_cut_over_ranks_are_whole(pool, ep, sp, length):
    """Uneven lengths; five positions over four ranks leave the last with none. Padding counts nowhere."""
    loss, grads, counts, bias = jobs.one_process(TINY, dtype=torch.float64, length=length)
    got = pool.run(jobs.sharded, TINY, ep, sp=sp, dtype=torch.float64, length=length)[0]
    assert got[0] == pytest.approx(loss, rel=1e-12)
    assert relative(got[1], grads) < 1e-12
    assert torch.equal(got[2], counts)
    assert torch.equal(got[3], bias)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_first_gradients_of_cut_sequences_equal_one_process(pool, checkpointing):
    """In float32, with micro-batches and recompute: as close as other layouts are."""
    loss, grads, counts, bias = jobs.one_process(TINY, micro=2, length=31)
    got = pool.run(jobs.sharded, TINY, 2, sp=2, micro=2, checkpointing=checkpointing, length=31)[0]
    assert got[0] == pytest.approx(loss, rel=1e-6)
    assert relative(got[1], grads) < 1e-5
    assert torch.equal(got[2], counts)
    assert torch.equal(got[3], bias)


def test_a_mesh_without_sequences_is_one_too(pool):
    _, grads, *_ = jobs.one_process(TINY)
    assert relative(pool.run(jobs.without_sequences, TINY, 2)[0], grads) < 1e-5


def test_micro_batches_move_the_bias_once(pool):
    _, grads, counts, bias = jobs.one_process(TINY, micro=2)
    got = pool.run(jobs.sharded, TINY, 2, micro=2)[0]
    assert counts.sum() == TINY.num_layers * 8 * 32 * TINY.moe.top_k
    assert torch.equal(got[2], counts)
    assert torch.equal(got[3], bias)
    assert relative(got[1], grads) < 1e-5


@pytest.mark.parametrize("ep", [1, 2])
def test_bfloat16_is_no_further_from_float32_than_in_one_process(pool, ep):
    """Forced routing: near ties fall otherwise in another precision, and are no rounding error."""
    router = dataclasses.replace(TINY.moe.router, force_load_balance="round_robin")
    forced = config(4, router=router)
    _, exact, *_ = jobs.one_process(forced)
    _, low, *_ = jobs.one_process(forced, autocast=torch.bfloat16)
    got = pool.run(jobs.sharded, forced, ep, rounded=torch.bfloat16)[0][1]
    for name, grad in exact.items():
        assert (got[name] - grad).norm() <= 2 * (low[name] - grad).norm(), name
    summed = got["blocks.0.attention.qkv.weight"]
    assert not torch.equal(summed, summed.bfloat16().float())  # over ranks in float32


@pytest.mark.parametrize(("ep", "sp"), [(2, 1), (2, 2)])
def test_models_on_one_mesh_share_its_groups(pool, ep, sp):
    """Else ranks that stay warm gather groups, each with threads of its own."""
    for first, *later in pool.run(jobs.groups_after_each, TINY, ep, sp):
        assert later == [first, first]


def test_gates_and_tables_of_positions_are_not_rounded(pool):
    exact, rounded = torch.float32, torch.bfloat16
    assert pool.run(jobs.weights_in_use, TINY, 2, rounded) == [[exact, rounded, rounded, exact]] * 4


def test_hidden_states_are_rounded_where_they_come_in(pool):
    assert pool.run(jobs.hidden_in_float32, TINY, torch.bfloat16) == [torch.bfloat16] * 4


def test_replicated_nowhere_and_uneven_rows_are_whole(pool):
    """More ranks than experts, and a dimension that does not divide: some ranks hold nothing, the sum is the same."""
    few = config(2, hidden_dim=6)
    _, grads, *_ = jobs.one_process(few)
    assert relative(pool.run(jobs.sharded, few, 1)[0][1], grads) < 1e-5


@pytest.mark.slow
def test_placements_on_eight_ranks():
    with RankPool(8, backend="gloo") as pool:
        four = {ep: pool.run(jobs.placements, config(4), ep)[0] for ep in (1, 4)}
        eight = {ep: pool.run(jobs.placements, config(8), ep)[0] for ep in (1, 2, 8)}
        cut = pool.run(jobs.placements, config(4), 2, sp=2)[0]
    # E 4 on 8 ranks: along F = 8 and D = 16, each over 8 ranks.
    assert four[1]["w1_EFD"] == ("(Shard(dim=1),)", (8,), (4, 1, 16))
    assert four[1]["w2_EDF"] == ("(Shard(dim=1),)", (8,), (4, 2, 8))
    assert four[4]["w1_EFD"] == ("(Shard(dim=1), Shard(dim=0))", (2, 4), (1, 4, 16))
    assert four[4]["w2_EDF"] == ("(Shard(dim=1), Shard(dim=0))", (2, 4), (1, 8, 8))
    # E 8: along experts, one a rank.
    assert eight[1]["w1_EFD"] == ("(Shard(dim=0),)", (8,), (1, 8, 16))
    assert eight[2]["w1_EFD"] == ("(_StridedShard(dim=0, sf=2), Shard(dim=0))", (4, 2), (1, 8, 16))
    assert eight[8]["w1_EFD"][2] == (1, 8, 16)
    # Over sp as over dp: two experts a rank of ep, F and D over the four ranks that hold them.
    assert cut["w1_EFD"] == ("(Shard(dim=1), Shard(dim=0))", (4, 2), (2, 2, 16))
    assert cut["w2_EDF"] == ("(Shard(dim=1), Shard(dim=0))", (4, 2), (2, 4, 8))
    for found in (*four.values(), *eight.values(), cut):
        assert found["qkv"] == ("(Shard(dim=0),)", (8,), (6, 16))
        assert found["gate"][:2] == ("(Shard(dim=0),)", (8,))


@pytest.mark.parametrize(
    ("num_experts", "dp", "ep", "dims"),
    [(8, 8, 1, (0, 0)), (4, 8, 1, (1, 1)), (4, 2, 4, (1, 1)), (8, 4, 2, (0, 0)), (8, 4, 4, (1, 1)), (4, 16, 1, (0, 1))],
)
def test_more_ranks_than_experts_cut_the_next_dimension_where_it_divides(num_experts, dp, ep, dims):
    moe = MoEConfig(dim=16, hidden_dim=8, num_experts=num_experts, top_k=2)
    assert tuple(expert_dim(moe, name, dp, ep) for name in ("w1_EFD", "w2_EDF")) == dims


@pytest.mark.parametrize(
    ("moe", "dp", "ep", "message"),
    [
        ({"num_experts": 36}, 1, 8, "num_experts=36 must divide over ep=8"),
        (
            {"num_experts": 12},
            2,
            4,
            "num_experts=12 on 8 ranks with ep=4: the 3 experts of a rank must divide over the 2",
        ),
        ({"num_experts": 4, "hidden_dim": 9}, 2, 4, "hidden_dim=9 must"),
    ],
)
def test_what_does_not_divide_is_named(moe, dp, ep, message):
    with pytest.raises(ValueError, match=message):
        check_layout(MoEConfig(**{"dim": 16, "hidden_dim": 8, "top_k": 2} | moe), dp, ep)


def test_bad_meshes_and_differing_settings_are_one_error_everywhere(pool):
    with pytest.raises(RankError, match="ep=3 must divide the 4 ranks"):
        pool.run(jobs.sharded, TINY, 3)
    with pytest.raises(RankError, match="sp=4 must divide the 2 ranks beside ep=2"):
        pool.run(jobs.sharded, TINY, 2, sp=4)
    with pytest.raises(RankError, match=r"dimensions \('dp', 'tp'\): must have \('dp', 'ep'\) or"):
        pool.run(jobs.misnamed, TINY)
    with pytest.raises(RankError, match="checkpointing differs across the mesh: False on ranks"):
        pool.run(jobs.differing, TINY)


def test_the_norm_is_that_of_the_whole_and_cuts_the_same(pool):
    _, grads, *_ = jobs.one_process(TINY)
    norm = torch.nn.utils.get_total_norm(grads.values())
    got, clipped = pool.run(jobs.clipped, TINY, 2, float(norm) / 2)[0]
    assert got == pytest.approx(float(norm), rel=1e-5)
    assert relative(clipped, {name: grad / 2 for name, grad in grads.items()}) < 2e-5


def test_sums_in_order_begin_with_the_first_rank(pool):
    """((1e8 + 1) - 1e8) + 2 is 2 in float32; other orders give 3, 0 or 1."""
    assert pool.run(jobs.summed_in_order) == [(2.0, 2.0, 2.0)] * 4


def test_a_layer_alone_may_be_sharded(pool):
    out, expected = pool.run(jobs.layer_alone, TINY.moe, 2)[0]
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ep", [1, 2])
def test_training_and_evaluating_in_turn_never_meets_stale_copies_of_weights(pool, ep):
    """`batched` keeps no copies under FSDP, and says why: every forward equals a fresh layer of the same weights."""
    router = RouterConfig(force_load_balance="round_robin")
    layer = MoEConfig(dim=16, hidden_dim=8, num_experts=4, top_k=2, router=router)
    reason = "not kept: under FSDP, which refills weights without a new version"
    for pairs, kept, batched, num_bytes in pool.run(jobs.alternated, layer, ep):
        assert batched == len(pairs) == 6
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for before, after in zip(pairs[::2], pairs[2::2]):
            assert not torch.allclose(before[1], after[1], rtol=1e-2)  # so that old weights would be seen
        assert kept == {f"cached_{name}_miss": {reason: 6} for name in ("w13", "w2_t")}
        assert num_bytes == 0
