"""Calls whose keys lie in a cache: what shapes and dtypes tell of them, and the numbers inside their tensors.

As request.py and contents.py are for others: `request` makes a checked `Call`, `contents` looks into tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from . import request
from .request import Call, Options, Packing, Sizes

INT32 = (torch.int32,)
BY_SEQUENCE = (
    "seqused_q", "seqused_k", "cache_batch_idx", "cache_leftpad", "sequence_splits", "sequence_order",
)  # fmt: skip


def checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: Options) -> Call:
    """Check a call on a cache. All numbers are int32 and contiguous, one per sequence but in block_table."""
    return checked_of(*request.as_autocast_has_it(q, k, v), packing, options, request.DTYPES)


def checked_of(
    q, k, v, packing: Packing, options: Options, dtypes: tuple[torch.dtype, ...],
    *, dtypes_kv: tuple[torch.dtype, ...] | None = None,
) -> Call:
    """The same for q, k and v of one of `dtypes`, or k and v of one of `dtypes_kv`."""
    starts_q, starts_k, table = packing.cu_seqlens_q, packing.cu_seqlens_k, packing.block_table
    rows = ("batch", "seqlen") if starts_q is None else ("total",)
    rows_k = ("cache_rows", "seqlen") if table is None else ("num_pages", "page_size")
    dims = ((*of, "heads", "head_dim") for of in (rows, rows_k))
    request.check_qkv(q, k, v, *dims, dtypes, dtypes_kv=dtypes_kv)
    if request.needs_gradient(q, k, v, options.learnable_sink):
        raise NotImplementedError(
            "a gradient is required of a call on a cache, which has none; allowed: torch.no_grad()"
        )
    for name, starts in (("cu_seqlens_q", starts_q), ("cu_seqlens_k", starts_k)):
        if starts is not None:
            request.check_starts(name, starts, q)
    batch = batch_of(packing, q)
    if starts_k is not None and starts_k.shape[0] != batch + 1:
        raise ValueError(f"cu_seqlens_k has {starts_k.shape[0]} numbers; allowed: {batch + 1}")
    for name in BY_SEQUENCE:
        tensor = getattr(packing, name)
        if tensor is not None:
            request.check_tensor(name, tensor, q, INT32, 1)
            if tensor.shape[0] != batch:
                raise ValueError(f"{name} has {tensor.shape[0]} numbers, q has {batch} sequences")
    if table is not None:
        _check_table(packing, q, k, batch)
    elif packing.cache_batch_idx is None and k.shape[0] < batch:
        raise ValueError(f"k has {k.shape[0]} rows of a cache, q has {batch} sequences")
    packing = request.with_longest(packing)
    sizes = Sizes(batch, q.shape[-2], packing.max_seqlen_q, room(k, table))
    return request.checked(q, k, v, packing, options, sizes)


def batch_of(packing: Call | Packing, q: torch.Tensor) -> int:
    """Sequences of a call."""
    return q.shape[0] if packing.cu_seqlens_q is None else packing.cu_seqlens_q.shape[0] - 1


def room(k: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Keys that a sequence may have in a cache."""
    return k.shape[1] if block_table is None else k.shape[1] * block_table.shape[1]


def _check_table(packing: Packing, q: torch.Tensor, k: torch.Tensor, batch: int) -> None:
    request.check_tensor("block_table", packing.block_table, q, INT32, 2)
    if packing.block_table.shape[0] != batch:
        raise ValueError(f"block_table has {packing.block_table.shape[0]} rows, q has {batch} sequences")
    if k.shape[1] == 0:
        raise ValueError("k has pages of 0 keys; allowed: 1 or more")
    for name in ("cache_batch_idx", "cache_leftpad"):
        if getattr(packing, name) is not None:
            raise NotImplementedError(f"{name} is given beside block_table; allowed: None")
    if packing.seqused_k is None and packing.cu_seqlens_k is None:
        raise ValueError("block_table is given without the sequences' lengths; allowed: beside seqused_k")


def check_places(packing: Call | Packing, q: torch.Tensor, k: torch.Tensor, lengths: list[int]) -> None:
    """Keys in use lie in the cache: `lengths`, the first in use, rows of the cache and pages."""
    most, batch = room(k, packing.block_table), batch_of(packing, q)
    if max(lengths, default=0) > min(most, packing.max_seqlen_k):
        allowed = f"max_seqlen_k {packing.max_seqlen_k}, and {most}, what the cache has room for"
        raise ValueError(f"the longest sequence has {max(lengths)} keys; allowed: {allowed}")
    _check_below("cache_batch_idx", packing.cache_batch_idx, [k.shape[0] - 1] * batch, "the cache's rows")
    _check_below("cache_leftpad", packing.cache_leftpad, lengths, "the sequence's keys")
    if packing.block_table is not None:
        for sequence, (pages, length) in enumerate(zip(packing.block_table, lengths, strict=True)):
            used = pages[: -(-length // k.shape[1])]
            _check_below(f"block_table[{sequence}]", used, [k.shape[0] - 1] * len(used), "k's pages")


def _check_below(name: str, numbers: Any, most: list[int], of: str) -> None:
    """Each of the numbers, if there are any, is 0 or more and at most its own of `most`."""
    given = [] if numbers is None else numbers.tolist()
    for place, (number, last) in enumerate(zip(given, most, strict=False)):
        if not 0 <= number <= last:
            raise ValueError(f"{name}[{place}] is {number}; allowed: 0 to {last}, {of}")
