import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moe_lab import GroupedExperts, fastpaths
from moe_lab.layer.weight_cache import WeightCache, refuse

ROWS, ENDS = 12, torch.tensor([4, 8, 12], dtype=torch.int32)


@pytest.fixture
def experts():
    return GroupedExperts(16, 8, 3, backend="batched")


@pytest.fixture
def x_RD():
    return torch.randn(ROWS, 16)


@torch.no_grad()
def run(experts, x_RD):
    """Output, and which of (w13, w2_t) were found again."""
    with fastpaths.record() as record:
        out_RD = experts(x_RD, ENDS)
    return out_RD, tuple(record.count(f"cached_{name}_hit") for name in ("w13", "w2_t"))


def fresh(experts, x_RD):
    loop = GroupedExperts(16, 8, 3, backend="loop").to(x_RD.dtype)
    with torch.no_grad():
        for mine, theirs in zip(loop.parameters(), experts.parameters()):
            mine.copy_(theirs)
        return loop(x_RD, ENDS)


def in_threads(*work):
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_copies_are_found_again_and_counted(experts, x_RD):
    first, hits = run(experts, x_RD)
    assert hits == (0, 0)
    again, hits = run(experts, x_RD)
    assert hits == (1, 1)
    assert torch.equal(first, again)
    assert experts.cache.num_bytes == 3 * 16 * 8 * 3 * 4  # w13 and w2_t: as many bytes as the weights
    experts.drop_caches()
    assert experts.cache.num_bytes == 0
    assert run(experts, x_RD)[1] == (0, 0)


def step(optimizer):
    """The parameters of an optimizer moved by one step, and its gradients gone."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def in_no_grad(write):
    return lambda e: torch.no_grad()(write)(e.w1_EFD)


def swapped(change):
    """A change of the module in which PyTorch swaps tensors instead of giving parameters other data."""

    def run(experts):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            change(experts)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return run


def added(experts, **how):
    experts.load_state_dict({k: v + 1 for k, v in experts.state_dict().items()}, **how)


def emptied_and_loaded(experts):
    state = experts.state_dict()
    experts.to("meta").to_empty(device="cpu").load_state_dict({k: v + 1 for k, v in state.items()})


def halves(experts):
    """The parameter's data is the second half of what its storage holds; it was the first."""
    both = torch.arange(2.0 * experts.w1_EFD.numel()).view(2, *experts.w1_EFD.shape) / 100
    experts.w1_EFD.data = both[0]
    run(experts, torch.ones(ROWS, 16))
    experts.w1_EFD.data = both[1]


@torch.no_grad()
def replaced_in_its_own_memory(experts):
    """Another parameter over the same memory, written as often as the first."""
    version = experts.w1_EFD._version
    experts.w1_EFD = torch.nn.Parameter(experts.w1_EFD.data)
    while experts.w1_EFD._version < version:
        experts.w1_EFD.mul_(2)


