"""The routing sort against PyTorch: natively on a GPU, in the interpreter without one."""

import pytest
import torch

from moe_lab.kernels import sort
from moe_lab.kernels.tiles import HEIGHTS, TileRows, max_tiles, tile_height, tile_rows, tile_rows_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = TileRows._fields


def draw(num_tokens, top_k, num_experts, dropped=0.0):
    seeded = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(num_experts, (num_tokens, top_k), generator=seeded)
    return torch.where(torch.rand(num_tokens, top_k, generator=seeded) < dropped, -1, ids_TK)


@pytest.mark.parametrize(("few", "height"), [(2048, 16), (0, 16), (2048, 128), (0, 128)])
@pytest.mark.parametrize(
    "ids_TK",
    [
        draw(100, 3, 36),
        draw(100, 3, 36, dropped=0.3),
        draw(0, 2, 4),
        draw(1, 1, 1),
        draw(600, 1, 1),
        draw(20, 16, 1024),
        torch.full((5, 2), -1),
        torch.full((150, 2), 3),
    ],
    ids=lambda ids: f"{tuple(ids.shape)} up to {int(ids.max()) if ids.numel() else 'none'}",
)
def test_sort_equals_pytorch(ids_TK, few, height, monkeypatch):
    monkeypatch.setattr(sort, "FEW", few)
    num_experts = 1024 if ids_TK.shape[1] == 16 else 36
    got = sort.tile_rows(ids_TK.to(DEVICE), num_experts, height)
    for name, mine, theirs in zip(FIELDS, got, tile_rows_op(ids_TK, num_experts, height)):
        assert torch.equal(mine.cpu(), theirs), name


def test_known_layout():
    rows = tile_rows(torch.tensor([[2, 0], [-1, 2]]), 3)
    assert rows.height == 16
    assert rows.position_TK.tolist() == [[16, 0], [-1, 17]]
    assert rows.starts_E1.tolist() == [0, 16, 16, 32]
    assert rows.expert_M1.tolist() == [0, 2, -1, 2]
    assert rows.order_P[[0, 16, 17]].tolist() == [1, 0, 3]
    assert int((rows.order_P >= 0).sum()) == 3


def test_the_height_follows_from_the_rows_of_a_mean_expert():
    for rows, height in {0: 16, 1: 16, 12: 16, 13: 32, 24: 32, 25: 64, 48: 64, 49: 128, 1000: 128}.items():
        assert tile_height(rows * 128, 128) == height, rows


@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("counts", [[1] * 36, [0, 0, 1, 2], [16, 31], [128, 129], [1, 255], [0]], ids=str)
def test_the_bound_on_tiles_holds(counts, height):
    ids_N1 = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    rows = TileRows(*tile_rows_op(ids_N1, len(counts), height))
    assert rows.height == (height if sum(counts) else 0)
    used = sum(-(-c // height) for c in counts)
    assert int(rows.expert_M1[-1]) == used <= max_tiles(sum(counts), len(counts), height)


def test_opcheck():
    torch.library.opcheck(tile_rows_op, (draw(9, 2, 4, dropped=0.2).to(DEVICE), 4, 16))
