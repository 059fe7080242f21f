import dataclasses
import hashlib
import json
import math
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch.distributed._composable import checkpoint

from moe_lab.jobs.corpus_file import Corpus, Split
from moe_lab.jobs.evaluate import as_tensor
from moe_lab.jobs.train import TrainConfig, Trainer, TrainingDiverged, heldout_bits, train
from moe_lab.study.trace import Document, record
from tests.test_lm import TINY

CONFIG = TrainConfig(model=TINY, steps=12, batch=4, warmup=3, log_every=2, save_every=4, eval_files=1)


def split(text: bytes) -> Split:
    document = Document("stdlib:x.py", "python", hashlib.sha256(text).hexdigest(), 0, len(text))
    return Split(as_tensor(text), torch.tensor([0, len(text)]), (document,))


@pytest.fixture(scope="module")
def corpus():
    text = Path(json.__file__).read_bytes()
    return Corpus(split(text[:8000]), split(text[8000:9000]), {})


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_state(a: Trainer, b: Trainer) -> bool:
    mine, theirs = (torch.nn.utils.parameters_to_vector(t.model.parameters()) for t in (a, b))
    moments = ([s["exp_avg_sq"] for s in t.optimizer.state_dict()["state"].values()] for t in (a, b))
    return torch.equal(mine, theirs) and all(torch.equal(x, y) for x, y in zip(*moments, strict=True))


def test_resumed_equals_unbroken_to_the_bit(corpus, tmp_path):
    unbroken = train(CONFIG, corpus, tmp_path / "a")
    train(CONFIG, corpus, tmp_path / "b", stop=8)
    resumed = train(CONFIG, corpus, tmp_path / "b", resume=True)
    assert same_state(unbroken, resumed)
    for a, b in zip(unbroken.model.moe_layers, resumed.model.moe_layers, strict=True):
        assert torch.equal(a.expert_bias_E, b.expert_bias_E)
        assert a.expert_bias_E.abs().sum() > 0
    without_time = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines(tmp_path / run)] for run in "ab"
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_are_one_step(corpus, checkpointing):
    """The mean over them, the balancing bias moved once by all, recompute not counted."""
    config = dataclasses.replace(CONFIG, z_coeff=0.1)
    whole = Trainer(config, corpus, "cpu")
    parts = Trainer(dataclasses.replace(config, accumulate=4), corpus, "cpu")
    if checkpointing:
        for block in parts.model.blocks:
            checkpoint(block)
    expected, found = whole.advance(), parts.advance()
    assert found.losses.cross_entropy == pytest.approx(expected.losses.cross_entropy.item(), rel=1e-6)
    assert found.losses.auxiliary == pytest.approx(expected.losses.auxiliary.item(), rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm.item(), rel=1e-5)
    assert torch.equal(found.counts_LE, expected.counts_LE)
    for a, b in zip(parts.model.moe_layers, whole.model.moe_layers, strict=True):
        assert torch.equal(a.expert_bias_E, b.expert_bias_E)
        assert a.expert_bias_E.abs().max() == pytest.approx(1e-3, rel=0.5)  # one step, not four


def test_the_log_has_a_line_an_interval(corpus, tmp_path):
    trainer = train(CONFIG, corpus, tmp_path)
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in log if "heldout_bits_per_byte" in line] == [4, 8, 12]
    assert log[-1]["bytes"] == 12 * 4 * 32
    assert log[-1]["bits_per_byte"] < log[0]["bits_per_byte"]
    assert log[-1]["heldout_bits_per_byte"] == heldout_bits(trainer.model, corpus)
    assert len(log[-1]["max_over_mean"]) == TINY.num_layers


