"""Sequences and heads beyond the 65535 that y and z of a grid have: tiles are counted along x.

The host code runs as compiled; the launch that it asks for is noted and not executed.
"""

from __future__ import annotations

import pytest
import torch

import cute_flash
from cute_flash.arch.problem import Problem, Sizes
from cute_flash.dispatch import EMULATED, plan
from cute_flash.emulator.execution import launch

MANY = 70_000


@pytest.fixture
def grids(monkeypatch):
    """Grids of every launch."""
    seen = []

    def run(program, asked, memory, options):
        seen.append(asked.grid)

    monkeypatch.setattr(launch, "run", run)
    return seen


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize("batch, heads", [(MANY, 4), (1, MANY), (300, 300)])
def test_tiles_are_counted_along_x(grids, batch, heads, arch):
    q, k = half(batch, 9, heads, 64), half(batch, 9, heads, 64)
    with cute_flash.emulated(arch):
        cute_flash.flash_attn_func(q, k, k, num_splits=1)
    ((tiles, y, z),) = grids
    assert y == z == 1 and tiles >= (batch * heads if arch == "sm80" else EMULATED[arch].multiprocessors)


def test_so_are_packed_sequences_and_the_parts_of_keys(grids):
    starts = torch.arange(MANY + 1, dtype=torch.int32)
    q, k = half(MANY, 4, 64), half(MANY, 4, 64)
    with cute_flash.emulated("sm80"):
        cute_flash.flash_attn_varlen_func(q, k, k, starts, starts, 1, 1, num_splits=2)
    attention, merging = grids
    assert attention == (MANY * 4 * 2, 1, 1) and merging == (MANY, 1, 1)


@pytest.mark.parametrize(
    "sizes, splits",
    [
        (Sizes(1 << 20, 128, 128, 1 << 12, 1), 1),
        (Sizes(1 << 24, 1, 1, 64, 1), 128),
        (Sizes(1, 1 << 18, 1, 1 << 21, 1), 1),
    ],
)
@pytest.mark.parametrize("device", ["sm80", "sm90", "sm100"])
def test_a_grid_that_x_does_not_hold_is_refused(device, sizes, splits):
    problem = Problem("float16", 64, 64, gqa=sizes.heads_q > sizes.heads_kv)
    with pytest.raises(NotImplementedError, match=rf"{sizes.batch} sequences .* blocks; allowed: 2147483647"):
        plan(problem, EMULATED[device], sizes, splits)
    few = sizes._replace(batch=1, heads_q=1, heads_kv=1)
    assert plan(Problem("float16", 64, 64), EMULATED[device], few, splits).sizes.get("splits", 1) == splits
