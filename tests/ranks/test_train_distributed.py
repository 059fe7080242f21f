import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import training_jobs as jobs

from moe_lab import cli
from moe_lab.jobs.corpus_file import Corpus, save_corpus
from moe_lab.jobs.train import TrainConfig, Trainer, train
from moe_lab.jobs.train_distributed import load_checkpoint, newest
from moe_lab.parallel import RankPool
from moe_lab.parallel.ranks import RankError
from tests.test_lm import TINY
from tests.test_train import split

CONFIG = TrainConfig(model=TINY, steps=6, batch=4, warmup=3, log_every=2, save_every=3, eval_files=1)


@pytest.fixture(scope="module")
def corpus():
    text = Path(json.__file__).read_bytes()
    return Corpus(split(text[:8000]), split(text[8000:8200]), {})


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, backend="gloo") as pool:
        yield pool


@pytest.fixture(scope="module")
def unbroken(pool, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, pool.run(jobs.run, CONFIG, corpus, folder, 2)[0]


def log(folder):
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_resumed_equals_unbroken_to_the_bit(pool, corpus, unbroken, tmp_path):
    pool.run(jobs.run, CONFIG, corpus, tmp_path, 2, stop=3)
    same(pool.run(jobs.run, CONFIG, corpus, tmp_path, 2, resume=True)[0], unbroken[1])
    assert log(tmp_path) == log(unbroken[0])


def test_the_run_is_that_of_one_process(corpus, unbroken, tmp_path):
    train(CONFIG, corpus, tmp_path)
    for ours, theirs in zip(log(unbroken[0]), log(tmp_path), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"accumulate": 2, "batch": 8}, {}),
        ({"global_coeff": 0.5}, {}),
        ({"z_coeff": 0.1, "global_coeff": 0.5}, {"sp": 2}),
        ({"accumulate": 2, "z_coeff": 0.1}, {"sp": 2}),
    ],
    ids=["micro-batches", "global counts", "cut sequences", "both"],
)
def test_other_shares_are_the_run_of_one_process_too(pool, corpus, tmp_path, change, options):
    """The balancing bias moves once a step, by the tokens of all ranks and micro-batches."""
    config = dataclasses.replace(CONFIG, **change, model=dataclasses.replace(TINY, max_length=31))
    got = pool.run(jobs.run, config, corpus, tmp_path / "ranks", 2, **options)[0]
    one = train(config, corpus, tmp_path / "one")
    for ours, theirs in zip(log(tmp_path / "ranks"), log(tmp_path / "one"), strict=True):
        assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)
        assert ours["auxiliary_loss"] == pytest.approx(theirs["auxiliary_loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["max_over_mean"] == theirs["max_over_mean"]
    for name, bias_E in jobs.state(one).items():
        if name.endswith("expert_bias_E"):
            assert torch.equal(got[name], bias_E)


def test_ranks_in_a_fixed_order_are_one_process_with_a_micro_batch_each_to_the_bit(one_thread, pool, corpus, tmp_path):
    """Log, weights, biases and moments after six steps, auxiliary losses and the norm of the gradient among them.

    64 channels: fused AdamW on a CPU rounds otherwise what is left over of vectors of eight, or sixteen.
    """
    model = dataclasses.replace(TINY, moe=TINY.moe.replace(dim=64))
    config = dataclasses.replace(CONFIG, model=model, switch_coeff=0.1, z_coeff=0.1)
    got = pool.run(jobs.run, config, corpus, tmp_path / "ranks", 1, fixed_order=True)[0]
    one = train(dataclasses.replace(config, accumulate=4), corpus, tmp_path / "one")
    same(got, jobs.state(one))
    assert log(tmp_path / "ranks") == log(tmp_path / "one")


@pytest.mark.parametrize(("ep", "sp"), [(1, 1), (4, 1), (2, 2)])
def test_a_checkpoint_loads_on_another_layout_to_the_bit(pool, corpus, unbroken, ep, sp):
    same(pool.run(jobs.loaded, CONFIG, corpus, unbroken[0] / "checkpoints", ep, sp)[0], unbroken[1])


def test_a_checkpoint_loads_in_one_process_to_the_bit(corpus, unbroken):
    trainer = Trainer(CONFIG, corpus, "cpu")
    load_checkpoint(newest(unbroken[0] / "checkpoints"), trainer.model, trainer.optimizer)
    same(jobs.state(trainer), unbroken[1])


@pytest.mark.parametrize("written", [True, False], ids=["data written", "in the midst of data"])
def test_killed_in_a_save_the_last_checkpoint_is_whole(pool, corpus, unbroken, written):
    path = unbroken[0] / "checkpoints"
    with pytest.raises(RankError, match="rank 0 failed first:\nprocess died"):
        pool.run(jobs.killed_in_save, CONFIG, corpus, path, 2, written)
    assert sorted(p.name for p in path.iterdir()) == ["part-00000099", "step-00000006"]
    same(pool.run(jobs.loaded, CONFIG, corpus, path, 2)[0], unbroken[1])


@pytest.mark.parametrize(
    ("change", "sp", "message"),
    [
        ({"batch": 6}, 1, "batch=6 must divide over 4 ranks"),
        ({"batch": 3}, 2, "batch=3 must divide over 2 groups of sp=2 ranks"),
        ({"accumulate": 2}, 1, "batch=4 must divide over 4 ranks and accumulate=2"),
        ({"compile": True}, 1, "compile"),
        ({"sequence_coeff": 0.1}, 2, "sequence_coeff=0.1 is of whole sequences: sp=2 must be 1"),
    ],
)
def test_what_many_ranks_cannot_do_is_refused(pool, corpus, tmp_path, change, sp, message):
    with pytest.raises(RankError, match=message):
        pool.run(jobs.run, dataclasses.replace(CONFIG, **change), corpus, tmp_path, 2, sp=sp)


@pytest.mark.parametrize("options", [["--ep", "2"], ["--sp", "2"], ["--checkpointing"], ["--fixed-order"]])
def test_options_of_many_ranks_are_refused_to_one_process(corpus, tmp_path, capsys, options):
    save_corpus(corpus, tmp_path / "corpus.safetensors")
    command = ["train", "--device", "cpu", "--corpus", str(tmp_path / "corpus.safetensors"), "--out", str(tmp_path)]
    assert cli.main([*command, *options]) == 2
    assert "are for many ranks: start with torchrun -m moe_lab train" in capsys.readouterr().err


def test_nothing_to_resume_from_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        newest(tmp_path)


@pytest.mark.slow
def test_torchrun_names_a_killed_rank_and_ends_the_rest(corpus, tmp_path):
    corpus_path = tmp_path / "corpus.safetensors"
    save_corpus(corpus, corpus_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moe_lab"]
    command += ["train", "--ep", "2", "--device", "cpu", "--batch", "2", "--log-every", "1"]
    command += ["--corpus", str(corpus_path), "--out", str(tmp_path / "run")]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        try:
            while not (tmp_path / "run/log.jsonl").exists() and job.poll() is None:
                time.sleep(0.1)
            ranks = psutil.Process(job.pid).children()
            victim = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
            victim.kill()
            _, error = job.communicate(timeout=10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert f"rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: {victim.pid})" in error
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_two_agents_train_as_one_job(corpus, tmp_path):
    """As on two machines: each torchrun starts a rank of its own."""
    corpus_path = tmp_path / "corpus.safetensors"
    save_corpus(corpus, corpus_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    job = ["-m", "moe_lab", "train", "--ep", "2", "--device", "cpu", "--batch", "2", "--steps", "2", "--log-every", "1"]
    job += ["--corpus", str(corpus_path), "--out", str(tmp_path / "run")]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = [
        subprocess.Popen([*command, f"--node-rank={node}", *job], env=environ, stderr=subprocess.PIPE, text=True)
        for node in range(2)
    ]
    try:
        errors = [agent.communicate(timeout=120)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2]
    assert newest(tmp_path / "run/checkpoints").name == "step-00000002"
