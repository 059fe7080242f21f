"""Load by layer and domain beside chance, and its text."""

import dataclasses

import numpy as np
import pytest
import torch

from moe_lab.study.load import ALL_DOMAINS, imbalance
from moe_lab.study.metrics import load_imbalance, null_band
from moe_lab.study.trace import Document, RoutingTrace, TraceInfo
from test_trace import DOCUMENTS, OWN, make_trace


def long_trace(domains=("python", "prose"), tokens=600, skew=0.0):
    """Documents of 100 tokens, domains taking turns; prose prefers expert 0 by `skew`. Layers 0 and 1, top 2 of 16."""
    count = tokens // 100
    documents = tuple(Document(f"d{i}", domains[i % len(domains)], "", 0, 100) for i in range(count))
    document_T = torch.arange(tokens) // 100
    logits_LTE = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(0))
    logits_LTE[:, document_T % len(domains) == 1, 0] += skew
    return RoutingTrace(
        info=TraceInfo("made up", "", "", {}, OWN, 16, 2, (0, 1), documents),
        expert_ids_LTK=logits_LTE.topk(2).indices.to(torch.uint8),
        gates_LTK=None,
        logits_LTE=None,
        expert_bias_LE=None,
        document_T=document_T.int(),
        position_T=(torch.arange(tokens) % 100).int(),
        valid_T=torch.ones(tokens, dtype=torch.bool),
    )


def test_without_a_window_it_is_the_counts_of_each_domain():
    trace = make_trace()
    result = imbalance(trace)
    assert result.domains == (ALL_DOMAINS, "python", "prose")
    assert result.layers == (2, 5)
    for layer in (2, 5):
        assert result.load(layer).metrics == load_imbalance(trace.layer(layer).counts_LE[0])
        for domain in ("python", "prose"):
            part = trace.select(layer=layer, domain=domain)
            load = result.load(layer, domain)
            assert load.metrics == load_imbalance(part.counts_LE[0])
            assert load.tokens == int(part.valid_T.sum())
            assert load.null == null_band(load.tokens, 2, 8)
            assert torch.equal(load.shares_E, part.counts_LE[0] / part.counts_LE[0].sum().double())


def test_windows_are_averaged():
    trace = long_trace(domains=("python",))
    load = imbalance(trace, 250, shuffle=False).load(1)
    assert (load.tokens, load.windows) == (250, 2)
    parts = [load_imbalance(part.counts_LE[1]) for part in trace.windows(250)]
    assert load.metrics == pytest.approx(np.mean(parts, axis=0))
    assert load.null == null_band(250, 2, 16, windows=2)
    assert torch.equal(load.shares_E, trace.select(tokens=500).counts_LE[1].double() / 1000)


def test_windows_take_whole_documents_in_a_shuffled_order():
    trace = long_trace(skew=4.0)
    in_order = dataclasses.replace(
        trace,
        document_T=trace.document_T.sort(stable=True).values,
        info=dataclasses.replace(trace.info, documents=trace.info.documents[::2] + trace.info.documents[1::2]),
    )
    by_domain = torch.cat([torch.arange(600)[trace.domain_T == i] for i in range(2)])
    in_order = dataclasses.replace(in_order, expert_ids_LTK=trace.expert_ids_LTK[:, by_domain])
    sorted_windows = imbalance(in_order, 300, shuffle=False).load(0).metrics.cv
    shuffled = imbalance(in_order, 300).load(0)
    assert shuffled.metrics.cv < sorted_windows
    # whole documents: both windows are made of three
    place_G = np.random.default_rng(0).permutation(6)
    first = torch.from_numpy(np.flatnonzero(place_G < 3))
    windows = [torch.isin(in_order.document_T, first), ~torch.isin(in_order.document_T, first)]
    expected = np.mean([load_imbalance(in_order._tokens(w.nonzero()[:, 0]).counts_LE[0]) for w in windows], axis=0)
    assert shuffled.metrics == pytest.approx(expected)


def test_chance_is_not_called_imbalance_but_skew_is():
    assert not any(load.shows_imbalance for load in imbalance(long_trace()).loads)
    result = imbalance(long_trace(skew=4.0))
    assert all(result.load(layer, "prose").shows_imbalance for layer in (0, 1))
    assert not any(result.load(layer, "python").shows_imbalance for layer in (0, 1))


def test_text_of_one_load():
    ids_LTK = torch.zeros(1, 8, 2, dtype=torch.int16)
    ids_LTK[0, :, 1] = torch.tensor([1, 2, 3, 1, 2, 3, -1, 1])
    trace = make_trace(
        info=TraceInfo("m", "", "", {}, OWN, 4, 2, (3,), DOCUMENTS[2:]),
        expert_ids_LTK=ids_LTK,
        gates_LTK=None,
        logits_LTE=None,
        expert_bias_LE=None,
        document_T=torch.zeros(8, dtype=torch.int32),
        position_T=torch.arange(8).int(),
        valid_T=torch.ones(8, dtype=torch.bool),
    )
    text = repr(imbalance(trace, 8)).splitlines()
    assert text[0] == "layer 3 · 8 tokens x 1 window · python · one rank"
    assert text[1].startswith("max/mean  2.13    (chance 1.4")
    assert text[2].startswith("cv        0.663   (chance 0.")
    assert text[3].startswith("dead      0       (chance 0")
    assert text[4] == "dropped   1 assignments"


def test_text_of_all_layers_and_domains():
    trace = long_trace(domains=("python", "prose", "data"), tokens=700, skew=4.0)
    assert repr(imbalance(trace, 250)) == imbalance(trace, 250).text()
    lines = imbalance(trace, 250).text().splitlines()
    assert lines[0] == "max/mean · one rank · * above the 95 % band of random routing"
    assert lines[1].split() == ["layer", "all", "domains", "python"]
    assert lines[1].startswith("layer     all domains   python")
    assert [line.split()[0] for line in lines[2:8]] == ["0", "1", "tokens", "windows", "chance", "95"]
    assert lines[4].split() == ["tokens", "250", "250"]
    assert lines[5].split() == ["windows", "2", "1"]
    assert "*" in lines[2].split()[1]
    assert lines[-1] == "fewer tokens than a window: prose, data"
    assert imbalance(trace, 250).text("cv").startswith("cv · one rank")
    assert all(line == line.rstrip() for line in lines)


def test_what_cannot_be_measured_is_refused():
    trace = make_trace()
    with pytest.raises(ValueError, match="window=24 is more than the 23 valid tokens"):
        imbalance(trace, 24)
    with pytest.raises(ValueError, match="window=0"):
        imbalance(trace, 0)
    dropped = torch.full((2, 24, 2), -1, dtype=torch.int16)
    with pytest.raises(ValueError, match="every assignment of a window of all domains was dropped"):
        imbalance(make_trace(expert_ids_LTK=dropped, gates_LTK=None))
    with pytest.raises(ValueError, match="layer=4"):
        imbalance(trace).load(4)
    with pytest.raises(ValueError, match="domain='latin'"):
        imbalance(trace).load(2, "latin")
    with pytest.raises(ValueError, match="metric='mean'"):
        imbalance(trace).text("mean")