def test_nan_stops_with_its_step_and_keeps_the_checkpoint(corpus, tmp_path):
    config = dataclasses.replace(CONFIG, log_every=5)
    advance = Trainer.advance

    def poison(self):
        if self.step == 6:
            with torch.no_grad():
                self.model.head.weight[0, 0] = math.inf
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "advance", poison)
        with pytest.raises(TrainingDiverged, match="step 7: loss nan"):
            train(config, corpus, tmp_path)
    trainer = Trainer(config, corpus, "cpu")
    trainer.resume(tmp_path / "checkpoint.pt")
    assert trainer.step == 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_resuming_another_config_names_the_difference(corpus, tmp_path):
    train(CONFIG, corpus, tmp_path, stop=4)
    with pytest.raises(ValueError, match=r"learning_rate=0\.003, not 0\.1: cannot resume"):
        train(dataclasses.replace(CONFIG, learning_rate=0.1), corpus, tmp_path, resume=True)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_auxiliary_losses_are_those_of_each_layer_added_up(corpus, compiled, monkeypatch):
    config = dataclasses.replace(
        CONFIG, switch_coeff=0.1, sequence_coeff=0.01, z_coeff=0.001, global_coeff=0.2, hf_coeff=0.3, switch_parts=2
    )
    trainer, plain = Trainer(config, corpus, "cpu"), Trainer(CONFIG, corpus, "cpu")
    losses = trainer.losses
    if compiled:
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checks would be compiled too
        losses = torch.compile(trainer._losses, backend="aot_eager")
    got, without = losses(trainer.batch(0)), plain.losses(plain.batch(0))
    with record(plain.model) as recorder, torch.no_grad():
        plain.model.eval()(plain.batch(0)[:, :-1])
    routings = [recorder.trace().routing(layer) for layer in range(TINY.num_layers)]
    expected = 0.0
    for routing in routings:
        counts_BE = torch.stack([torch.bincount(ids.flatten(), minlength=4) for ids in routing.expert_ids_TK.chunk(4)])
        probs_BE = routing.scores_TE.view(4, 32, 4).mean(dim=1)
        for half in (slice(0, 2), slice(2, 4)):
            expected += 0.1 / 2 * 4 * float((counts_BE[half].sum(0) / (64 * 2) * probs_BE[half].mean(0)).sum())
        expected += 0.2 * 4 * float((counts_BE.sum(0) / (128 * 2) * probs_BE.mean(0)).sum())
        expected += 0.01 * 4 * float((counts_BE / (32 * 2) * probs_BE).sum(1).mean())
        expected += 0.001 * float(routing.logits_TE.logsumexp(1).square().mean())
    counts_E = torch.stack([torch.bincount(r.expert_ids_TK.flatten(), minlength=4) for r in routings]).sum(0)
    probs_E = torch.cat([r.scores_TE for r in routings]).mean(0)
    expected += 0.3 * 4 * float((counts_E / (128 * len(routings)) * probs_E).sum())
    assert got.auxiliary.item() == pytest.approx(expected, rel=1e-3)  # a trace keeps logits in float16
    assert without.auxiliary.item() == 0.0
    assert got.cross_entropy.item() == pytest.approx(without.cross_entropy.item(), rel=1e-5)


def test_the_global_loss_counts_the_micro_batches_so_far(corpus):
    config = dataclasses.replace(CONFIG, global_coeff=0.5, accumulate=2, model=dataclasses.replace(TINY, num_layers=1))
    trainer, seen = Trainer(config, corpus, "cpu"), []
    trainer.model.moe_layers[0].router.register_forward_hook(lambda _, __, routing: seen.append(routing))
    got = [trainer.losses(part_BL).auxiliary.item() for part_BL in trainer.batch(0).chunk(2)]
    counts_E = torch.zeros(4)
    for value, routing in zip(got, seen, strict=True):
        counts_E += routing.counts_E
        f, p = counts_E / counts_E.sum(), routing.scores_TE.detach().mean(dim=0)
        assert value == pytest.approx(0.5 * 4 * float((f * p).sum()))
    trainer.balance()
    assert trainer.counts().sum() == 0


def test_the_switch_loss_balances_what_nothing_else_does(corpus, tmp_path):
    moe = TINY.moe.replace(load_balance_coeff=None)
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(TINY, moe=moe), steps=40, log_every=40, save_every=40
    )
    spread = {}
    for coeff in (0.0, 1.0):
        train(dataclasses.replace(config, switch_coeff=coeff), corpus, tmp_path / str(coeff))
        spread[coeff] = max(lines(tmp_path / str(coeff))[-1]["max_over_mean"])
    assert spread[1.0] < spread[0.0]


def test_a_model_may_drop_over_capacity_while_it_trains(corpus):
    moe = TINY.moe.replace(capacity_factor=1.0)
    trainer = Trainer(dataclasses.replace(CONFIG, model=dataclasses.replace(TINY, moe=moe)), corpus, "cpu")
    step = trainer.advance()
    assert step.counts_LE.sum(dim=1).tolist() == [4 * 32 * 2] * 2, "the balancing bias hears what was asked for"
    assert step.losses.cross_entropy.isfinite()


def test_crops_follow_from_seed_and_step(corpus):
    trainer, again = (Trainer(CONFIG, corpus, "cpu") for _ in range(2))
    other = Trainer(dataclasses.replace(CONFIG, seed=1), corpus, "cpu")
    assert torch.equal(trainer.batch(3), again.batch(3))
    assert not torch.equal(trainer.batch(3), trainer.batch(4))
    assert not torch.equal(trainer.batch(3), other.batch(3)), "a seed's high bits would be lost"


def test_too_little_text_is_refused(corpus):
    short = Corpus(split(b"too short"), corpus.heldout, {})
    with pytest.raises(ValueError, match="9 training bytes: at least 33"):
        Trainer(CONFIG, short, "cpu").advance()


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"dtype": "int8"},
        {"learning_rate": float("nan")},
        {"z_coeff": -1.0},
        {"accumulate": 3},
        {"switch_parts": 3},
    ],
)
def test_bad_settings_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
