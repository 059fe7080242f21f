"""Load metrics by hand, what chance alone gives, and intervals over documents."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lab.study import metrics
from moe_lab.study.metrics import document_bootstrap, load_imbalance, measure, null_band


def test_by_hand():
    load = load_imbalance(torch.tensor([4, 0, 2, 2]))
    assert load.max_over_mean == 2
    assert load.cv == pytest.approx(math.sqrt(2) / 2)  # deviations 2, -2, 0, 0 of a mean of 2
    assert load.gini == pytest.approx((-3 * 0 - 1 * 2 + 1 * 2 + 3 * 4) / (4 * 8))
    assert load.entropy == pytest.approx(0.75)  # shares 1/2, 1/4, 1/4: 1.5 of 2 bits
    assert load.dead_experts == 1
    assert repr(load) == "max/mean 2.00  cv 0.707  gini 0.375  entropy 0.750  dead 1"


def test_the_two_ends():
    balanced = load_imbalance([7] * 5)
    assert balanced[:4] == pytest.approx((1, 0, 0, 1), abs=1e-15)
    collapsed = load_imbalance([0, 0, 0, 12])
    assert collapsed == pytest.approx((4, math.sqrt(3), 0.75, 0, 3), abs=1e-15)
    assert load_imbalance([3]) == (1, 0, 0, 1, 0)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40).filter(any), st.integers(1, 1000), st.randoms())
def test_order_and_scale_do_not_matter(counts, factor, random):
    load = load_imbalance(counts)
    assert 1 <= load.max_over_mean <= len(counts)
    assert 0 <= load.gini <= 1 - 1 / len(counts) + 1e-12
    assert -1e-12 <= load.entropy <= 1 + 1e-12
    changed = [count * factor for count in counts]
    random.shuffle(changed)
    assert load_imbalance(changed) == pytest.approx(load, abs=1e-9)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), "8 experts sum to 0: no tokens"),
        (torch.tensor([1, -1, 3]), "holds -1"),
        (torch.tensor([0.5, 0.5]), "must be a vector of integers"),
        (torch.tensor([[1, 2]]), "must be a vector of integers"),
        (np.array([True, False]), "must be a vector of integers"),
        ([], "must be a vector of integers"),
    ],
)
def test_what_is_no_load_is_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        load_imbalance(counts)


# chance


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "mean", "error"),
    [(4096, 8, 256, 1.25, 0.01), (256, 4, 32, 1.36, 0.01), (128, 8, 256, 2.6, 0.05)],
)
def test_known_bands(tokens, top_k, experts, mean, error):
    band = null_band(tokens, top_k, experts)
    assert band.mean.max_over_mean == pytest.approx(mean, abs=error)
    assert band.low.max_over_mean < mean < band.high.max_over_mean


def random_counts(draws, tokens, top_k, experts, seed):
    """Counts of random routing by the obvious way: the K largest of E random numbers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(draws, tokens, experts, generator=generator).topk(top_k).indices
    return np.stack([torch.bincount(i.flatten(), minlength=experts).numpy() for i in ids])


SETTINGS = [(6, 2, 8), (20, 7, 8), (64, 4, 32), (300, 8, 64)]


@pytest.mark.parametrize(("tokens", "top_k", "experts"), SETTINGS)
def test_band_holds_what_random_routing_does(tokens, top_k, experts):
    band = null_band(tokens, top_k, experts)
    values = measure(random_counts(400, tokens, top_k, experts, seed=1))
    inside = ((values >= np.array(band.low) - 1e-9) & (values <= np.array(band.high) + 1e-9)).mean(axis=0)
    assert (inside >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)).all()
    error = values.std(axis=0) * math.sqrt(1 / 400 + 1 / 128)
    assert (np.abs(values.mean(axis=0) - np.array(band.mean)) <= 4 * error + 1e-9).all()


def test_random_routing_takes_every_choice_equally_often():
    for top_k in (2, 3):  # 3 of 5 are drawn by the 2 left out
        counts_NE = metrics.draw_routing(np.random.default_rng(0), 20_000, 1, top_k, 5)
        chosen, times = np.unique(counts_NE, axis=0, return_counts=True)
        assert {tuple(row) for row in chosen} == {
            tuple(int(i in pair) for i in range(5)) for pair in itertools.combinations(range(5), top_k)
        }
        assert (np.abs(times - 2000) < 5 * math.sqrt(2000 * 0.9)).all()


