"""The oracle of KV caches in plain torch: rotating, appending, and the keys that attention then sees.

Arguments have the names, shapes and meaning of `flash_attn_with_kvcache`. One sequence at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


def rotated(x, positions, cos, sin, interleaved: bool):
    """x (rows, heads, dim), a position for each row: in float64, then rounded to float32 and to x's dtype."""
    half = cos.shape[1]
    cos, sin = (table.double()[positions][:, None] for table in (cos, sin))
    pairs = slice(half), slice(half, 2 * half)
    if interleaved:
        pairs = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    turned = x.double().clone()
    a, b = (x.double()[..., numbers] for numbers in pairs)
    turned[..., pairs[0]], turned[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
    return turned.float().to(x.dtype)


def places(cache, b: int, positions, block_table=None, cache_batch_idx=None):
    """Where the keys of sequence b at these positions lie: rows, or pages, and places in them."""
    if block_table is not None:
        size = cache.shape[1]
        return block_table[b].long()[positions // size], positions % size
    row = b if cache_batch_idx is None else int(cache_batch_idx[b])
    return torch.full_like(positions, row), positions


class Seen(NamedTuple):
    """What attention is to be computed of, packed: queries as rotated, keys and values as in the cache."""

    q: Any
    k: Any
    v: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any


def appended(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, rotary_interleaved=True, rotary_seqlens=None,
    cu_seqlens_q=None, steps: bool = False,
) -> Seen:  # fmt: skip
    """Writes into the caches; `steps`: each query stands one behind the one before it (causal, a window)."""
    queries = q.unbind() if cu_seqlens_q is None else q.split(cu_seqlens_q.diff().tolist())
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    found: list[tuple] = []
    for b, query in enumerate(queries):
        start = room if cache_seqlens is None else int(cache_seqlens[b])
        base, end = start if rotary_seqlens is None else int(rotary_seqlens[b]), start
        if k is not None:
            end, rows = start + k.shape[1], torch.arange(k.shape[1])
            key = k[b]
            if rotary_cos is not None:
                angles = rotary_cos, rotary_sin, rotary_interleaved
                key = rotated(key, base + rows, *angles)
                query = rotated(query, base + torch.arange(len(query)) * steps, *angles)
            where = places(k_cache, b, start + rows, block_table, cache_batch_idx)
            k_cache[where], v_cache[where] = key, v[b]
        first = 0 if cache_leftpad is None else int(cache_leftpad[b])
        where = places(k_cache, b, torch.arange(first, end), block_table, cache_batch_idx)
        found.append((query, k_cache[where], v_cache[where]))
    tensors = list(zip(*found, strict=True))
    starts = (torch.tensor([0, *map(len, side)]).cumsum(0).int() for side in tensors[:2])
    return Seen(*map(torch.cat, tensors), *starts)
