"""The routing sort against PyTorch: natively on a GPU, in the interpreter without one."""

import pytest
import torch

from moe_lab.kernels import sort
from moe_lab.kernels.tiles import TILE, TileRows, max_tiles, tile_rows, tile_rows_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = TileRows._fields


def draw(num_tokens, top_k, num_experts, dropped=0.0):
    seeded = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(num_experts, (num_tokens, top_k), generator=seeded)
    return torch.where(torch.rand(num_tokens, top_k, generator=seeded) < dropped, -1, ids_TK)


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
def test_sort_equals_pytorch(ids_TK):
    num_experts = 1024 if ids_TK.shape[1] == 16 else 36
    got = sort.tile_rows(ids_TK.to(DEVICE), num_experts)
    for name, mine, theirs in zip(FIELDS, got, tile_rows_op(ids_TK, num_experts)):
        assert torch.equal(mine.cpu(), theirs), name


def test_known_layout():
    rows = tile_rows(torch.tensor([[2, 0], [-1, 2]]), 3)
    assert rows.position_TK.tolist() == [[TILE, 0], [-1, TILE + 1]]
    assert rows.starts_E1.tolist() == [0, TILE, TILE, 2 * TILE]
    assert rows.expert_M1.tolist() == [0, 2, -1, 2]
    assert rows.order_P[[0, TILE, TILE + 1]].tolist() == [1, 0, 3]
    assert int((rows.order_P >= 0).sum()) == 3


@pytest.mark.parametrize("counts", [[1] * 36, [0, 0, TILE, TILE + 1], [1, 2 * TILE - 1], [0]])
def test_the_bound_on_tiles_holds(counts):
    ids_N1 = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[:, None]
    used = sum(-(-c // TILE) for c in counts)
    assert int(tile_rows(ids_N1, len(counts)).expert_M1[-1]) == used <= max_tiles(sum(counts), len(counts))


def test_opcheck():
    torch.library.opcheck(tile_rows_op, (draw(9, 2, 4, dropped=0.2).to(DEVICE), 4))
