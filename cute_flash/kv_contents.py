"""What only real tensors tell of a KV cache, checked before a launch; contents.py has it for all others.

Numbers are looked at where `contents.can_be_read`. A place of the cache is a row of it and a position there,
or a page and a row of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import cached, contents, overlap
from .kv_cache import Append, Cache
from .request import Packing
from .scheduling import SchedulerMetadata

_NAMES = {"k_new": "k", "v_new": "v"}  # of the interface, where an operator's differ
_READ_WIDELY = ("k_cache", "v_cache", "k_new", "v_new", "q", "rotary_cos", "rotary_sin")


def check_numbers(q: torch.Tensor, k_cache: torch.Tensor, cache: Cache, packing: Packing) -> None:
    """Of the keys that are there already, and of queries: what appending does not check."""
    if packing.cu_seqlens_q is not None:
        contents.check_sequences(packing, "q", q.shape[0])
    seqlens = cache.cache_seqlens if isinstance(cache.cache_seqlens, torch.Tensor) else packing.seqused_k
    if seqlens is None:
        _check_rows(k_cache, cache.cache_batch_idx)
    elif cache.k is None:
        _check_in_cache(k_cache, seqlens, 0, cache.cache_batch_idx, cache.block_table)
    if cache.cache_leftpad is not None:
        _check_range("cache_leftpad", cache.cache_leftpad, 0, cached.room(k_cache, None), "keys of a row")
        if (late := cache.cache_leftpad > seqlens).any():
            at = int(late.nonzero()[0])
            raise ValueError(
                f"cache_leftpad[{at}] is {cache.cache_leftpad[at]}; allowed: up to cache_seqlens[{at}], "
                f"{seqlens[at]}"
            )
    if cache.scheduler_metadata is not None:
        _check_schedule(cache.scheduler_metadata)


def check_append(call: Append) -> None:
    """Alignment, memory that belongs to more than one tensor, and `check_append_numbers`."""
    named = {_NAMES.get(name, name): x for name, x in call._asdict().items() if isinstance(x, torch.Tensor)}
    for name in _READ_WIDELY:
        if (tensor := named.get(_NAMES.get(name, name))) is not None:
            contents.check_alignment(_NAMES.get(name, name), tensor)
    for name in ("k_cache", "v_cache"):
        cache = named.pop(name)
        if overlap.overlaps_itself(cache):
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)} and strides {cache.stride()}: several elements in "
                "one place; allowed: memory where each has its own"
            )
        for other, tensor in named.items():
            if overlap.overlap(cache, tensor):
                raise ValueError(f"{name} overlaps {other} in memory; allowed: memory of its own")
    if contents.can_be_read(call.k_new.device):
        check_append_numbers(call)


class Reach(NamedTuple):
    """A tensor of a call: its place among the arguments, bytes that it reaches over, how it is aligned."""

    place: int
    span: int
    alignment: int


def reaches(call: Append) -> tuple[Reach, ...]:
    """Of a call's tensors, in their order: the two caches first."""
    fields = zip(Append._fields, call, strict=True)
    return tuple(
        Reach(place, overlap.span(x), contents.ALIGNMENT if name in _READ_WIDELY else 1)
        for place, (name, x) in enumerate(fields)
        if isinstance(x, torch.Tensor)
    )


def needs_a_closer_look(call: Append, reached: Sequence[Reach]) -> bool:
    """Whether the addresses of a call may make it wrong which, with others, was right; `reached` of that."""
    k_cache, v_cache = call.k_cache.data_ptr(), call.v_cache.data_ptr()
    (_, k_span, _), (_, v_span, _), *others = reached
    if v_cache - k_span < k_cache < v_cache + v_span or (k_cache | v_cache) % contents.ALIGNMENT:
        return True
    k_end, v_end = k_cache + k_span, v_cache + v_span
    for place, span, alignment in others:
        first = call[place].data_ptr()
        if k_cache - span < first < k_end or v_cache - span < first < v_end or first % alignment:
            return True
    return False


