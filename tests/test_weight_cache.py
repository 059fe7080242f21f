import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from moe_lab import GroupedExperts, fastpaths

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


CHANGES = {
    "in place": lambda e: e.w1_EFD.detach().add_(1),
    "optimizer": lambda e: torch.nn.init.normal_(e.w3_EFD),
    "load_state_dict": lambda e: e.load_state_dict({k: v + 1 for k, v in e.state_dict().items()}),
    "assigned": lambda e: e.load_state_dict({k: v + 1 for k, v in e.state_dict().items()}, assign=True),
    "swap": lambda e: setattr(e, "w1_EFD", torch.nn.Parameter(torch.ones(3, 8, 16))),
    "data swap": lambda e: setattr(e.w1_EFD, "data", torch.ones(3, 8, 16)),
    "there and back": lambda e: e.double().float(),
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


def test_only_what_changed_is_made_again(experts, x_RD):
    run(experts, x_RD)
    with torch.no_grad():
        experts.w2_EDF.mul_(2)
    with fastpaths.record() as record, torch.no_grad():
        experts(x_RD, ENDS)
    assert record.entries["cached_w2_t_miss"].reasons == {"written in place": 1}
    assert record.count("cached_w13_hit") == 1


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


def test_no_dead_layer_is_kept_alive(x_RD):
    experts = GroupedExperts(16, 8, 3, backend="batched")
    run(experts, x_RD)
    kept = [weakref.ref(entry.copy) for entry in experts.cache._kept.values()] + [weakref.ref(experts.w1_EFD)]
    del experts
    gc.collect()
    assert [ref() for ref in kept] == [None, None, None]


def test_threads_see_their_own_weights(experts, x_RD):
    expected, outs = fresh(experts, x_RD), []
    threads = [threading.Thread(target=lambda: outs.append(run(experts, x_RD)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 8
    for out in outs:
        torch.testing.assert_close(out, expected)


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
