import threading

import pytest
import torch

from moe_lab.kernels import crew

pytestmark = pytest.mark.usefixtures("two_threads")


def test_every_piece_is_done_once_by_threads_that_compute_alone():
    met, done, threads = threading.Barrier(2), [], set()

    def work(mine):
        met.wait(timeout=20)  # both are here
        for piece in mine:
            done.append(piece)
            threads.add(threading.get_native_id())

    crew.share(work, range(50))
    assert sorted(done) == list(range(50))
    assert crew.can_share()
    assert torch.get_num_threads() == 2


def test_autograd_does_not_record_in_any_thread():
    seen = []
    weight = torch.nn.Parameter(torch.ones(4, 4))
    out = [torch.empty(4, 4) for _ in range(8)]

    def work(mine):
        for piece in mine:
            torch.mm(weight, weight, out=out[piece])  # refused where autograd records
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    crew.share(work, range(8))
    assert seen == [(False, False)] * 8
    with torch.inference_mode():
        out[:] = [torch.empty(4, 4) for _ in range(8)]
        crew.share(work, range(8))
    assert seen[8:] == [(False, True)] * 8


def test_an_error_in_a_thread_is_raised_and_ends_the_others():
    def work(mine):
        for piece in mine:
            if piece == 3:
                raise KeyError(piece)

    with pytest.raises(KeyError, match="3"):
        crew.share(work, range(1000))
    done = []
    crew.share(done.extend, range(4))
    assert sorted(done) == [0, 1, 2, 3]


@pytest.mark.parametrize("missing", [True, False])
def test_without_gnu_openmp_or_with_one_thread_this_thread_does_it_alone(monkeypatch, missing):
    if missing:
        monkeypatch.setattr(crew, "_parallel", None)
    else:
        torch.set_num_threads(1)
    threads = set()
    crew.share(lambda mine: threads.update((threading.get_ident(), piece) for piece in mine), range(3))
    assert threads == {(threading.get_ident(), piece) for piece in range(3)}
    assert not crew.can_share()


def test_products_in_a_region_have_the_bits_of_one_thread():
    a, b = torch.randn(300, 64), torch.randn(64, 96)
    out = [torch.empty(300, 96) for _ in range(6)]

    def work(mine):
        for piece in mine:
            torch.mm(a, b, out=out[piece])

    crew.share(work, range(6))
    torch.set_num_threads(1)
    alone = a @ b
    assert all(torch.equal(product, alone) for product in out)
