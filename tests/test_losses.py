"""Balancing losses: 1 in balance, by hand, and as transformers computes its own."""

import pytest
import torch

from moe_lab import RouterConfig
from moe_lab.layer.losses import switch_loss, transformers_loss, z_loss
from moe_lab.layer.router import route


def test_uniform_probabilities_give_one_whatever_was_chosen():
    scores_TE = torch.full((6, 4), 0.25)
    for ids_TK in (torch.zeros(6, 2, dtype=torch.int64), torch.rand(6, 4).topk(2).indices):
        assert switch_loss(scores_TE, ids_TK).item() == pytest.approx(1)
        assert switch_loss(2.0 * scores_TE, ids_TK).item() == pytest.approx(1)  # sigmoid scores need not sum to 1


def test_switch_loss_by_hand():
    scores_TE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], requires_grad=True)
    ids_TK = torch.tensor([[0, 1], [0, -1]])
    f, p = [2 / 3, 1 / 3, 0.0], [0.6, 0.25, 0.15]
    loss = switch_loss(scores_TE, ids_TK)
    assert loss.item() == pytest.approx(3 * sum(a * b for a, b in zip(f, p)))
    loss.backward()
    # d loss / d s_te: f is detached and P a mean; each row of scores sums to 1, so that its mean is taken off.
    mean = [sum(a * b for a, b in zip(f, row)) for row in scores_TE.tolist()]
    expected = [[3 / 2 * (a - m) for a in f] for m in mean]
    torch.testing.assert_close(scores_TE.grad, torch.tensor(expected))


def test_sequences_are_averaged_and_padding_counts_nowhere():
    routing = route(torch.randn(10, 4), RouterConfig(), 2)
    sequence_T = torch.tensor([0] * 4 + [1] * 6)
    valid_T = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    parts = [(sequence_T == b) & valid_T for b in (0, 1)]
    each = [switch_loss(routing.scores_TE[k], routing.expert_ids_TK[k]) for k in parts]
    got = switch_loss(routing.scores_TE, routing.expert_ids_TK, valid_T=valid_T, sequence_T=sequence_T)
    assert got.item() == pytest.approx(sum(each).item() / 2)
    whole = switch_loss(routing.scores_TE, routing.expert_ids_TK, valid_T=valid_T)
    assert whole.item() == pytest.approx(switch_loss(routing.scores_TE[valid_T], routing.expert_ids_TK[valid_T]).item())


def test_counts_of_the_global_batch_replace_ones_own():
    routings = [route(torch.randn(8, 4), RouterConfig(), 2) for _ in range(3)]
    counts_E = sum(r.counts_E for r in routings)
    local = torch.stack([switch_loss(r.scores_TE, r.expert_ids_TK, counts_E=counts_E) for r in routings]).mean()
    together = switch_loss(torch.cat([r.scores_TE for r in routings]), torch.cat([r.expert_ids_TK for r in routings]))
    assert local.item() == pytest.approx(together.item(), rel=1e-6)


def test_a_loss_of_no_tokens_is_refused():
    routing, none_T = route(torch.randn(3, 4), RouterConfig(), 2), torch.zeros(3, dtype=torch.bool)
    for loss in (
        lambda: switch_loss(routing.scores_TE, routing.expert_ids_TK, valid_T=none_T),
        lambda: transformers_loss([routing.logits_TE], 2, valid_T=none_T),
        lambda: z_loss(routing.logits_TE, valid_T=none_T),
    ):
        with pytest.raises(ValueError, match="no token is valid"):
            loss()
    with pytest.raises(ValueError, match="give one"):
        switch_loss(
            routing.scores_TE, routing.expert_ids_TK, sequence_T=torch.zeros(3, dtype=torch.int64),
            counts_E=routing.counts_E,
        )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_transformers_is_theirs(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = [torch.randn(12, 8) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]) if masked else None
    theirs = mixtral.load_balancing_loss_func(tuple(logits), 8, 2, mask)
    ours = transformers_loss(logits, 2, valid_T=None if mask is None else mask.bool().flatten())
    torch.testing.assert_close(ours, theirs)
    assert transformers_loss([torch.zeros(5, 8)], 2).item() == pytest.approx(2)  # K in balance


def test_z_loss_by_hand():
    logits_TE = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    log2 = 0.6931471805599453
    assert z_loss(logits_TE).item() == pytest.approx((log2**2 + (3 + log2) ** 2) / 2)
    assert z_loss(logits_TE, valid_T=torch.tensor([True, False])).item() == pytest.approx(log2**2)
