"""Calls on a KV cache: what shapes and dtypes tell of the arguments that only `flash_attn_with_kvcache` has.

request.py and cached.py check what attention to a cache asks, kv_contents.py what only real tensors tell.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch

from . import cached, request, scalars, scheduling
from .scheduling import SchedulerMetadata

INT32 = (torch.int32,)
ROTARY_STEP = 16  # rotary_dim is a multiple of it: 16 bytes of cosines or sines are read at a time


class Cache(NamedTuple):
    """What a call says of its cache besides the cache's tensors, in the words of the interface."""

    k: torch.Tensor | None
    v: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    cache_seqlens: torch.Tensor | int | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    rotary_interleaved: bool
    rotary_seqlens: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int | None
    batch_invariant: bool
    scheduler_metadata: SchedulerMetadata | None


class Append(NamedTuple):
    """A checked call: the arguments of the operator `append`, in their order; without a rotation no q.

    k_cache, v_cache: (batch_cache, seqlen_cache, heads_kv, dim), or pages (pages, page_size, heads_kv, dim).
    query_step: 1 where queries stand one behind the other, 0 where all stand at the first new key.
    """

    k_cache: Annotated[torch.Tensor, "Tensor(a!)"]
    v_cache: Annotated[torch.Tensor, "Tensor(b!)"]
    k_new: torch.Tensor
    v_new: torch.Tensor
    cache_seqlens: torch.Tensor
    cache_batch_idx: torch.Tensor | None
    block_table: torch.Tensor | None
    q: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    rotary_seqlens: torch.Tensor | None
    rotary_interleaved: bool
    query_step: int


def check(
    q: Any, k_cache: Any, v_cache: Any, cache: Cache, dtypes: tuple[torch.dtype, ...] = request.DTYPES,
    *, dtypes_kv: tuple[torch.dtype, ...] | None = None,
) -> None:
    """Raises what is wrong with a call: TypeError, ValueError or NotImplementedError that names it.

    dtypes: of q and, unless it has others, `dtypes_kv`, of the cache.
    """
    packed, paged = cache.cu_seqlens_q is not None, cache.block_table is not None
    rows_q = ("total",) if packed else ("batch", "seqlen")
    rows_k = ("pages", "page_size") if paged else ("batch_cache", "seqlen_cache")
    _check_floats("q", q, q, (*rows_q, "heads", "head_dim"), dtypes)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        like = ("q", q) if dtypes_kv is None else ("k_cache", k_cache)
        _check_floats(name, tensor, q, (*rows_k, "heads_kv", "head_dim"), dtypes_kv or dtypes, like)
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        raise ValueError(
            f"v_cache has shape {tuple(v_cache.shape)}, k_cache has {tuple(k_cache.shape)}: they must be "
            "equal but for the last dimension"
        )
    if packed:
        request.check_starts("cu_seqlens_q", cache.cu_seqlens_q, q)
        scalars.length("max_seqlen_q", cache.max_seqlen_q)
    elif cache.max_seqlen_q is not None:
        raise ValueError(f"max_seqlen_q is {cache.max_seqlen_q} without cu_seqlens_q; allowed: None")
    batch = cache.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    _check_places(q, k_cache, cache, batch)
    if (cache.k is None) != (cache.v is None):
        given, other = ("k", "v") if cache.v is None else ("v", "k")
        raise ValueError(f"{given} is given without {other}; allowed: both, or neither")
    if cache.k is not None:
        _check_new(q, k_cache, v_cache, cache, batch, dtypes_kv or dtypes)
    _check_rotary(q, k_cache, cache, batch)
    if cache.scheduler_metadata is not None:
        scheduling.check(cache.scheduler_metadata, q, batch)
        if cache.batch_invariant:
            raise ValueError(
                "scheduler_metadata is given beside batch_invariant=True; allowed: one of them, as it shares "
                "out keys by the lengths of all sequences"
            )
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": cache.k, "v": cache.v}
    for name, tensor in named.items():
        if request.needs_gradient(tensor):
            raise NotImplementedError(
                f"{name} requires a gradient, and a call on a cache has none; allowed: torch.no_grad()"
            )


