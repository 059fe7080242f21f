"""What only a GPU can show of the fused layer: no waiting, graphs, compilation, repeats, sizes and memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_lab.jobs import decode_bench
from moe_lab.jobs.bench_inputs import LAYERS, default_tokens, make_inputs
from moe_lab.jobs.peers import ours, transformers
from moe_lab.kernels import fused, grouped_gemm, tiles
from moe_lab.kernels.fused import fused_experts
from moe_lab.kernels.tiles import tile_rows, tile_rows_op
from moe_lab.study.timing import measure_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")


def forward(inputs, ids_TK=None):
    ids_TK = inputs.expert_ids_TK if ids_TK is None else ids_TK
    return fused_experts(inputs.x_TD, inputs.gates_TK, ids_TK, inputs.w1_EFD, inputs.w2_EDF, inputs.w3_EFD)


def with_grad(inputs):
    leaves = {name: t.requires_grad_() for name, t in inputs._asdict().items() if t.is_floating_point()}
    return inputs, list(leaves.values())


def step(inputs, leaves, grad):
    out = forward(inputs)
    return (out, *torch.autograd.grad(out, leaves, grad))


@pytest.fixture
def small():
    config = LAYERS["10B_2B"].replace(dim=520, hidden_dim=328)
    inputs, leaves = with_grad(make_inputs(config, 700, CUDA, torch.bfloat16))
    return inputs, leaves, torch.randn_like(inputs.x_TD)


def test_nothing_waits_for_the_device(small):
    step(*small)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*small)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_hundred_repeats_agree_to_the_bit(small):
    first = step(*small)
    for _ in range(100):
        for a, b in zip(first, step(*small)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layer", ["10B_2B", "fine"])
def test_tiles_of_every_height_give_the_same_bits(layer, monkeypatch):
    inputs, leaves = with_grad(make_inputs(LAYERS[layer], 200, CUDA, torch.bfloat16))
    grad, first = torch.randn_like(inputs.x_TD), None
    for height in tiles.HEIGHTS:
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "HEIGHTS", (height,))
            got = step(inputs, leaves, grad)
            with torch.no_grad():
                assert torch.equal(forward(inputs), got[0])
        first = got if first is None else first
        for a, b in zip(first, got):
            assert torch.equal(a, b), height


@pytest.mark.parametrize("layer", ["10B_2B", "fine"])
def test_a_token_has_the_same_bits_in_a_batch_of_any_size(layer):
    inputs = make_inputs(LAYERS[layer], 4096, CUDA, torch.bfloat16)
    whole = forward(inputs)
    for tokens in (1, 7, 64, 250, 700, 1500, 3000):
        part = inputs._replace(x_TD=inputs.x_TD[:tokens], gates_TK=inputs.gates_TK[:tokens])
        assert torch.equal(forward(part, inputs.expert_ids_TK[:tokens]), whole[:tokens]), tokens


def test_a_graph_replays_new_inputs(small):
    inputs, *_ = small
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(*small)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*small)
    with torch.no_grad():
        inputs.x_TD.normal_()
        inputs.expert_ids_TK.copy_(inputs.expert_ids_TK.flip(0))
    graph.replay()
    for a, b in zip(captured, step(*small)):
        assert torch.equal(a, b)


def test_one_graph_whatever_the_routing(small):
    inputs, leaves, grad = small
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    for ids_TK in (inputs.expert_ids_TK, inputs.expert_ids_TK.flip(0)):
        out, eager = compiled(inputs, ids_TK), forward(inputs, ids_TK)
        assert torch.equal(out, eager)
        for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(eager, leaves, grad)):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_inductor_compiles_one_graph_with_the_same_bits(small):
    inputs, leaves, grad = small
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)
    for ids_TK in (inputs.expert_ids_TK, inputs.expert_ids_TK.flip(0)):
        out, eager = compiled(inputs, ids_TK), forward(inputs, ids_TK)
        assert torch.equal(out, eager)
        for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(eager, leaves, grad)):
            assert torch.equal(a, b)


def test_inductor_compiles_a_layer_with_its_router():
    script = Path(__file__).parent / "cuda_compile.py"
    path = os.pathsep.join([str(script.parent.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_opcheck_with_ahead_of_time_dispatch(small):
    """All of opcheck. An expert an assignment, so that every tile is used: rows of unused ones hold anything."""
    x, gates, _, w1, w2, w3 = (t.detach().clone().requires_grad_(t.is_floating_point()) for t in small[0])
    ids = torch.arange(12, device=CUDA).reshape(4, 3)
    x, gates = (t[:4].detach().clone().requires_grad_() for t in (x, gates))
    rows = tile_rows(ids, len(w1))
    torch.library.opcheck(tile_rows_op, (ids, len(w1), 16))
    torch.library.opcheck(fused.fused_forward, tuple(t.detach() for t in (x, gates, ids, w1, w2, w3)))
    anchor = torch.zeros_like(fused.fused_anchor(x, w1, *rows)).requires_grad_()
    for given in (None, anchor):
        torch.library.opcheck(fused.fused_up, (x, w1, w3, given, *rows))
    *products, hidden = fused.fused_up(x, w1, w3, None, *rows)
    args = (*(p.detach().requires_grad_() for p in products), hidden.detach(), gates, w2, *rows)
    torch.library.opcheck(fused.fused_down, args)


def test_decoding_is_timed_by_launches_and_replayed(monkeypatch):
    monkeypatch.setattr(decode_bench, "BLOCK_MS", 5.0)
    monkeypatch.setattr(decode_bench, "PEERS", ())
    rows = list(decode_bench.rows_of("fine", 4, CUDA, "bfloat16", 2))
    modes = {(row.arm, row.mode) for row in rows if row.bytes_ms is not None}
    assert modes == {(arm, mode) for arm in ("fused", "grouped") for mode in ("eager", "graph")}


EXTREMES = [(16, 1024, 16), (1000, 3, 1), (1, 8, 8), (0, 8, 2), *((150, 16, k) for k in range(1, 17))]


@pytest.mark.parametrize("gather_once", [0, 10**9], ids=["gathered before", "gathered inside"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), EXTREMES)
def test_extremes_agree_with_the_loop(tokens, experts, top_k, gather_once, monkeypatch):
    monkeypatch.setattr(grouped_gemm, "GATHER_ONCE", gather_once)
    config = LAYERS["10B_2B"].replace(dim=136, hidden_dim=72, num_experts=experts, top_k=top_k)
    inputs = make_inputs(config, tokens, CUDA, torch.bfloat16)
    exact_inputs = inputs._replace(**{k: t.double() for k, t in inputs._asdict().items() if t.is_floating_point()})
    outs = []
    for kind, which in (("fused", inputs), ("loop", inputs), ("loop", exact_inputs)):
        arm = ours(which, kind)
        x, gates = which.x_TD.clone().requires_grad_(), which.gates_TK.clone().requires_grad_()
        out = arm.run(x, gates)
        outs.append((out.detach(), *torch.autograd.grad(out.sum(), (x, gates, *arm.weights))))
    for got, low, exact in zip(*outs):
        own = (low.double() - exact).norm()
        assert (got.double() - exact).norm() <= 2 * own + 1e-6 * exact.norm()


def test_rows_beyond_two_to_the_31_values():
    config = LAYERS["fine"].replace(dim=64, hidden_dim=16384, num_experts=4, top_k=4)
    inputs, leaves = with_grad(make_inputs(config, 34000, CUDA, torch.bfloat16))
    assert 34000 * 4 * 16384 > 2**31
    out = forward(inputs)
    grads = torch.autograd.grad(out, leaves[:2], torch.ones_like(out))
    last = inputs._replace(x_TD=inputs.x_TD[-5:], gates_TK=inputs.gates_TK[-5:])
    same = forward(last, inputs.expert_ids_TK[-5:])
    assert torch.equal(out[-5:], same), "the same tokens alone give the same bits"
    for a, b in zip(grads, torch.autograd.grad(same, (last.x_TD, last.gates_TK), torch.ones_like(same))):
        assert torch.equal(a[-5:], b)


@pytest.mark.parametrize("layer", ["10B_2B", "olmoe_1b_7b", "mixtral_8x7b", "fine"])
def test_memory_beside_transformers(layer):
    inputs = make_inputs(LAYERS[layer], default_tokens(layer), CUDA, torch.bfloat16)
    grad = torch.randn_like(inputs.x_TD)
    measured = []
    for make in (lambda i: ours(i, "fused"), transformers):
        arm = make(inputs)

        def run(arm=arm):
            return arm.run(inputs.x_TD.detach().requires_grad_(), inputs.gates_TK.detach().requires_grad_())

        run().backward(grad)
        for weight in arm.weights:
            weight.grad = None
        memory = measure_memory(run, lambda out: out.backward(grad))
        measured.append((memory.saved, memory.peak - sum(w.nbytes for w in arm.weights)))
        for weight in arm.weights:
            weight.grad = None
    (saved, peak), (their_saved, their_peak) = measured
    assert saved <= 0.5 * their_saved
    assert peak <= 0.75 * their_peak