def test_drawn_counts_have_the_exact_margins_and_covariance():
    tokens, top_k, experts, draws = 200, 3, 8, 20_000
    p = top_k / experts
    counts_NE = metrics.draw_counts(np.random.default_rng(0), draws, tokens, top_k, experts)
    assert (np.diff(counts_NE) >= 0).all()  # ascending, so shuffle before looking at single experts
    counts_NE = np.random.default_rng(1).permuted(counts_NE, axis=1).astype(float)
    variance = tokens * p * (1 - p)
    assert counts_NE.mean() == pytest.approx(tokens * p, abs=4 * math.sqrt(variance / (draws * experts)))
    covariance = np.cov(counts_NE.T)
    off = covariance[~np.eye(experts, dtype=bool)]
    assert np.diag(covariance) == pytest.approx(variance, rel=6 * math.sqrt(2 / draws))
    assert off == pytest.approx(-variance / (experts - 1), abs=6 * variance / math.sqrt(draws))
    assert counts_NE.sum(axis=1).std() < 1.1 * math.sqrt(experts / 12)  # the sum is fixed but for rounding


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(128, 8, 256), (256, 4, 32), (512, 2, 8), (64, 48, 64), (256, 4, 512)]
)
def test_the_two_ways_of_drawing_agree_where_one_takes_over(tokens, top_k, experts):
    assert tokens * min(top_k, experts - top_k) == metrics._EXACT_PICKS
    draws = 2000
    counts = [
        draw(np.random.default_rng(2), draws, tokens, top_k, experts)
        for draw in (metrics.draw_routing, metrics.draw_counts)
    ]
    exact, fast = (np.column_stack([counts_NE.max(axis=1), measure(counts_NE)[:, 1:]]).round(9) for counts_NE in counts)
    error = np.sqrt((exact.var(axis=0) + fast.var(axis=0)) / draws)
    assert (np.abs(exact.mean(axis=0) - fast.mean(axis=0)) <= 4 * error).all()
    # quantiles: as many of the one below the other's quantile as there should be, but for both errors
    for q in (0.025, 0.975):
        below = (fast <= np.quantile(exact, q, axis=0)).mean(axis=0)
        strictly = (fast < np.quantile(exact, q, axis=0)).mean(axis=0)
        slack = 4 * math.sqrt(2 * q * (1 - q) / draws)
        assert (below >= q - slack).all()
        assert (strictly <= q + slack).all()


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 4), (50, 2, 8), (300, 8, 64), (40, 7, 8)])
def test_share_band_is_the_binomial_one(tokens, top_k, experts):
    p = top_k / experts
    pmf = [math.comb(tokens, k) * p**k * (1 - p) ** (tokens - k) for k in range(tokens + 1)]
    cdf = np.cumsum(pmf)
    band = null_band(tokens, top_k, experts)
    assert round(band.share_low * tokens * top_k) == int(np.argmax(cdf >= 0.025))
    assert round(band.share_high * tokens * top_k) == int(np.argmax(cdf >= 0.975))


def test_every_expert_for_every_token_is_balance():
    for experts in (1, 4):
        band = null_band(10, experts, experts)
        assert band.mean == band.low == band.high == pytest.approx((1, 0, 0, 1, 0))
        assert band.share_low == band.share_high == 1 / experts


def test_one_token_is_known_exactly():
    band = null_band(1, 2, 8)
    assert band.low == band.high == pytest.approx((4, math.sqrt(3), 0.75, math.log(2) / math.log(8), 6))


@pytest.mark.parametrize("windows", [4, 100])
def test_means_over_windows_spread_less(windows):
    one, many = null_band(256, 4, 32), null_band(256, 4, 32, windows=windows)
    values = measure(random_counts(3200, 256, 4, 32, seed=3))
    means = values[: len(values) // windows * windows].reshape(-1, windows, 5).mean(axis=1)
    assert many.mean.max_over_mean == pytest.approx(one.mean.max_over_mean, abs=0.02)
    spread = (np.array(many.high) - np.array(many.low)) / (2 * 1.96)
    assert spread[:4] == pytest.approx(means.std(axis=0)[:4], rel=0.3)
    assert many.share_low > one.share_low


def test_a_wider_quantile_is_a_wider_band():
    narrow, wide = null_band(128, 8, 256, quantile=0.5), null_band(128, 8, 256, quantile=0.99)
    assert wide.low.cv < narrow.low.cv < narrow.high.cv < wide.high.cv
    assert wide.share_low < narrow.share_low < narrow.share_high < wide.share_high


def test_the_same_setting_gives_the_same_band():
    first = null_band(300, 3, 16)
    assert null_band(300, 3, 16) is first
    null_band.cache_clear()
    assert null_band(300, 3, 16) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 4), "num_tokens=0"),
        ((5, 5, 4), "top_k=5"),
        ((5, 0, 4), "top_k=0"),
        ((5, 1, 2**15), "num_experts=32768"),
    ],
)
def test_settings_that_cannot_route_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        null_band(*arguments)
    for quantile in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="quantile="):
            null_band(5, 1, 4, quantile=quantile)
    with pytest.raises(ValueError, match="windows=0"):
        null_band(5, 1, 4, windows=0)


# documents


def test_documents_that_are_alike_leave_no_doubt():
    counts_GE = torch.tensor([[3, 1, 0, 4]]).repeat(9, 1)
    interval = document_bootstrap(counts_GE)
    assert interval.low == pytest.approx(load_imbalance([3, 1, 0, 4]))
    assert interval.high == pytest.approx(load_imbalance([3, 1, 0, 4]))


def test_two_documents_by_hand():
    # drawn with replacement: one twice, the other twice, or (half of the time) both
    interval = document_bootstrap(np.array([[10, 0], [0, 10], [0, 0]]))
    assert interval.low.max_over_mean == 1
    assert interval.high.max_over_mean == 2
    narrow = document_bootstrap(np.array([[10, 0], [0, 10]]), quantile=0.02)
    assert narrow.low.dead_experts in (0, 1)


def test_interval_is_as_wide_as_other_documents_would_make_it():
    rng = np.random.default_rng(4)

    def documents():
        shares_GE = rng.dirichlet(np.full(16, 2.0), size=60)
        return np.stack([rng.multinomial(500, shares) for shares in shares_GE])

    fresh = measure(np.stack([documents().sum(axis=0) for _ in range(400)]))
    interval = document_bootstrap(documents())
    width = interval.high.max_over_mean - interval.low.max_over_mean
    assert width == pytest.approx(np.subtract(*np.quantile(fresh[:, 0], [0.975, 0.025])), rel=0.35)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 2]], "holds 1 documents with tokens"),
        ([[1, 2], [0, 0]], "holds 1 documents with tokens"),
        ([1, 2], "must be counts"),
        ([[1, -2], [1, 1]], "must be counts"),
        ([[0.5, 1.0], [1.0, 1.0]], "must be counts"),
    ],
)
def test_bootstrap_refuses_what_has_no_interval(counts, message):
    with pytest.raises(ValueError, match=message):
        document_bootstrap(np.array(counts))
