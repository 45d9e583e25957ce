"""Latent attention (MLA, DeepSeek-V2 2024, section 2.1): V is K's first columns, read from memory once.

A cache has for every key a row of latent numbers and, behind them, those that are rotated. In the absorbed
form all query heads share it as one KV head: K is the whole row, V its latent part.
"""

from __future__ import annotations

from typing import Any

import torch

WIDER_THAN = 256  # the head dim beyond which only kernels serve that read such a row once
STEP = 64  # V's columns are a multiple of it: pieces of 16 for each of up to four warps that share them out


def serves(dim: int, dim_v: int) -> bool:
    """Whether kernels read rows of these head dims once, where V is K's first columns."""
    return WIDER_THAN < dim >= dim_v and dim_v % STEP == 0


def is_latent(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether v is k's first columns, and kernels can make use of it. False for tensors without memory, and
    while torch.compile traces: it is asked again when what was traced runs.
    """
    if not serves(int(k.shape[-1]), int(v.shape[-1])) or torch.compiler.is_compiling():
        return False
    if k.shape[:-1] != v.shape[:-1] or k.stride() != v.stride():
        return False
    if k.is_meta or type(k) is not torch.Tensor or type(v) is not torch.Tensor:
        return False
    return k.data_ptr() == v.data_ptr()


def joined(q: Any, qv: Any, k_cache: Any, v_cache: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k_cache and v_cache of the call whose scores are q k + qv v: of rows [v, k] and queries [qv, q].

    TypeError or ValueError where they are not as FlashAttention-3 has them, or not side by side in memory;
    NotImplementedError within torch.compile, which knows of no memory.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "qv is given while torch.compile traces; allowed: calls outside of it, or q of both parts"
        )
    for name, tensor in (("q", q), ("qv", qv), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; allowed: torch.Tensor")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, q {q.dtype} on {q.device}: they must be equal"
            )
        if tensor.ndim != (4 if name.endswith("cache") else q.ndim):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: 4 dimensions, qv as q")
    allowed = (*q.shape[:-1], v_cache.shape[-1])
    if qv.shape != allowed:
        raise ValueError(f"qv has shape {tuple(qv.shape)}; allowed: {allowed}, q's with v_cache's head dim")
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise ValueError(
            f"v_cache has shape {tuple(v_cache.shape)}, k_cache has {tuple(k_cache.shape)}: they must be "
            "equal but for the last dimension"
        )
    dim_v = v_cache.shape[-1]
    behind = v_cache.data_ptr() + dim_v * v_cache.element_size()
    if k_cache.data_ptr() != behind or k_cache.stride() != v_cache.stride():
        raise ValueError(
            "k_cache does not lie behind v_cache in the same rows; allowed with qv: row[..., head_dim_v:] "
            "and row[..., :head_dim_v] of one tensor"
        )
    shape = (*v_cache.shape[:-1], dim_v + k_cache.shape[-1])
    rows = v_cache.as_strided(shape, v_cache.stride())
    return torch.cat((qv, q), dim=-1), rows, rows[..., :dim_v]


def heads_are_rows(queries: int, heads_q: int, heads_kv: int, window: Any, *rules: Any) -> bool:
    """Whether the heads of a single query may stand for as many queries of one head, which see the same keys:
    a tile then holds as many heads as it has rows. rules: a mask, a score, slopes and sinks, or None.
    """
    open_ended = not isinstance(window, (tuple, list)) or all(side in (None, -1) for side in window)
    return queries == heads_kv == 1 < heads_q and open_ended and all(rule is None for rule in rules)