CHANGES = {
    "in place": lambda e: e.w1_EFD.detach().add_(1),
    "in place, no_grad": in_no_grad(lambda w: w.mul_(3)),
    "in place, inference": torch.inference_mode()(lambda e: e.w1_EFD.mul_(3)),
    "one element": in_no_grad(lambda w: w[2, 7].fill_(5.0)),
    "out=": in_no_grad(lambda w: torch.add(w, 1, out=w)),
    "init": lambda e: torch.nn.init.normal_(e.w3_EFD),
    "sgd": lambda e: step(torch.optim.SGD(e.parameters(), lr=1.0)),
    "adamw, foreach": lambda e: step(torch.optim.AdamW(e.parameters(), lr=1.0, foreach=True)),
    "adamw, fused": lambda e: step(torch.optim.AdamW(e.parameters(), lr=1.0, fused=True)),  # without a new version
    "sgd, fused": lambda e: step(torch.optim.SGD(e.parameters(), lr=1.0, fused=True)),
    "load_state_dict": added,
    "assigned": lambda e: added(e, assign=True),
    "loaded by swapping": swapped(added),
    "swap": lambda e: setattr(e, "w1_EFD", torch.nn.Parameter(torch.ones(3, 8, 16))),
    "replaced in its own memory": replaced_in_its_own_memory,
    "data swap": lambda e: setattr(e.w1_EFD, "data", torch.ones(3, 8, 16)),
    "data elsewhere in the same memory": halves,
    "data in another order": lambda e: setattr(e.w1_EFD, "data", e.w1_EFD.data.as_strided((3, 8, 16), (128, 1, 8))),
    "vector_to_parameters": lambda e: torch.nn.utils.vector_to_parameters(torch.ones(3 * 3 * 8 * 16), e.parameters()),
    "there and back": lambda e: e.double().float(),
    "there and back by swapping": swapped(lambda e: (e.double().float(), e.reset_parameters())),
    "over meta": emptied_and_loaded,
    "reset": lambda e: e.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_change_of_weights_is_missed(experts, x_RD, change):
    run(experts, x_RD)
    change(experts)
    out_RD, hits = run(experts, x_RD)
    assert hits[0] == 0
    torch.testing.assert_close(out_RD, fresh(experts, x_RD))


def test_new_memory_at_the_same_address_is_not_taken_for_the_old(experts, x_RD):
    memory = bytearray(3 * 8 * 16 * 4)
    for value in (1.0, 2.0):
        weight = torch.frombuffer(memory, dtype=torch.float32).view(3, 8, 16)
        weight.fill_(value)
        experts.w1_EFD.data = weight  # a version counter stays with its parameter, not with the memory
        out_RD, hits = run(experts, x_RD)
        assert hits[0] == 0
        torch.testing.assert_close(out_RD, fresh(experts, x_RD))


def test_weights_in_another_dtype_are_another_copy(experts, x_RD):
    run(experts, x_RD)
    out_RD, hits = run(experts.bfloat16(), x_RD.bfloat16())
    assert hits == (0, 0)
    assert out_RD.dtype == torch.bfloat16
    torch.testing.assert_close(out_RD, fresh(experts, x_RD.bfloat16()))
    assert experts.cache.num_bytes == 3 * 16 * 8 * 3 * 2


def test_a_tensor_that_a_copy_was_made_of_is_not_swapped_under_its_name(experts, x_RD):
    """PyTorch refuses to swap what is weakly held; the module's own conversions let it go before."""
    run(experts, x_RD)
    other = torch.nn.Parameter(torch.ones(3, 8, 16))
    with pytest.raises(RuntimeError, match="weakref"):
        torch.utils.swap_tensors(experts.w1_EFD, other)
    experts.drop_caches()
    torch.utils.swap_tensors(experts.w1_EFD, other)
    torch.testing.assert_close(run(experts, x_RD)[0], fresh(experts, x_RD))


def test_copies_made_in_inference_serve_outside_of_it_and_frozen_weights_with_gradients_on(experts, x_RD):
    with torch.inference_mode():
        run(experts, x_RD)
    assert run(experts, x_RD)[1] == (1, 1)
    experts.requires_grad_(False)
    with fastpaths.record() as record:
        out_RD = experts(x_RD, ENDS)
    assert record.count("cached_w13_hit") == record.count("cached_w2_t_hit") == 1
    torch.testing.assert_close(out_RD, fresh(experts, x_RD))


def test_only_what_changed_is_made_again(experts, x_RD):
    run(experts, x_RD)
    with torch.no_grad():
        experts.w2_EDF.mul_(2)
    with fastpaths.record() as record, torch.no_grad():
        experts(x_RD, ENDS)
    assert record.entries["cached_w2_t_miss"].reasons == {"written in place": 1}
    assert record.count("cached_w13_hit") == 1
    step(
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    )  # whose ever: which weights it wrote is not known
    with fastpaths.record() as record, torch.no_grad():
        experts(x_RD, ENDS)
    assert record.entries["cached_w13_miss"].reasons == {"an optimizer has stepped": 1}


def test_a_write_through_data_is_seen_under_debug_contracts_only(experts, x_RD, monkeypatch):
    run(experts, x_RD)
    experts.w1_EFD.data.add_(1)
    assert run(experts, x_RD)[1] == (1, 1)  # stale, as documented
    monkeypatch.setenv("MOE_LAB_DEBUG_CONTRACTS", "1")
    with pytest.raises(ValueError, match=r"^the kept w13 differs from its weights: .*drop_caches"):
        run(experts, x_RD)
    experts.drop_caches()
    torch.testing.assert_close(run(experts, x_RD)[0], fresh(experts, x_RD))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["deepcopy", "pickle"])