def _check_floats(
    name: str, tensor: Any, q: torch.Tensor, dims: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...] = request.DTYPES, like: tuple[str, Any] | None = None,
) -> None:
    """like: what has the same dtype, and its name; None: q."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; allowed: torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    other, equal = like or ("q", q)
    if tensor.dtype != equal.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, {other} has {equal.dtype}: they must be equal")
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}: they must be on one device")
    if tensor.ndim != len(dims):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: ({', '.join(dims)})")


def _check_places(q: torch.Tensor, k_cache: torch.Tensor, cache: Cache, batch: Any) -> None:
    """What says where a sequence's keys lie, and how many there are."""
    seqlens, table = cache.cache_seqlens, cache.block_table
    if scalars.is_integer(seqlens):
        scalars.length("cache_seqlens", seqlens)
    elif seqlens is not None and not isinstance(seqlens, torch.Tensor):
        raise TypeError(f"cache_seqlens is {type(seqlens).__name__}; allowed: an int, or torch.Tensor")
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "rotary_seqlens"):
        numbers = getattr(cache, name)
        if isinstance(numbers, torch.Tensor) or name != "cache_seqlens" and numbers is not None:
            request.check_tensor(name, numbers, q, INT32, 1)
            if numbers.shape[0] != batch:
                raise ValueError(f"{name} has {numbers.shape[0]} numbers; allowed: {batch}, one per sequence")
    for name in ("k", "cache_leftpad", "block_table", "scheduler_metadata"):
        if getattr(cache, name) is not None and seqlens is None:
            raise ValueError(f"{name} is given without cache_seqlens; allowed: with it")
    if table is None:
        if cache.cache_batch_idx is None and k_cache.shape[0] != batch:
            raise ValueError(
                f"k_cache has {k_cache.shape[0]} rows and q {batch} sequences; allowed without "
                "cache_batch_idx: as many"
            )
        return
    request.check_tensor("block_table", table, q, INT32, 2)
    if table.shape[0] != batch:
        raise ValueError(f"block_table has {table.shape[0]} rows; allowed: {batch}, one per sequence")
    if k_cache.shape[1] == 0:
        raise ValueError("k_cache has pages of 0 keys; allowed: 1 or more")
    for name in ("cache_batch_idx", "cache_leftpad"):
        if getattr(cache, name) is not None:
            raise NotImplementedError(f"{name} is given beside block_table; allowed: None, the table says it")


def _check_new(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache: Cache, batch: Any,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """The new keys and values, of the cache's dtype, one of `dtypes`."""
    like = ("q", q) if q.dtype == k_cache.dtype else ("k_cache", k_cache)
    new = cache.k.shape[1] if isinstance(cache.k, torch.Tensor) and cache.k.ndim == 4 else "seqlen_new"
    for name, tensor, of in (("k", cache.k, k_cache), ("v", cache.v, v_cache)):
        dims = (batch, new, *of.shape[2:])
        _check_floats(name, tensor, q, tuple(map(str, dims)), dtypes, like)
        if tuple(tensor.shape) != dims:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; allowed: {dims}, by q, k and the cache"
            )


def _check_rotary(q: torch.Tensor, k_cache: torch.Tensor, cache: Cache, batch: Any) -> None:
    cos, sin = cache.rotary_cos, cache.rotary_sin
    if (cos is None) != (sin is None):
        given, other = ("rotary_cos", "rotary_sin") if sin is None else ("rotary_sin", "rotary_cos")
        raise ValueError(f"{given} is given without {other}; allowed: both, or neither")
    if cos is None:
        if cache.rotary_seqlens is not None:
            raise ValueError("rotary_seqlens is given without rotary_cos and rotary_sin; allowed: with them")
        return
    if cache.k is None:
        raise ValueError("rotary_cos is given without k; allowed: with new keys, which are rotated like q")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_floats(name, table, q, ("seqlen_rotary", "rotary_dim / 2"))
    if cos.shape != sin.shape:
        raise ValueError(
            f"rotary_sin has shape {tuple(sin.shape)}, rotary_cos has {tuple(cos.shape)}: they must be equal"
        )
    rows, half = cos.shape
    if 2 * half % ROTARY_STEP or not 0 < 2 * half <= q.shape[-1]:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)}, rotary_dim {2 * half}; allowed: multiples of "
            f"{ROTARY_STEP} up to head_dim {q.shape[-1]}"
        )
    room = cached.room(k_cache, cache.block_table)
    if rows < room:
        raise ValueError(f"rotary_cos has {rows} rows; allowed: {room} or more, the cache's room for keys")
