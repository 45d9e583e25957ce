"""Calls that are right but for what is changed, on an emulated device where nothing may be launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cute_flash
from cute_flash import BlockMask, launch

HALF = torch.float16


@pytest.fixture
def no_launch(monkeypatch):
    """An emulated device, on which a launch fails the test."""

    def launched(*key):
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "executable", launched)
    with cute_flash.emulated("sm80"):
        yield


def tensor(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(**changed: Any) -> Any:
    """A call that is right but for what is changed."""
    given = {"q": tensor(2, 8, 4, 64), "k": tensor(2, 16, 2, 64), "v": tensor(2, 16, 2, 64)} | changed
    return cute_flash.flash_attn_func(**given)


def packed(**changed: Any) -> Any:
    """A packed call that is right but for what is changed."""
    given = {
        "q": tensor(10, 4, 64),
        "k": tensor(20, 2, 64),
        "v": tensor(20, 2, 64),
        "cu_seqlens_q": ints(0, 4, 10),
        "cu_seqlens_k": ints(0, 15, 20),
        "max_seqlen_q": 6,
        "max_seqlen_k": 15,
    } | changed
    return cute_flash.flash_attn_varlen_func(**given)


def blocks(batch: int, heads: int) -> BlockMask:
    """A block mask of one block, which 8 queries and 16 keys do not fill."""
    visit = torch.ones(batch, heads, 1, 1, dtype=torch.bool)
    return BlockMask.from_blocks(visit, block_size=128, seqlens=(8, 16))
