"""The benchmark over ranks: its arithmetic by hand, its rows on gloo, and under torchrun."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import ranks_bench_jobs
import torch

from moe_lab.jobs import ranks_bench
from moe_lab.jobs.bench_inputs import Inputs
from moe_lab.jobs.peers import grouped_experts_of
from moe_lab.jobs.ranks_inputs import all_settings, draw_routing
from moe_lab.jobs.ranks_measure import measure
from moe_lab.jobs.ranks_table import EXCHANGES, PHASES, describe, gather_rows, wait_and_transfer
from moe_lab.layer.dispatch import LocalTokenDispatcher
from moe_lab.parallel import RankPool

SMALL = {"tokens": 64, "dtype": "float32", "iterations": 3, "warmup": 1}


def test_waiting_is_for_the_latest_and_transfer_what_follows_by_hand():
    # Rank 1 comes 3 late in the first iteration, rank 0 comes 1 late in the second.
    arrival_RI, end_RI = np.array([[1.0, 11.0], [4.0, 10.0]]), np.array([[6.0, 13.0], [5.0, 12.5]])
    wait_RI, transfer_RI = wait_and_transfer(arrival_RI, end_RI)
    assert wait_RI.tolist() == [[3.0, 0.0], [0.0, 1.0]]
    assert transfer_RI.tolist() == [[2.0, 2.0], [1.0, 1.5]]


@pytest.fixture(scope="module")
def by_rank():
    with RankPool(2, backend="gloo") as pool:
        kinds = ("unequal", "equal", "forced")
        return {
            one.kind: (one, pool.run(measure, one)) for one in all_settings(["10B_2B/64"], ["zipf"], kinds, **SMALL)
        }


def test_rows_say_what_ran(by_rank):
    rows = {kind: gather_rows(settings, ranks) for kind, (settings, ranks) in by_rank.items()}
    assert rows["unequal"].padded_share == 0 < rows["equal"].padded_share
    assert rows["equal"].reason.startswith("forced: worst overhead")
    assert rows["forced"].straggler == pytest.approx(1.0, abs=0.07)  # 192 assignments over 36 experts
    row = rows["unequal"]
    assert row.shape == {"D": 32, "F": 22, "E": 36, "K": 3}
    assert row.straggler > 1
    assert len(row.forward_by_rank) == row.ranks == 2
    assert row.forward_slowest_each >= row.forward_slowest_rank >= row.forward_by_rank[0][0]
    assert tuple(row.phases_ms) == PHASES
    assert min(row.phases_ms.values()) > 0
    assert min(row.wait_ms.values()) >= 0 < min(row.transfer_ms.values())
    text = describe("10B_2B/64", list(rows.values()))
    assert text.startswith("10B_2B/64 on 2 ranks, EP 2   T 64  D 32  F 22  E 36  K 3   ms")
    assert "combine exchange" in text


def test_an_interrupt_leaves_a_table_and_a_file_of_what_is_done(by_rank, tmp_path, capsys):
    settings, ranks = by_rank["unequal"]

    def call(one):
        if one is not settings:
            raise KeyboardInterrupt
        return ranks

    with pytest.raises(KeyboardInterrupt):
        ranks_bench.run(call, [settings, by_rank["equal"][0]], tmp_path / "out.json")
    printed = capsys.readouterr().out
    assert printed.startswith("10B_2B/64 on 2 ranks, EP 2   T 64")
    assert "forced: worst overhead" not in printed
    assert [row["kind"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]] == ["unequal"]


def test_bytes_to_others_are_those_of_the_routing(by_rank):
    settings, ranks = by_rank["unequal"]
    for rank, result in enumerate(ranks):
        ids_TK = draw_routing(settings, rank, 2, torch.device("cpu")).expert_ids_TK
        away = int((ids_TK // 18 != rank).sum())
        assert result.sent_bytes == away * 32 * 4
    assert sum(result.rows for result in ranks) == 2 * 64 * 3


def test_routings_are_what_they_are_called():
    big = {**SMALL, "tokens": 4096}
    zipf, trace = all_settings(["10B_2B/64"], ["zipf", "trace"], ["unequal"], **big)
    counts_E = draw_routing(zipf, 0, 2, torch.device("cpu")).counts_E.sort(descending=True).values
    assert 0.56 < float(counts_E[0]) / 4096 < 0.62, "weight 1 of H(36) = 4.17, three draws without replacement"
    assert 1.5 < float(counts_E[5] / counts_E[11]) < 2.5, "places 6 and 12: twice as likely"
    assert (trace.config.num_experts, trace.config.top_k) == (32, 4)
    first, second = (draw_routing(trace, rank, 2, torch.device("cpu")).expert_ids_TK for rank in (0, 1))
    assert not torch.equal(first, second)
    (forced,) = all_settings(["10B_2B/64"], ["zipf", "skewed"], ["forced"], **big)  # once, whatever the routing
    counts_E = draw_routing(forced, 0, 2, torch.device("cpu")).counts_E
    assert int(counts_E.max() - counts_E.min()) <= 1


def test_groups_of_ranks_wait_among_themselves(by_rank):
    settings, ranks = by_rank["unequal"]
    late = [[t + 1000.0 for t in edges] for edges in ranks[0].edges_IP]
    apart = dataclasses.replace(settings, ep=1)
    row = gather_rows(apart, [ranks[0], ranks[1]._replace(edges_IP=late)])
    assert (row.ranks, row.ep) == (2, 1)
    assert [row.wait_ms[name] for name in EXCHANGES] == [0, 0]


@pytest.fixture(scope="module")
def four():
    with RankPool(4, backend="gloo") as pool:
        yield pool


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_a_steps_gradients_are_those_of_the_sum_of_all_ranks_losses(four, ep):
    """In one process: all experts, each rank's tokens, the sum of mean(y^2). Ranks r and r + ep share experts."""
    (settings,) = all_settings(["10B_2B/64"], ["skewed"], ["unequal"], **SMALL | {"tokens": 16}, ep=ep)
    parts = four.run(ranks_bench_jobs.gradients, settings)
    weights = [torch.cat([part.weights[i] for part in parts[:ep]]).requires_grad_() for i in range(3)]
    experts, dispatcher = grouped_experts_of(Inputs(*[parts[0].x_TD] * 3, *weights), "loop"), LocalTokenDispatcher(36)
    for part in parts:
        rows_RD, plan = dispatcher.dispatch(part.x_TD, part.routing)
        y_TD = dispatcher.combine(experts(rows_RD, plan.ends_E), part.routing, plan)
        y_TD.square().mean().backward()
    for rank, part in enumerate(parts):
        assert all(torch.equal(a, b) for a, b in zip(part.weights, parts[rank % ep].weights))
        for got, weight in zip(part.gradients, experts.parameters()):
            torch.testing.assert_close(got, weight.grad.chunk(ep)[rank % ep], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_two_groups_of_two_ranks(four):
    (settings,) = all_settings(["10B_2B/64"], ["skewed"], ["unequal"], **SMALL, ep=2)
    ranks = four.run(measure, settings)
    row = gather_rows(settings, ranks)
    assert (row.ranks, row.ep) == (4, 2)
    for group in (ranks[:2], ranks[2:]):
        assert sum(result.rows for result in group) == 2 * 64 * 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((["nothing"], ["zipf"], ["equal"]), "preset='nothing'"),
        ((["10B_2B"], ["nothing"], ["equal"]), "routing='nothing'"),
        ((["10B_2B"], ["zipf"], ["nothing"]), "kinds='nothing'"),
    ],
)
def test_unknown_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        all_settings(*names)


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "moe_lab",
        "bench",
        "layer",
    ]
    options = ["--preset", "10B_2B/64", "--tokens", "32", "--dtype", "float32", "--iterations", "2"]
    options += ["--kinds", "unequal", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "10B_2B/64 on 2 ranks, EP 2   T 32" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["kind"], row["ranks"]) for row in rows] == [("unequal", 2)]