def test_a_copied_layer_starts_without_copies(experts, x_RD, copied):
    run(experts, x_RD)
    other = copied(experts)
    assert other.cache.num_bytes == 0
    other.w1_EFD.detach().zero_()
    assert run(other, x_RD)[0].abs().max() == 0
    assert run(experts, x_RD)[1] == (1, 1)


def reasons(experts, x_RD):
    with fastpaths.record() as record, torch.no_grad():
        experts(x_RD, ENDS)
    assert experts.cache.num_bytes == 0
    return set(record.entries["cached_w13_miss"].reasons)


def test_what_has_no_version_is_not_kept(experts, x_RD):
    with torch.inference_mode():
        frozen = GroupedExperts(16, 8, 3, backend="batched")
    assert reasons(frozen, x_RD) == {"not kept: an inference tensor, which has no version"}
    assert reasons(experts, x_RD.double()) == {"not kept: not a parameter but made from one, new each time"}
    experts._is_fsdp_managed_module = True
    assert reasons(experts, x_RD) == {"not kept: under FSDP, which refills weights without a new version"}


def test_each_refusal_has_its_reason(monkeypatch):
    weight = torch.nn.Parameter(torch.ones(2))
    assert refuse(weight) == "a gradient flows to the weights"
    with torch.no_grad():
        assert refuse(weight) is None
        assert refuse(weight * 1) == "not a parameter but made from one, new each time"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            spread = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))
        finally:
            dist.destroy_process_group()
        assert refuse(torch.nn.Parameter(spread)) == "a DTensor, which unsharding refills without a new version"
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert refuse(weight) == "compiling: versions are not known"


@torch.no_grad()
def test_a_write_while_a_copy_is_made_is_not_missed():
    cache, weight = WeightCache(), torch.nn.Parameter(torch.zeros(2))

    def build():
        copy = weight.clone()
        if not copy.any():
            weight.add_(1)
        return copy

    assert cache.get("w13", (weight,), build).tolist() == [0, 0]
    assert cache.get("w13", (weight,), build).tolist() == [1, 1]


def test_threads_that_come_at_once_make_one_copy():
    cache, weight, built, barrier = WeightCache(), torch.nn.Parameter(torch.zeros(2)), [], threading.Barrier(8)

    def build():
        built.append(time.sleep(0.01))
        return weight.clone()

    @torch.no_grad()
    def work():
        barrier.wait()
        cache.get("w13", (weight,), build)

    in_threads(*[work] * 8)
    assert len(built) == 1


def test_no_dead_layer_is_kept_alive(x_RD):
    experts = GroupedExperts(16, 8, 3, backend="batched")
    run(experts, x_RD)
    kept = [weakref.ref(entry.copy) for entry in experts.cache._kept.values()] + [weakref.ref(experts.w1_EFD)]
    del experts
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]


def test_a_weight_that_was_replaced_is_not_kept_alive(experts, x_RD):
    run(experts, x_RD)
    old, storage = weakref.ref(experts.w1_EFD), StorageWeakRef(experts.w1_EFD.untyped_storage())
    experts.w1_EFD = torch.nn.Parameter(torch.ones(3, 8, 16))
    assert old() is None
    assert storage.expired()


def test_threads_see_what_one_of_them_writes(experts, x_RD):
    """One writes between forwards of its own, the others run on and drop copies."""
    right = []

    @torch.no_grad()
    def write():
        for _ in range(10):
            experts.w1_EFD.mul_(-1)
            right.append(torch.allclose(run(experts, x_RD)[0], fresh(experts, x_RD), atol=1e-6))

    def drop():
        for _ in range(10):
            run(experts, x_RD)
            experts.drop_caches()

    in_threads(write, drop, drop, lambda: [run(experts, x_RD) for _ in range(10)])
    assert right == [True] * 10
    torch.testing.assert_close(run(experts, x_RD)[0], fresh(experts, x_RD))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4, 5, 3], "counts differ: expert 1 has 5, mean 4"),
        ([0, 0, 0], "expert 0 has 0 rows: every expert needs some"),
    ],
)
def test_unequal_and_empty_counts_are_refused(experts, counts, message):
    with torch.no_grad(), pytest.raises(ValueError, match=f"^backend='batched' is not legal, {message}$"):
        experts(torch.zeros(sum(counts), 16), torch.tensor(counts).cumsum(0).int())


def test_a_gradient_is_refused(experts, x_RD):
    with pytest.raises(ValueError, match=r"a gradient flows: use torch\.no_grad"):
        experts(x_RD, ENDS)
