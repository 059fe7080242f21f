import pytest
import rank_jobs  # noqa: F401  (the folder is on the path)
import torch
from exchange_jobs import (
    balance,
    by_policy,
    on_dirty_memory,
    overlap_order,
    run_cases,
    traffic,
    traffic_both_ways,
    wire_with,
)

from moe_lab import MoE, MoEConfig, RouterConfig
from moe_lab.layer.all_to_all import AllToAllTokenDispatcher
from moe_lab.layer.placement import Placement
from moe_lab.parallel import RankPool, VirtualRanks, wire
from moe_lab.study import traffic as study_traffic
from moe_lab.study.batches import count_matrix
from moe_lab.study.padding import overhead
from parallel_cases import check, draw, one_rank, virtual

SEEDS = range(12)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pool():
    with RankPool(4, backend="gloo") as pool:
        yield pool


@pytest.mark.parametrize("collectives", ["functional", "c10d"])
@pytest.mark.parametrize("ep", [2, 4])
def test_real_ranks_equal_virtual_ranks_to_the_bit_and_the_one_rank_layer(pool, ep, collectives):
    by_rank = pool.run(run_cases, list(SEEDS), ep, collectives)[:ep]
    for seed, real in zip(SEEDS, zip(*by_rank)):
        case = draw(seed, (ep,))
        each, weights = virtual(case, VirtualRanks(case.build(), ep, **case.options))
        expected = one_rank(case)
        for name in ("out", "x", "gates"):
            for got, same in zip(real, each):
                assert torch.equal(got[name], same[name]), f"{case}: {name}"
            got, exact = (torch.cat([r[name].flatten() for r in results]) for results in (real, expected))
            check(got, [exact], f"{case}: {name}")
        for name, grad in weights.items():
            if name.startswith("experts") and case.placement is None:
                assert torch.equal(torch.cat([got[name] for got in real]), grad), f"{case}: {name}"
            elif name.startswith("experts") and case.placement is not None:
                # a rank has the gradients of its own slots: those of an expert's replicas add up to the expert's
                slots = torch.tensor(case.placement.expert_of_slot)
                by_slot = torch.cat([got[name] for got in real])
                summed = torch.zeros_like(expected[0][name]).index_add_(0, slots, by_slot)
                check(summed, [exact[name] for exact in expected], f"{case}: {name}")
            elif not name.startswith("experts"):
                check(sum(got[name] for got in real), [exact[name] for exact in expected], f"{case}: {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_has_the_same_bits_too(pool, dtype):
    seeds = [seed for seed in range(30) if draw(seed, (4,)).placement is None][:4]
    for seed, real in zip(seeds, zip(*pool.run(run_cases, seeds, 4, "functional", dtype=dtype))):
        case = draw(seed, (4,))
        each, weights = virtual(case, VirtualRanks(case.build(dtype), 4, **case.options), dtype)
        for got, same in zip(real, each):
            for name in same:
                assert torch.equal(got[name], same[name]), f"{case}: {name}"
        for name in weights:
            if name.startswith("experts"):
                assert torch.equal(torch.cat([got[name] for got in real]), weights[name]), f"{case}: {name}"


def test_one_dispatcher_runs_under_both():
    ranks = VirtualRanks(MoE(MoEConfig(dim=4, hidden_dim=4, num_experts=4, top_k=1)), 2)
    assert {type(dispatcher) for dispatcher in ranks.dispatchers} == {AllToAllTokenDispatcher}
    # `wire` makes the same class; `dispatch` and `combine` only finish the programs that lock step advances.
    for plain, program in (("dispatch", "dispatching"), ("combine", "combining")):
        assert program in getattr(AllToAllTokenDispatcher, plain).__wrapped__.__code__.co_names


@pytest.mark.parametrize("collectives", ["functional", "c10d"])
def test_nan_in_uninitialised_memory_never_leaks(pool, collectives):
    for seed in (1, 2, 3):
        assert pool.run(on_dirty_memory, seed, collectives) == [[]] * 4


def test_counted_bytes_are_those_of_the_plans(pool):
    for ep in (2, 4):
        by_rank = pool.run(traffic, list(SEEDS), ep)[:ep]
        for seed, sent in zip(SEEDS, zip(*by_rank)):
            case = draw(seed, (ep,))
            ranks = VirtualRanks(case.build(), ep, **case.options)
            with torch.no_grad():
                ranks([x.view(-1, case.config.dim) for x, _ in case.inputs()])
            for plan, (dispatch, combine) in zip(ranks.plans, sent):
                even = [getattr(plan.splits, "size", None)] * ep
                assert list(dispatch.rows_R) == (plan.send_splits or even)
                assert list(combine.rows_R) == (plan.receive_splits or even)
                assert dispatch.row_bytes == case.config.dim * 8


ROUND_ROBIN = {"router": RouterConfig(force_load_balance="round_robin")}
PREDICTED = [  # policy and settings of the study; settings of the layer, and of its wiring
    ("none", {}, {}, {}),
    ("equal_split", {}, {"equal_split": "force"}, {}),
    *(
        ("adaptive", {"threshold": t}, {"equal_split": "adaptive", "equal_split_threshold": t}, {})
        for t in (0.0, 0.1, 9.0)
    ),
    *(("multiple", {"multiple": n}, {"pad_multiple": n}, {}) for n in (8, 16, 32)),
    *(("drop", {"capacity_factor": f}, {"capacity_factor": f}, {}) for f in (0.5, 1.0, 1.25)),
    ("padded_bmm", {}, {"backend": "padded"}, {}),
    ("forced_balance", {}, ROUND_ROBIN, {}),
]


@pytest.mark.parametrize("tokens", [(9, 1, 12, 5), (12, 12, 12, 12)], ids=["uneven", "even"])
def test_what_is_predicted_from_counts_is_what_real_ranks_exchange(pool, tokens):
    cases = PREDICTED + [("forced_balance", {}, ROUND_ROBIN, {"tokens_per_rank": 12})] * (len(set(tokens)) == 1)
    counted = list(zip(*pool.run(by_policy, [(layer, wiring) for *_, layer, wiring in cases], tokens)))
    placement = Placement.blockwise(8, 4)
    counts = count_matrix([torch.as_tensor(ids_TK) for ids_TK, *_ in counted[0]], placement)
    zeros, dropped = set(), set()
    for (policy, how, *_), by_rank in zip(cases, counted):
        predicted = overhead(counts, policy, **how)
        for rank, (ids_TK, sent, expert_rows) in enumerate(by_rank):
            (dispatch, row_bytes), (combine, _), *gradients = sent
            real = predicted.sent_R[rank] + predicted.rows_R[rank]
            assert sum(dispatch) + sum(combine) == real + predicted.exchange_zeros_R[rank], (policy, how, rank)
            assert [rows for rows, _ in gradients] == [dispatch, combine]
            assert row_bytes == 8 * 4
            assert predicted.sent_R[rank] + predicted.dropped_R[rank] == ids_TK.size
            if policy != "padded_bmm":  # whose zeros are made inside the experts
                assert expert_rows == predicted.rows_R[rank] + predicted.expert_zeros_R[rank], (policy, how, rank)
            if policy in ("none", "forced_balance"):
                ids = [torch.as_tensor(ids_TK) for ids_TK, *_ in by_rank]
                leaving = study_traffic.traffic(ids, placement).per_assignment_R[rank]
                assert sum(dispatch) - dispatch[rank] == leaving
        zeros.add((policy, sum(predicted.exchange_zeros_R) > 0))
        dropped.add(sum(predicted.dropped_R) > 0)
    assert {("equal_split", True), ("adaptive", True), ("adaptive", False), ("none", False)} <= zeros
    assert dropped == {True, False}


def test_gradients_are_counted_on_their_way_back(pool):
    seed = next(s for s in range(99) if draw(s, (4,)).config.equal_split == "off" and all(draw(s, (4,)).tokens))
    for sent, there, back in pool.run(traffic_both_ways, seed):
        assert sent == [there, back, there, back]  # dispatch, combine; gradients of combine, then of dispatch
    case = draw(seed, (4,))
    ranks = VirtualRanks(case.build(), 4, **case.options)
    with ranks.mesh.exchanges[1].log.watch() as sent:
        outs = ranks([x.view(-1, case.config.dim).requires_grad_() for x, _ in case.inputs()])
        sum(out.sum() for out in outs).backward()
    plan = ranks.plans[1]
    assert [list(one.rows_R) for one in sent] == [plan.send_splits, plan.receive_splits] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {3: {"equal_split": "force"}},
            "equal_split differs across the mesh: 'off' on ranks [0, 1, 2], 'force' on ranks [3] (differing: "
            "equal_split)",
        ),
        (
            {0: {"top_k": 3, "dim": 16}},
            "dim differs across the mesh: 16 on ranks [0], 8 on ranks [1, 2, 3] (differing: dim, top_k)",
        ),
        ({r: {"num_experts": 6} for r in range(4)}, "num_experts=6 cannot be spread over ep=4 ranks"),
        ({2: {"num_experts": 6}}, "num_experts differs across the mesh: 12 on ranks [0, 1, 3], 6 on ranks [2]"),
        ({}, None),
    ],
    ids=["one_field", "two_fields", "indivisible", "indivisible_on_one", "equal"],
)
def test_every_rank_raises_the_same_error(pool, changes, message):
    errors = pool.run(wire_with, changes, {}, timeout=5.0)
    assert len(set(errors)) == 1
    assert errors[0] is None if message is None else errors[0].startswith(message)


