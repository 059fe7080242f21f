"""Runs compared to the bit: the stages are the layer's own, what differs is found where it was put, sizes by hand."""

import argparse
import json
from functools import partial

import pytest
import torch

from moe_lab import MoE, MoEConfig, data
from moe_lab.jobs import determinism as job
from moe_lab.study import determinism, timing
from moe_lab.study.determinism import ARMS, Difference, arms_on, climb, first_difference, make_arm, ulps_of
from moe_lab.study.stages import STAGES, run_stages
from moe_lab.view import determinism as view
from moe_lab.view import theme

CPU = torch.device("cpu")
CHEAP = ("repeat", "recompute", "permuted", "alone", "in seven", "split", "ep 2")


@pytest.fixture(scope="module")
def moe():
    torch.manual_seed(0)
    return MoE(MoEConfig(dim=48, hidden_dim=40, num_experts=6, top_k=2, num_shared_experts=1)).eval()


@pytest.fixture(scope="module")
def x_TD():
    return torch.randn(96, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", arms_on(CPU, torch.float32))
@pytest.mark.parametrize("ep", [1, 2])
def test_the_stages_are_those_of_the_layer(moe, x_TD, name, ep):
    arm = make_arm(moe, name)
    if arm.add_as_they_come:
        return
    stages = run_stages(arm, x_TD, torch.ones_like(x_TD), ep=ep)
    if ep == 1:
        leaf = x_TD.clone().requires_grad_()
        out_TD = arm.moe(leaf)
        assert torch.equal(stages["combine"][0], out_TD)
        assert torch.equal(stages["input gradient"][0], torch.autograd.grad(out_TD.sum(), leaf)[0])
    exact = run_stages(make_arm(moe, "loop"), x_TD, torch.ones_like(x_TD))
    assert [stage for stage in STAGES if stage in stages] == list(stages)
    for stage, tensors in stages.items():
        for got, expected in zip(tensors, exact["w2 product" if stage == "experts" else stage], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # the same rows at the same places


def test_what_holds_anywhere(moe, x_TD):
    ladder = climb(moe, x_TD, questions=CHEAP)
    for cell in ladder.cells.values():
        assert cell["repeat"] == cell["recompute"] == Difference(None)
    invariant = ladder.cells["blocked, batch_invariant"]
    assert {found.stage for found in invariant.values()} <= {None, "weight gradients"}
    assert invariant["alone"].stage is invariant["in seven"].stage is None
    assert ladder.cells["loop, index_add"]["ep 2"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_difference_is_found_where_it_was_put(moe, x_TD, stage):
    name = "buffered" if stage == "experts" else "loop"
    base = run_stages(make_arm(moe, name), x_TD, torch.ones_like(x_TD))
    later = [s for s in STAGES[STAGES.index(stage) :] if s in base]
    other = {s: tuple(t.clone() for t in ts) for s, ts in base.items()}
    for changed in later:
        other[changed][-1][3] += 1
    exact = run_stages(make_arm(moe, "loop"), x_TD, torch.ones_like(x_TD))
    found = first_difference(base, other, lambda: exact)
    assert found.stage == stage
    assert found.rows == pytest.approx(1 / sum(len(t) for t in base[stage]))
    assert (found.ulps > 0) == (stage != "choice")


def test_sizes_by_hand():
    exact = torch.tensor([[4.0, 0.5], [3.9, -1.0], [0.0, -0.25]], dtype=torch.float64)
    eps = 2.0**-23
    assert ulps_of(exact, torch.float32)[:, 0].tolist() == [4 * eps, 2 * eps, 0.25 * eps]
    assert ulps_of(exact, torch.bfloat16)[0].item() == 4 * 2.0**-7
    a, b = torch.tensor([[4.0, 0.5]]), torch.tensor([[4.0, 0.5 + 8 * eps]])
    found = first_difference({"combine": (a,)}, {"combine": (b,)}, lambda: {"combine": (exact[:1],)})
    assert found == Difference("combine", 1.0, 2.0, 0.0, 2.0)


def test_a_product_that_feels_its_neighbours_is_caught(moe, x_TD, monkeypatch):
    """A wrong backend: its last row is rounded otherwise when the expert has an odd number of rows."""
    loop = determinism.make_arm(moe, "loop").moe
    before = torch.nn.functional.linear

    def wrong(x, *args):
        out = before(x, *args)
        return out * (1 + 2.0**-22) if len(x) % 2 else out

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)
    found = climb(loop, x_TD, arms=["loop"], questions=("repeat", "in seven")).cells["loop"]
    assert found["repeat"].stage is None
    assert found["in seven"].stage == "router logits"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["atomic"]}, "arm='atomic'"),
        ({"questions": ["always"]}, "question='always'"),
        ({"threads": 1}, "threads=1"),
    ],
)
def test_bad_questions(moe, x_TD, changes, message):
    with pytest.raises(ValueError, match=message):
        climb(moe, x_TD, **changes)


