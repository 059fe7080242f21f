"""Naming the domain of a window, and what the byte alone explains, where the answer is known."""

import numpy as np
import pytest
import torch

from moe_lab.study.domains import (
    Histograms,
    byte_explains,
    byte_histograms,
    classify,
    domain_histograms,
    nearest_centroid,
)
from moe_lab.study.trace import Document, RoutingTrace, TraceInfo
from test_trace import OWN

LENGTH = 40


def trace_of(ids_LTK, domains):
    """Documents of 40 tokens, one for each of `domains`, routed as told (8 experts)."""
    ids_LTK = torch.as_tensor(ids_LTK)
    layers, tokens, top_k = ids_LTK.shape
    documents = tuple(Document(f"d{i}", domain, "", 0, LENGTH) for i, domain in enumerate(domains))
    return RoutingTrace(
        info=TraceInfo("made up", "", "", {}, OWN, 8, top_k, tuple(range(layers)), documents),
        expert_ids_LTK=ids_LTK.to(torch.int16),
        gates_LTK=None,
        logits_LTE=None,
        expert_bias_LE=None,
        document_T=(torch.arange(tokens) // LENGTH).int(),
        position_T=(torch.arange(tokens) % LENGTH).int(),
        valid_T=torch.ones(tokens, dtype=torch.bool),
    )


def random_ids(*shape, low=0, high=8, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(tokens, seed=1):
    return torch.randint(0, 100, (tokens,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_windows_stay_within_documents_and_leave_rests_out():
    trace = trace_of(random_ids(2, 120, 2), ["a", "b", "a"])
    trace.valid_T[45] = False
    histograms = domain_histograms(trace, 16)
    assert histograms.document_W.tolist() == [0, 0, 1, 2, 2]  # 40 = 16 + 16 + 8, and one with a token not valid
    assert histograms.domain_W.tolist() == [0, 0, 1, 0, 0]
    assert histograms.shares_WF.shape == (5, 16)
    ids_TK = trace.expert_ids_LTK[1, 56:72].long()
    assert torch.equal(histograms.shares_WF[2, 8:], torch.bincount(ids_TK.flatten(), minlength=8) / 32.0)


def test_windows_of_bytes_are_the_same_windows():
    trace, byte_T = trace_of(random_ids(1, 80, 2), ["a", "b"]), random_bytes(80)
    histograms = byte_histograms(trace, byte_T, 16)
    assert histograms.document_W.tolist() == [0, 0, 1, 1]
    assert torch.equal(histograms.shares_WF[1], torch.bincount(byte_T[16:32].long(), minlength=256) / 16.0)


def test_nearest_centroid_by_hand():
    train_WF = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0]])
    test_VF = torch.tensor([[0.0, 1.0], [3.0, 0.0], [1.9, 1.0], [2.1, 0.0]])
    assert nearest_centroid(train_WF, torch.tensor([0, 0, 2]), test_VF, 3).tolist() == [0, 2, 0, 2]


def test_domains_with_experts_of_their_own_are_always_named():
    ids_LTK = torch.cat(
        [random_ids(1, LENGTH, 2, low=4 * (i % 2), high=4 + 4 * (i % 2), seed=i) for i in range(6)], dim=1
    )
    result = classify(domain_histograms(trace_of(ids_LTK, ["a", "b"] * 3), 20))
    assert result.accuracy == 1
    assert result.confusion_DD.tolist() == [[6, 0], [0, 6]]
    assert repr(result) == "100.0 % of 12 windows named rightly\n   a b\na  6 0\nb  0 6"


def test_domains_that_do_not_matter_are_named_by_chance():
    result = classify(domain_histograms(trace_of(random_ids(1, 200 * LENGTH, 2), ["a", "b"] * 100), 20))
    assert abs(result.accuracy - 0.5) < 5 * 0.5 / np.sqrt(400)


def test_a_window_is_not_named_by_its_own_document():
    # each document has one expert of its own, so only the document itself would name its domain
    ids_LTK = torch.arange(4).repeat_interleave(LENGTH).repeat(2, 1).T.reshape(1, -1, 2)
    histograms = domain_histograms(trace_of(ids_LTK, ["a", "a", "b", "b"]), 20)
    assert classify(histograms, train=histograms).accuracy == 1
    assert classify(histograms).accuracy < 1


def test_classify_by_other_windows():
    shares_WF = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, 0.6]], dtype=torch.float64)
    train = Histograms(shares_WF[:2], torch.tensor([0, 1]), torch.tensor([0, 1]), ("a", "b"))
    test = Histograms(shares_WF[2:], torch.tensor([0]), torch.tensor([0]), ("a", "b"))
    assert classify(test, train).confusion_DD.tolist() == [[0, 1], [0, 0]]


def test_classify_refuses_what_it_cannot_learn():
    histograms = domain_histograms(trace_of(random_ids(1, 120, 2), ["a", "a", "b"]), 20)
    with pytest.raises(ValueError, match="domain 'b' has windows of one document only"):
        classify(histograms)
    with pytest.raises(ValueError, match="train describes domains"):
        classify(histograms, histograms._replace(domains=("b", "a")))
    with pytest.raises(ValueError, match="window=41: no document"):
        domain_histograms(trace_of(random_ids(1, 80, 2), ["a", "b"]), 41)
    with pytest.raises(ValueError, match="every assignment of a window was dropped"):
        domain_histograms(trace_of(torch.full((1, 80, 2), -1), ["a", "b"]), 40)


