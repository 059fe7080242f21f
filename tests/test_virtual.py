import pytest
import torch

from moe_lab import MoE, fastpaths
from moe_lab.layer.placement import Placement
from moe_lab.layer.splits import EqualSplits
from moe_lab.parallel import VirtualRanks
from moe_lab.parallel.virtual import VirtualMesh, lock_step
from parallel_cases import check, draw, one_rank, virtual


def compare_with_one_rank(case):
    expected = one_rank(case)
    ranks = VirtualRanks(case.build(), case.ep, **case.options)
    each, weights = virtual(case, ranks)
    for name in ("out", "x", "gates"):
        got, exact = (torch.cat([result[name].flatten() for result in results]) for results in (each, expected))
        check(got, [exact], f"{case}, {name}")
    for name, grad in weights.items():
        check(grad, [exact[name] for exact in expected], f"{case}, {name}")
    return ranks


@pytest.mark.parametrize("part", range(8))
def test_random_layers_equal_the_one_rank_layer(part):
    """200 a run; a failure prints its seed and case."""
    for seed in range(part * 25, part * 25 + 25):
        compare_with_one_rank(draw(seed))


@pytest.mark.soak
@pytest.mark.parametrize("part", range(20))
def test_many_more_random_layers(part):
    for seed in range(1000 + part * 200, 1200 + part * 200):
        compare_with_one_rank(draw(seed))


def test_the_random_layers_take_every_path():
    cases = [draw(seed) for seed in range(200)]
    assert {case.ep for case in cases} == {2, 4, 8, 32}
    for field, values in {
        "reorder": {"auto", "index", "segment_cat", "equal_count"},
        "equal_split": {"off", "adaptive", "force"},
        "pad_multiple": {1, 8, 16, 32},
        "score_before_experts": {False, True},
    }.items():
        assert {getattr(case.config, field) for case in cases} == values
    with fastpaths.record() as record:
        for case in cases[:60]:
            with torch.no_grad():
                VirtualRanks(case.build(), case.ep, **case.options)([x for x, _ in case.inputs()])
    names = {name for name in fastpaths.NAMES if "equal" in name or "segment" in name or "force" in name}
    assert names <= record.entries.keys()


@pytest.mark.parametrize(
    "options", [{"equal_split": "force"}, {"pad_multiple": 8}, {"equal_split": "force", "pad_multiple": 8}]
)
def test_garbage_in_padding_never_leaks(layer_config, options, monkeypatch):
    """Padding is filled with NaN wherever it was written as zeros: nothing that is read may depend on it."""
    from moe_lab.layer.padding import RowPadding

    clean = RowPadding.pad
    config = layer_config(**options)
    moe, xs = MoE(config).double(), [torch.randn(t, 16, dtype=torch.float64) for t in (3, 0, 6, 5)]
    expected, poisoned = VirtualRanks(moe, 4)(xs), []

    def poison(self, rows):
        mask_P1 = (self.source_P < 0)[:, None]
        poisoned.append(int(mask_P1.sum()))
        return clean(self, rows).masked_fill(mask_P1, torch.nan)

    monkeypatch.setattr(RowPadding, "pad", poison)
    leaves = [x.requires_grad_() for x in xs]
    outs = VirtualRanks(moe, 4)(leaves)
    assert sum(poisoned) > 0
    for got, exact in zip(outs, expected):
        assert torch.equal(got, exact)
    # Through the experts, NaN rows would reach the weights' gradients: those of x and of the exchange stay clean.
    for grad in torch.autograd.grad(sum(out.sum() for out in outs), leaves):
        assert grad.isfinite().all()


def test_an_expert_without_rows_has_a_gradient_of_exactly_zero(layer_config):
    moe = MoE(layer_config(pad_multiple=8)).double()
    moe.expert_bias_E[[2, 5]] = -9.0
    outs = VirtualRanks(moe, 4)([torch.randn(6, 16, dtype=torch.float64) for _ in range(4)])
    sum(out.sum() for out in outs).backward()
    for weight in (moe.experts.w1_EFD, moe.experts.w2_EDF, moe.experts.w3_EFD):
        assert [e for e in range(8) if not weight.grad[e].any()] == [2, 5]


