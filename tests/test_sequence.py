import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab import MoE
from moe_lab.parallel import VirtualRanks
from moe_lab.parallel.sequence import SequenceShard, gather_all, join


@settings(max_examples=40)
@given(st.integers(0, 3), st.integers(0, 9), st.integers(1, 5))
def test_every_token_is_in_one_shard_and_shards_are_alike(batch, length, size):
    shards = [SequenceShard(batch, length, size, rank) for rank in range(size)]
    x_BLD = torch.arange(1.0, batch * length + 1).view(batch, length, 1)
    indices = [index for shard in shards for index in shard.index_T.tolist() if index >= 0]
    assert sorted(indices) == list(range(batch * length))
    assert len({shard.local_length for shard in shards}) == 1
    cut = [shard.cut(x_BLD) for shard in shards]
    assert torch.equal(join(cut, length), x_BLD)
    for shard, part in zip(shards, cut):
        flat = x_BLD.flatten().tolist()
        assert part.flatten().tolist() == [flat[i] if i >= 0 else 0.0 for i in shard.index_T.tolist()]
        assert torch.equal(shard.padded(shard.real(part)), part)


def test_known_indices_know_the_batch():
    # Two sequences of five over two ranks: three positions each, the last of rank 1 is padding.
    assert SequenceShard(2, 5, 2, 0).index_T.tolist() == [0, 1, 2, 5, 6, 7]
    assert SequenceShard(2, 5, 2, 1).index_T.tolist() == [3, 4, -1, 8, 9, -1]


@pytest.mark.parametrize("length", [8, 7, 5, 3])
def test_uneven_sequences_equal_the_whole_layer_and_padding_counts_nowhere(layer_config, length):
    moe = MoE(layer_config(num_shared_experts=1, load_balance_coeff=0.1)).double()
    x_BLD = torch.randn(3, length, 16, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(3, length, 16, dtype=torch.float64)
    expected = moe(x_BLD)
    counts_E = moe.tokens_per_expert_E.clone()
    moe.tokens_per_expert_E.zero_()
    shards = [SequenceShard(3, length, 4, rank) for rank in range(4)]
    outs = VirtualRanks(moe, 4)([shard.real(shard.cut(x_BLD)) for shard in shards])
    out = join([shard.padded(rows) for shard, rows in zip(shards, outs)], length)
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(moe.tokens_per_expert_E, counts_E)
    leaves = (x_BLD, *moe.parameters())
    for got, exact in zip(*(torch.autograd.grad((o * probe).sum(), leaves) for o in (out, expected))):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


def test_run_pads_again(layer_config):
    moe, shard = MoE(layer_config()), SequenceShard(2, 5, 2, 1)
    x_BlD = shard.cut(torch.randn(2, 5, 16))
    out = shard.run(moe, x_BlD)
    assert torch.equal(out[:, :2].reshape(4, 16), moe(x_BlD[:, :2].reshape(4, 16)))
    assert not out[:, 2].any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((1, 4, 2, 2), "rank=2 must be an integer from 0 to 1"), ((1, 4, 0, 0), "size=0 must be an integer >= 1")],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        SequenceShard(*sizes)


def test_another_length_is_refused():
    with pytest.raises(ValueError, match=r"x is \(2, 4, 16\): must be \(2, 5, D\)"):
        SequenceShard(2, 5, 2, 0).cut(torch.zeros(2, 4, 16))


@pytest.mark.parametrize(("length", "size"), [(8, 2), (7, 2), (5, 4)])
def test_the_mean_of_ranks_losses_is_that_over_all_tokens(length, size):
    """Five positions over four ranks: two, two, one and none."""
    logits_BLV, targets_BL = torch.randn(3, length, 11), torch.randint(11, (3, length))
    shards = [SequenceShard(3, length, size, rank) for rank in range(size)]
    losses = [shard.cross_entropy(shard.cut(logits_BLV), targets_BL) for shard in shards]
    expected = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
    torch.testing.assert_close(torch.stack(losses).mean(), expected)
    assert [bool(loss > 0) for loss in losses] == [bool(shard.valid_T.any()) for shard in shards]


def test_one_shard_has_the_bits_of_the_mean():
    logits_BLV, targets_BL = torch.randn(3, 7, 11, requires_grad=True), torch.randint(11, (3, 7))
    loss = SequenceShard(3, 7, 1, 0).cross_entropy(logits_BLV, targets_BL)
    mean = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
    assert torch.equal(loss, mean)
    assert torch.equal(*(torch.autograd.grad(one, logits_BLV)[0] for one in (loss, mean)))


def test_gradients_of_what_all_see_are_added_in_order():
    """Of three positions over four ranks. ((1e8 + 1) - 1e8) + 2 is 2 in float32; other orders give 3, 0 or 1."""
    shards = [torch.full((1, 1), float(rank), requires_grad=True) for rank in range(4)]
    whole = gather_all(shards, 3)
    assert [x_LD.flatten().tolist() for x_LD in whole] == [[0, 1, 2]] * 4
    sum(x_LD.sum() * scale for x_LD, scale in zip(whole, (1e8, 1.0, -1e8, 2.0))).backward()
    assert [x_lD.grad.item() for x_lD in shards] == [2, 2, 2, 0]