def check_append_numbers(call: Append) -> None:
    """Lengths, pages, rows of the cache, and positions in rotary tables; that no two keys have one place."""
    new = call.k_new.shape[1]
    _check_in_cache(call.k_cache, call.cache_seqlens, new, call.cache_batch_idx, call.block_table)
    if call.rotary_cos is not None:
        _check_positions(call)
    rows, positions = torch.broadcast_tensors(*_places(call, new))
    room = cached.room(call.k_cache, call.block_table)
    if (rows.long() * room + positions).unique().numel() < rows.numel():
        which = "cache_batch_idx" if call.block_table is None else "block_table"
        raise ValueError(f"{which} gives several new keys one place in the cache; allowed: a place for each")


def _places(call: Append, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the cache, or pages; positions there) of all new keys, (batch, new) or (batch, 1)."""
    device = call.cache_seqlens.device
    positions = call.cache_seqlens[:, None] + torch.arange(new, device=device)
    if call.block_table is not None:
        page_size = call.k_cache.shape[1]
        return call.block_table.gather(1, (positions // page_size).long()), positions % page_size
    rows = call.cache_batch_idx
    rows = torch.arange(len(positions), device=device) if rows is None else rows
    return rows[:, None], positions


def _check_in_cache(k_cache: torch.Tensor, seqlens: torch.Tensor, new: int, rows: Any, table: Any) -> None:
    """Sequences of `seqlens` keys and `new` ones more: that there is room, rows of the cache, and pages.

    Behind the pages in use a table may hold anything.
    """
    room = cached.room(k_cache, table)
    words = f"the cache's room, less {new} new keys" if new else "the cache's room"
    _check_range("cache_seqlens", seqlens, 0, room - new, words)
    _check_rows(k_cache, rows)
    if table is not None:
        pages, page_size = k_cache.shape[:2]
        used = torch.arange(table.shape[1], device=table.device) * page_size < seqlens[:, None] + new
        _check_range("block_table", table[used], 0, pages - 1, "pages of k_cache")


def _check_schedule(metadata: SchedulerMetadata) -> None:
    """Every sequence has a part at least and no more than CTAs are launched for, and comes once."""
    splits, order = metadata.splits, metadata.order
    _check_range("scheduler_metadata.splits", splits, 1, metadata.num_splits, "its num_splits")
    if not torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device)):
        raise ValueError(
            f"scheduler_metadata.order has {order.tolist()}; allowed: 0 to {len(order) - 1}, each once"
        )


def _check_rows(k_cache: torch.Tensor, rows: torch.Tensor | None) -> None:
    if rows is not None:
        _check_range("cache_batch_idx", rows, 0, k_cache.shape[0] - 1, "rows of k_cache")


def _check_positions(call: Append) -> None:
    """Of new keys and queries, in the rotary tables."""
    name = "cache_seqlens" if call.rotary_seqlens is None else "rotary_seqlens"
    rows, first = call.rotary_cos.shape[0], getattr(call, name)
    following = torch.full_like(first, max(call.k_new.shape[1] - 1, 0))
    if call.query_step:
        packed = call.cu_seqlens_q is not None
        queries = call.cu_seqlens_q.diff() if packed else torch.full_like(first, call.q.shape[1])
        following = torch.maximum(following, queries - 1)
    if ((first < 0) | (first + following >= rows)).any():
        at = int(((first < 0) | (first + following >= rows)).nonzero()[0])
        raise ValueError(
            f"{name}[{at}] is {first[at]}, and {following[at]} positions follow; allowed: positions 0 to "
            f"{rows - 1}, the rows of rotary_cos"
        )


def _check_range(name: str, numbers: torch.Tensor, least: int, most: int, what: str) -> None:
    if numbers.numel() and not (numbers.min() >= least and numbers.max() <= most):
        wrong = numbers.min() if numbers.min() < least else numbers.max()
        raise ValueError(f"{name} has {wrong}; allowed: {least} to {most}, {what}")