def test_threads_are_restored(moe, x_TD):
    before = torch.get_num_threads()
    climb(moe, x_TD, arms=["padded"], questions=("threads",), threads=3)
    assert torch.get_num_threads() == before


def test_arms_are_those_that_a_device_has():
    assert "fused" not in arms_on(CPU, torch.bfloat16)
    cuda = torch.device("cuda")
    assert set(ARMS) - set(arms_on(cuda, torch.bfloat16)) == {"buffered"}
    assert not {"fused", "buffered"} & set(arms_on(cuda, torch.float32))


def test_the_command_writes_what_the_page_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(job.PRICED, "cpu", (1,))
    monkeypatch.setitem(timing.BLOCK_MS, "cpu", 1.0)
    monkeypatch.setattr(job, "arms_on", lambda *_: ("loop", "blocked, batch_invariant"))
    monkeypatch.setattr(job, "climb", partial(climb, questions=("repeat", "alone")))
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    path = tmp_path / "determinism.json"
    monkeypatch.setattr(job, "cpu_model", lambda: "this")
    names = ("other", f"this, {torch.get_num_threads()} threads")
    other, same = ({"environment": {"device": name}, "ladders": [], "prices": []} for name in names)
    path.write_text(json.dumps({"format": job.FORMAT, "machines": [same, other]}))
    job.main(parser.parse_args(["--tokens", "32", "--rounds", "1", "--json", str(path)]))
    assert "blocked, batch_invariant" in capsys.readouterr().out
    assert json.loads(path.read_text())["format"] == job.FORMAT
    (tmp_path / "README.md").touch()
    monkeypatch.setattr(data, "root", lambda: tmp_path)
    kept, machine = job.recorded()  # in place of what was there of this machine
    assert kept.environment == {"device": "other"}
    assert [ladder.dtype for ladder in machine.ladders] == ["float32", "bfloat16"]
    last = str(view.LadderText(machine.ladders[0])).splitlines()[-1]
    assert last.split() == ["blocked,", "batch_invariant", "same", "same"]
    assert {price.base for price in machine.prices} == {"loop"}
    assert len(str(view.PriceText(machine.prices)).splitlines()) == 1 + len(machine.prices)


@pytest.mark.parametrize("tokens", ["27", "2530"])
def test_tokens_are_no_more_than_the_text_has(tokens):
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    with pytest.raises(ValueError, match=f"tokens={tokens} must be an integer from 28 to 2529"):
        job.main(parser.parse_args(["--tokens", tokens]))
    assert max(job.PRICED["cpu"]) == 2529


def test_a_gpu_that_is_not_here_is_an_error():
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda'"):
            job.main(parser.parse_args(["--device", "cuda"]))


def test_the_figure_says_what_the_text_says(moe, x_TD):
    ladder = climb(moe, x_TD, arms=["loop", "loop, index_add"], questions=("repeat", "alone", "ep 2"))
    ladder.cells["loop"]["ep 2"] = Difference(None)
    ladder.cells["loop"]["alone"] = Difference("w1/w3 products", 1.0, 3.04, 1.0, 1.0)
    drawn = view.ladder_figure(ladder)
    texts = [text.get_text() for text in drawn.axes[0].texts]
    assert texts[:3] == ["✓", "w1/w3\n3", "✓"]
    assert texts[5] == "–"
    lines = str(view.LadderText(ladder)).splitlines()
    assert lines[2].split() == ["loop", "same", "w1/w3", "3", "same"]
    assert theme.title(drawn) == "Equal to the bit?"


def test_recorded_machines_hold_what_is_claimed_of_them():
    machines = job.recorded()
    assert [ladder.device for machine in machines for ladder in machine.ladders[:1]] == ["cpu", "cuda"]
    for machine in machines:
        for ladder in machine.ladders:
            for name, cell in ladder.cells.items():
                differs = {question for question, found in cell.items() if found and found.stage}
                atomics = ladder.device == "cuda" and "index_add" in name
                assert differs & {"repeat", "recompute"} == ({"repeat", "recompute"} if atomics else set()), name
                if "batch_invariant" in name:  # outputs; on a GPU not the gradient of the input
                    gradients = {None, "weight gradients"} | ({"input gradient"} if ladder.device == "cuda" else set())
                    assert {found.stage for found in cell.values() if found} <= gradients, (machine, name)