def test_counts_and_bias_are_those_of_all_ranks(layer_config):
    moe = MoE(layer_config(load_balance_coeff=0.1))
    ranks = VirtualRanks(moe, 4)
    ranks([torch.randn(5, 16) for _ in range(4)])
    assert moe.tokens_per_expert_E.sum() == 4 * 5 * 2
    assert torch.equal(moe.tokens_per_expert_E, sum(plan.counts_E for plan in ranks.plans))
    assert torch.equal(moe.tokens_per_expert_E, ranks.plans[0].counts.counts_RP.sum(dim=0))


def test_replicas_keep_logical_and_physical_counts(layer_config):
    placement = Placement(8, 3, (*range(8), 0))
    ranks = VirtualRanks(MoE(layer_config()), 3, placement=placement)
    ranks([torch.randn(30, 16) for _ in range(3)])
    for plan in ranks.plans:
        assert plan.local.counts_E.numel() == 9
        assert torch.equal(placement.logical_counts(plan.local.counts_E), plan.counts_E)


def test_the_kind_of_plan_is_one_on_all_ranks(layer_config):
    ranks = VirtualRanks(MoE(layer_config(equal_split="adaptive", equal_split_threshold=0.4)), 2)
    kinds = set()
    for _ in range(12):
        ranks([torch.randn(12, 16) for _ in range(2)])
        (kind,) = {type(plan.splits) for plan in ranks.plans}
        kinds.add(kind)
        assert len({plan.splits.reason for plan in ranks.plans}) == 1
    assert EqualSplits in kinds


def test_the_wrong_number_of_inputs_is_refused(layer_config):
    with pytest.raises(ValueError, match="3 inputs for ep=4 ranks: one a rank"):
        VirtualRanks(MoE(layer_config()), 4)([torch.zeros(1, 16)] * 3)


def test_tokens_other_than_declared_are_refused_before_anything_is_sent(layer_config):
    ranks = VirtualRanks(MoE(layer_config()), 2, tokens_per_rank=4)
    with pytest.raises(ValueError, match="this rank has 3 tokens: declared is tokens_per_rank=4"):
        ranks([torch.zeros(3, 16), torch.zeros(4, 16)])
    assert ranks.mesh.calls == []


def test_experts_that_do_not_divide_are_refused(layer_config):
    with pytest.raises(ValueError, match="num_experts=8 cannot be spread over ep=3 ranks"):
        VirtualRanks(MoE(layer_config()), 3)


def test_a_placement_for_another_mesh_is_refused(layer_config):
    with pytest.raises(ValueError, match="placement is for 8 experts on 2 ranks: must be for num_experts=8 on ep=4"):
        VirtualRanks(MoE(layer_config()), 4, placement=Placement.blockwise(8, 2))


def test_ranks_out_of_step_are_an_error_not_a_hang():
    mesh = VirtualMesh(2)

    def gathers(exchange):
        yield exchange.all_gather(torch.zeros(1))

    def returns(exchange):
        yield from ()

    with pytest.raises(RuntimeError, match=r"ranks \[0\] wait for an exchange that ranks \[1\] never enter"):
        lock_step([gathers(mesh.exchanges[0]), returns(mesh.exchanges[1])])
    with pytest.raises(RuntimeError, match=r"ranks \[1\] have not entered"):
        VirtualMesh(2).exchanges[0].all_reduce(torch.zeros(1)).wait()


def test_splits_that_ranks_disagree_on_are_an_error():
    mesh = VirtualMesh(2)

    def sends(rank, receive):
        yield mesh.exchanges[rank].all_to_all(torch.zeros(2, 1), [1, 1], receive)

    with pytest.raises(RuntimeError, match=r"rank 1 expects \[2, 0\] rows, sent are \[1, 1\]"):
        lock_step([sends(0, [1, 1]), sends(1, [2, 0])])


def test_known_forced_splits_run_direct(layer_config):
    from moe_lab import RouterConfig

    config = layer_config(num_experts=8, top_k=2, router=RouterConfig(force_load_balance="round_robin"))
    ranks = VirtualRanks(MoE(config), 4, tokens_per_rank=6)
    with fastpaths.record() as record:
        ranks([torch.randn(6, 16) for _ in range(4)])
    assert record.count("direct_equal_split_dispatch") == record.count("force_load_balance_dispatch") == 4
    assert ranks.plans[1].send_splits == [4, 4, 2, 2]  # 12 assignments: experts 0..3 get 2, others 1