def test_bytes_that_decide_explain_everything_and_others_nothing():
    tokens = 100 * LENGTH
    byte_T = random_bytes(tokens)
    expert_of_byte = random_ids(256, seed=2)
    decided = expert_of_byte[byte_T.long()]
    unrelated = random_ids(tokens, seed=3)
    constant = torch.zeros(tokens, dtype=torch.int64)
    coin = torch.rand(tokens, generator=torch.Generator().manual_seed(4)) < 0.5
    mixed = torch.where(coin, decided, unrelated)
    ids_LTK = torch.stack([decided, unrelated, constant, mixed])[..., None].expand(-1, -1, 2)
    explained_L = byte_explains(trace_of(ids_LTK, ["a"] * 100), byte_T)
    assert explained_L[0] == pytest.approx(1)
    assert abs(explained_L[1]) < 0.01
    assert explained_L[2] == 1
    # of 8 experts, the decided one has probability 1/2 + 1/16, the others 1/16 each
    entropy = -(9 / 16 * np.log(9 / 16) + 7 / 16 * np.log(1 / 16))
    assert explained_L[3] == pytest.approx(1 - entropy / np.log(8), abs=0.03)


def test_few_tokens_do_not_make_bytes_look_telling():
    trace = trace_of(random_ids(1, 5 * LENGTH, 2), ["a"] * 5)
    byte_T = random_bytes(200)
    assert abs(byte_explains(trace, byte_T)[0]) < 0.15  # uncorrected it would be above a half


def test_dropped_and_invalid_tokens_say_nothing():
    ids_LTK = random_ids(1, 80, 2)
    ids_LTK[0, :20, 0] = -1
    trace, byte_T = trace_of(ids_LTK, ["a", "b"]), random_bytes(80)
    trace.valid_T[60:] = False
    kept = byte_explains(trace.select(start=20, tokens=40), byte_T[20:60])
    assert torch.equal(byte_explains(trace, byte_T), kept)
    with pytest.raises(ValueError, match="no token with a first expert"):
        byte_explains(trace.select(tokens=20), byte_T[:20])


def test_bytes_must_match_the_tokens():
    trace = trace_of(random_ids(1, 80, 2), ["a", "b"])
    with pytest.raises(ValueError, match="one byte for each of 80 tokens"):
        byte_explains(trace, random_bytes(79))
    with pytest.raises(ValueError, match="one byte for each of 80 tokens"):
        byte_histograms(trace, random_bytes(81), 16)


def test_whitening_undoes_a_direction_in_which_all_windows_vary():
    # Labels differ by 1 along the first axis; noise of 3 along (1, 1) hides it from Euclid, not from Mahalanobis.
    generator = torch.Generator().manual_seed(0)
    label_W = torch.arange(400) % 2
    rows_WF = torch.randn(400, 2, generator=generator, dtype=torch.float64) * 0.1
    rows_WF[:, 0] += label_W
    mixed_WF = rows_WF + 3 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    train, test = slice(0, 300), slice(300, 400)
    plain, whitened = (
        (nearest_centroid(mixed_WF[train], label_W[train], mixed_WF[test], 2, whiten=w) == label_W[test])
        .double()
        .mean()
        for w in (False, True)
    )
    assert plain < 0.7 < whitened


def test_whitened_distance_is_mahalanobis_by_hand():
    train_WF = torch.tensor([[-2.0, 0], [2, 0], [-2, 3], [2, 3]], dtype=torch.float64)
    # Around the two means the covariance is diag(4, 0); shrunk: 0.9 * diag(4, 0) + 0.1 * 2 = diag(3.8, 0.2).
    # (2.9, 1.4): squared distances 2.9^2/3.8 + 1.4^2/0.2 to (0, 0) and 2.9^2/3.8 + 1.6^2/0.2 to (0, 3).
    test_VF = torch.tensor([[2.9, 1.4], [2.9, 1.6]], dtype=torch.float64)
    named = nearest_centroid(train_WF, torch.tensor([0, 0, 1, 1]), test_VF, 2, whiten=True)
    assert named.tolist() == [0, 1]


def test_how_far_the_covariance_is_shrunk_decides():
    train_WF = torch.tensor([[-2.0, 0], [2, 0], [6, 1], [10, 1]], dtype=torch.float64)
    # Shrunk covariance diag(3.8, 0.2) as above, means (0, 0) and (8, 1). From (4 + u, 0.5 - v) the second is nearer
    # if 16 u / 3.8 > 2 v / 0.2, that is 8 u / v > 19; half the shrinkage would make that 39, twice as much 9.
    test_VF = torch.tensor([[4 + 14 / 8, -0.5], [4 + 24 / 8, -0.5]], dtype=torch.float64)
    named = nearest_centroid(train_WF, torch.tensor([0, 0, 1, 1]), test_VF, 2, whiten=True)
    assert named.tolist() == [0, 1]


def test_whitening_by_the_windows_that_are_named_is_refused():
    histograms = Histograms(torch.eye(2, dtype=torch.float64), torch.tensor([0, 1]), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(ValueError, match="whiten=True needs train"):
        classify(histograms, whiten=True)
