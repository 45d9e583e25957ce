"""The order of tiles, by divisions and by multiplications: each tile once, and both the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from cute_flash.dispatch import EMULATED, emulated
from cute_flash.executable import executable
from tests.tile_order_kernel import TILE_ORDER, TileOrderConfig, TileOrderProblem

# m_blocks, heads, batches, splits, together: ragged last sections, one of everything, powers of two and not.
SMALL = [
    (1, 1, 1, 1, 1), (3, 5, 2, 1, 4), (7, 3, 3, 2, 9), (4, 8, 2, 3, 16), (5, 6, 1, 4, 6), (2, 7, 3, 5, 20),
]  # fmt: skip
# As many tiles as an int32 counts, or nearly; the divisors that need all bits of their factors among them.
LARGE = [
    (2**31 - 1, 1, 1, 1, 1), (1, 2**31 - 1, 1, 1, 1), (1, 641, 6700417 // 2, 1, 640), (3, 7, 2**26, 1, 2**26),
    (65537, 32767, 1, 1, 3), (46341, 46339, 1, 1, 46338), (2**15, 2**15, 1, 1, 2**14),
    (9, 11, 13, 1668000, 100),
]  # fmt: skip


def order(
    places: torch.Tensor, sizes: tuple[int, ...], split: bool, in_sections: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(4, places) each: m_block, head, batch and split, by divisions and without."""
    found = torch.empty(8, places.numel(), dtype=torch.int32)
    problem = TileOrderProblem(split, in_sections)
    with emulated("sm90"):
        run = executable(TILE_ORDER, problem, TileOrderConfig(), EMULATED["sm90"], "emulator")
        run(places, *sizes, found)
    return found[:4], found[4:]


@pytest.mark.parametrize(("split", "in_sections"), list(itertools.product((False, True), repeat=2)))
def test_each_tile_once(split, in_sections):
    for m_blocks, heads, batches, splits, together in SMALL:
        sizes = m_blocks, heads, batches, splits if split else 1, together if in_sections else 1
        count = m_blocks * heads * batches * sizes[3]
        divided, multiplied = order(torch.arange(count, dtype=torch.int32), sizes, split, in_sections)
        assert torch.equal(multiplied, divided), sizes
        every = torch.cartesian_prod(*map(torch.arange, sizes[:4])).reshape(-1, 4)
        assert sorted(multiplied.T.tolist()) == every.tolist(), sizes


@pytest.mark.parametrize(("split", "in_sections"), list(itertools.product((False, True), repeat=2)))
def test_many_tiles(split, in_sections):
    for sizes in LARGE:
        sizes = *sizes[:3], sizes[3] if split else 1, sizes[4] if in_sections else 1
        count = sizes[0] * sizes[1] * sizes[2] * sizes[3]
        assert count < 2**31
        near = torch.cat([torch.arange(64), count // 2 + torch.arange(-32, 32), count - 1 - torch.arange(64)])
        spread = torch.linspace(0, count - 1, 200, dtype=torch.float64).long()
        places = torch.cat([near.clamp(0, count - 1), spread]).to(torch.int32)
        divided, multiplied = order(places, sizes, split, in_sections)
        assert torch.equal(multiplied, divided), sizes
        for row, size in zip(multiplied, sizes[:4], strict=True):
            assert row.min() >= 0 and row.max() < size, sizes
