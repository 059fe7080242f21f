import threading

import torch

from moe_lab.kernels import workspace


def test_memory_is_used_again_and_given_back():
    workspace.drop()
    first = workspace.take(torch.empty(0), 6, 4)
    assert (first.shape, first.dtype) == ((6, 4), torch.float32)
    assert workspace.take(torch.empty(0, dtype=torch.bfloat16), 3, 5).data_ptr() == first.data_ptr()
    assert workspace.take(torch.empty(0, dtype=torch.float64), 6, 4).untyped_storage().nbytes() == 6 * 4 * 8
    workspace.drop()
    assert workspace.take(torch.empty(0), 1, 1).untyped_storage().nbytes() == 4


def test_threads_have_their_own():
    addresses = [workspace.take(torch.empty(0), 8, 8).data_ptr()]
    thread = threading.Thread(target=lambda: addresses.append(workspace.take(torch.empty(0), 8, 8).data_ptr()))
    thread.start()
    thread.join()
    assert len(set(addresses)) == 2


def test_what_inference_mode_took_is_written_to_outside():
    workspace.drop()
    with torch.inference_mode():
        workspace.take(torch.empty(0), 2, 2)
    assert workspace.take(torch.empty(0), 2, 2).fill_(3).sum() == 12


def test_without_rows():
    assert workspace.take(torch.empty(0), 0, 4).shape == (0, 4)
