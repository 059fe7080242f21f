"""The job that trains under every method, on a tiny model."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from moe_lab.jobs import balance
from moe_lab.jobs.corpus_file import Corpus, save_corpus
from moe_lab.jobs.evaluate import as_tensor
from moe_lab.jobs.train import Trainer
from moe_lab.study.balance_runs import BalanceRuns
from tests.test_lm import TINY
from tests.test_train import CONFIG, corpus, split  # noqa: F401 (a fixture)

TINY_BASE = dataclasses.replace(
    CONFIG, model=dataclasses.replace(TINY, moe=TINY.moe.replace(load_balance_coeff=None)), steps=3, switch_parts=2
)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(balance, "WINDOW", 64)


@pytest.mark.parametrize("name", balance.TRAINED)
def test_every_method_trains_and_is_measured(name, corpus):  # noqa: F811
    found = balance.run(name, TINY_BASE, corpus, windows=3)
    assert (found.method, found.seed) == (name, 0)
    assert 0 < found.bits < 9
    assert len(found.load) == len(found.train_load) == TINY.num_layers
    assert all(1 <= load <= 4 for load in (*found.load, *found.train_load))
    assert len(found.history) == 1
    assert (found.dropped > 0) <= name.startswith("capacity")
    assert found == balance.run(name, TINY_BASE, corpus, windows=3)


def test_the_strength_of_a_method_reaches_the_training():
    assert balance.config_of("switch, sequence", TINY_BASE).sequence_coeff == 0.01
    assert balance.config_of("bias", TINY_BASE).model.moe.load_balance_coeff == 1e-3
    with pytest.raises(ValueError, match="expert_choice"):
        balance.config_of("expert choice", TINY_BASE)


def test_heldout_windows_by_hand(corpus):  # noqa: F811
    moe = TINY.moe.replace(capacity_factor=0.5, load_balance_coeff=None)
    trainer = Trainer(dataclasses.replace(TINY_BASE, model=dataclasses.replace(TINY, moe=moe)), corpus, "cpu")
    text_B = as_tensor(b"the quick brown fox jumps over the lazy dog and does it again " * 8)[:400]
    bits, load_L, dropped = balance.heldout(trainer.model, text_B, windows=2)
    trainer._routings.clear()
    start = torch.linspace(0, 400 - 33, 4).long()  # crops 0 and 2 are the first window, 1 and 3 the second
    counts, nats = [], []
    for window in (start[[0, 2]], start[[1, 3]]):
        bytes_BL = torch.stack([text_B[s : s + 33] for s in window.tolist()]).long()
        with torch.no_grad():
            logits = trainer.model(bytes_BL[:, :-1])
        seen, trainer._routings[:] = list(trainer._routings), []
        nats.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), bytes_BL[:, 1:].flatten()))
        counts.append(torch.stack([routing.counts_E for routing in seen]))
    assert bits == pytest.approx(float(sum(nats)) / 2 / math.log(2), rel=1e-5)
    expected_L = torch.stack([c.amax(dim=1) / c.double().mean(dim=1) for c in counts]).mean(dim=0)
    torch.testing.assert_close(load_L, expected_L)
    room = math.ceil(64 * moe.top_k / moe.num_experts * 0.5)
    assert dropped == pytest.approx(sum(int((c - room).clamp(min=0).sum()) for c in counts) / (4 * 64 * moe.top_k))
    with pytest.raises(ValueError, match="windows=9"):
        balance.heldout(trainer.model, text_B, windows=9)


@pytest.mark.slow
def test_runs_go_on_where_a_file_ends(corpus, tmp_path):  # noqa: F811
    heldout = split(Path(json.__file__).read_bytes()[8000:13_000])  # a window is of its full size in other processes
    save_corpus(Corpus(corpus.train, heldout, {}), tmp_path / "corpus.safetensors")
    out, given = tmp_path / "runs.json", {"windows": 1, "workers": 2}
    first = balance.run_all(["none"], 1, TINY_BASE, tmp_path / "corpus.safetensors", out, **given)
    assert [(run.method, run.seed) for run in first.runs] == [("none", 0)]
    both = balance.run_all(["none", "bias"], 2, TINY_BASE, tmp_path / "corpus.safetensors", out, **given)
    assert [(run.method, run.seed) for run in both.runs] == [("none", 0), ("bias", 0), ("none", 1), ("bias", 1)]
    assert both.runs[0] == first.runs[0]
    assert BalanceRuns.read(out).runs == both.runs
    assert json.loads(out.read_text())["config"]["steps"] == 3
    other = dataclasses.replace(TINY_BASE, steps=4)
    with pytest.raises(ValueError, match=r"runs\.json holds runs with config="):
        balance.run_all(["none"], 1, other, tmp_path / "corpus.safetensors", out, **given)
    limited = balance.run_all(["none"], 3, TINY_BASE, tmp_path / "corpus.safetensors", out, limit=0.0, **given)
    assert limited.runs == both.runs