def test_options_are_compared_too(pool):
    errors = pool.run(wire_with, {}, {1: {"tokens_per_rank": 4}}, timeout=5.0)
    expected = "tokens_per_rank differs across the mesh: None on ranks [0, 2, 3], 4 on ranks [1]"
    assert errors == [f"{expected} (differing: tokens_per_rank)"] * 4


def test_all_ranks_take_the_same_step_of_balancing(pool):
    results = pool.run(balance)
    total_E = torch.tensor([own for own, _ in results]).sum(dim=0)
    assert total_E.sum() == 4 * 7
    moe = MoE(MoEConfig(dim=8, hidden_dim=8, num_experts=4, top_k=1, load_balance_coeff=0.1))
    moe.tokens_per_expert_E.copy_(total_E)
    moe.update_expert_bias()
    for _, bias in results:
        assert bias == moe.expert_bias_E.tolist()


def test_shared_experts_run_while_rows_travel_forward_and_backward(pool):
    for forward, backward in pool.run(overlap_order):
        assert forward == ["start", "wait", "start, others run", "shared", "wait"]
        assert backward == ["start, others run", "shared", "wait", "start", "wait"]


def test_no_mesh_leaves_the_layer_local(layer_config):
    moe = MoE(layer_config())
    dispatcher = moe.dispatcher
    assert wire(moe, None) is moe
    assert moe.dispatcher is dispatcher
