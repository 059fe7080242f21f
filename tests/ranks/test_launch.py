import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab.parallel.launch import main, rank_environment

ROOT = Path(__file__).parent.parent.parent


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command, **environ):
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environ
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environ.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(processes):
    done = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    return done


JOB = ["moe_lab.parallel.launch", "rank_jobs:total", "--arguments", '{"value": 2}', "--backend", "gloo"]


@pytest.mark.slow
def test_two_torchrun_agents_on_loopback():
    port = free_port()
    agents = [
        start(["torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", f"--node-rank={node}",
               "--master-addr=127.0.0.1", f"--master-port={port}", "-m", *JOB])
        for node in range(2)
    ]  # fmt: skip
    (first, error, code), (second, _, other) = outputs(agents)
    assert (code, other) == (0, 0), error
    assert json.loads(first.strip().splitlines()[-1]) == [20.0] * 4
    assert "20.0" not in second


@pytest.mark.slow
def test_slurm_s_variables_are_enough():
    port = free_port()
    tasks = [
        start([*JOB, "--rendezvous", f"127.0.0.1:{port}"], SLURM_PROCID=str(rank), SLURM_NTASKS="2", SLURM_LOCALID="0")
        for rank in range(2)
    ]
    (first, error, code), (_, _, other) = outputs(tasks)
    assert (code, other) == (0, 0), error
    assert json.loads(first) == [6.0] * 2


def test_torchrun_s_variables_are_left_alone():
    assert rank_environment({"RANK": "1", "MASTER_ADDR": "here", "SLURM_PROCID": "3"}, None) == {}


def test_slurm_s_variables_are_translated():
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    assert rank_environment(slurm, "node7:29500") == {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "29500",
    }


@pytest.mark.parametrize("rendezvous", [None, "node7", ":29500"])
def test_slurm_needs_an_address(rendezvous):
    with pytest.raises(ValueError, match=r"rendezvous=.* must be host:port of rank 0 under srun"):
        rank_environment({"SLURM_PROCID": "0"}, rendezvous)


def test_no_launcher_is_named(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK and SLURM_PROCID are not set: start this with torchrun or srun"):
        main(["rank_jobs:total"])
