"""Attention with a KV cache: append to it, in place, then attend to what is there.

A call like an earlier one is not decided again, as in repeat.py, whose key is part of the key here.
"""

from __future__ import annotations

from collections.abc import Hashable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import (
    appending,
    cached,
    contents,
    kv_cache,
    kv_contents,
    latent,
    launch,
    problems,
    quantized,
    repeat,
    request,
    scalars,
    scheduling,
    widened,
)
from .appending import Appended
from .dispatch import place_of, plan
from .kv_cache import Append, Cache
from .kv_contents import Reach
from .quantized import Descale
from .repeat import Result
from .request import Options, Packing

ROTARY = ("rotary_cos", "rotary_sin", "rotary_seqlens")
KEYS_OF_A_PART = 1024  # where a sequence's bits must not depend on how many CTAs there are
_DECIDED: dict[Hashable, _Decided] = repeat.decisions()


class _Call(NamedTuple):
    """Both halves of a call: append and found, None where nothing is appended; what attention is asked."""

    append: Append | None
    found: Appended | None
    q: torch.Tensor
    packing: Packing
    options: Options


class _Decided(NamedTuple):
    """What calls of one key have in common. bound: of the append kernel; None where it is not launched.

    reached: of the tensors of what is appended.
    """

    bound: launch.Bound | None
    reached: tuple[Reach, ...]
    attention: repeat.Decided


def forward(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache: Cache, options: Options
) -> Result:
    """Attention with a cache, from the user's arguments; raises what is wrong with them."""
    q, cache = _as_cached(q, k_cache, cache)
    if _heads_are_rows(q, k_cache, v_cache, cache, options):
        return _of_one_head(q, k_cache, v_cache, cache, options)
    if repeat.watched():
        return _by_operators(q, k_cache, v_cache, cache, options)
    try:
        call = _halves(q, k_cache, v_cache, cache, options)
        seen = repeat.rules_of(options)
        attention = repeat.key_of(call.q, k_cache, v_cache, call.packing, call.options, seen)
        key = _key(call, q, cache, attention)
        decided = _DECIDED.get(key)
    except Exception:  # what cannot be part of a key is for the checks to name
        return _by_operators(q, k_cache, v_cache, cache, options)
    if decided is None:
        return _first((key, attention), q, k_cache, v_cache, cache, options)
    if contents.can_be_read(q.device):
        kv_contents.check_numbers(q, k_cache, cache, call.packing)
    if call.append is not None:
        appending.again(call.append, call.found, decided.bound, decided.reached)
    return decided.attention.again(call.q, k_cache, v_cache, call.packing, call.options, seen)


def forward_quantized(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache: Cache, options: Options,
    descale: Descale,
) -> Result:
    """The same of q and a cache of 8 bits."""
    _refuse_rotation("q", cache)
    kv_cache.check(q, k_cache, v_cache, cache, quantized.DTYPES)
    return _of_8_bits(quantized, q, k_cache, v_cache, cache, options, descale)


def forward_widened(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, cache: Cache, options: Options,
    descale: Descale,
) -> Result:
    """The same of q of 16 bits and a cache of 8."""
    (q,) = request.as_autocast_has_it(q)
    _refuse_rotation("a cache", cache)
    kv_cache.check(q, k_cache, v_cache, cache, dtypes_kv=quantized.DTYPES)
    return _of_8_bits(widened, q, k_cache, v_cache, cache, options, descale)


def _refuse_rotation(beside: str, cache: Cache) -> None:
    """beside: what is of 8 bits."""
    if refused := [name for name in ROTARY if getattr(cache, name) is not None]:
        raise NotImplementedError(
            f"{', '.join(refused)} are given beside {beside} of 8 bits; allowed: None. What is rotated would "
            "have to be quantized again: `quantize` does both"
        )


def _of_8_bits(
    kind: ModuleType, q, k_cache, v_cache, cache: Cache, options: Options, descale: Descale
) -> Result:
    """Append and attend; what is refused has not written. kind: `quantized` or `widened`."""
    call = _halves(q, k_cache, v_cache, cache, options)
    asked, scaling = kind.checked(call.q, k_cache, v_cache, call.packing, call.options, descale)
    _check_numbers(q, k_cache, v_cache, cache, call)
    if call.append is not None:
        if not torch.compiler.is_compiling() and _plain(q, k_cache, v_cache, cache):
            contents.check_alignment("q", asked.q)
            if call.options.out is not None:
                contents.check_out(asked, call.options.out)
                contents.check_alignment("out", call.options.out)
            kind.check_scales(scaling)
            kind.planned(asked, scaling)
        seqlens, _ = torch.ops.cute_flash.append.default(*_in_pairs(call.append))
        asked = asked._replace(seqused_k=seqlens)
    return kind.attend(asked, scaling, call.options)


def _in_pairs(append: Append) -> Append:
    """Two numbers of 8 bits as one of 16, which appending copies, whatever they are."""
    given = {"k_cache": append.k_cache, "v_cache": append.v_cache, "k": append.k_new, "v": append.v_new}
    for name, tensor in given.items():
        if not torch.compiler.is_compiling():
            contents.check_alignment(name, tensor)
    pairs = (x.view(torch.float16) for x in given.values())
    return append._replace(**dict(zip(Append._fields[:4], pairs, strict=True)))


def _check_numbers(q: Any, k_cache: Any, v_cache: Any, cache: Cache, call: _Call) -> None:
    """Those that find keys in a cache, where tensors are memory that may be read."""
    plain = not torch.compiler.is_compiling() and _plain(q, k_cache, v_cache, cache)
    if plain and contents.can_be_read(q.device):
        kv_contents.check_numbers(q, k_cache, cache, call.packing)


def _heads_are_rows(q: Any, k_cache: Any, v_cache: Any, cache: Cache, options: Options) -> bool:
    """Whether to take the heads of single queries as queries of one head: see latent.py."""
    if cache.k is not None or cache.cu_seqlens_q is not None:
        return False
    if not all(isinstance(x, torch.Tensor) and x.ndim == 4 for x in (q, k_cache, v_cache)):
        return False
    if not latent.is_latent(k_cache, v_cache):
        return False
    rules = options.window_size, options.mask, options.score, options.alibi_slopes, options.learnable_sink
    return latent.heads_are_rows(q.shape[1], q.shape[2], k_cache.shape[2], *rules)


def _of_one_head(q, k_cache, v_cache, cache: Cache, options: Options) -> Result:
    """The call with rows and heads of q and of the result exchanged. A single query sees all keys."""
    out = options.out
    turned = out.transpose(1, 2) if isinstance(out, torch.Tensor) and out.ndim == 4 else out
    options = options._replace(causal=False, out=turned)
    found = forward(q.transpose(1, 2), k_cache, v_cache, cache, options)
    lse = found.lse.transpose(1, 2) if options.lse else found.lse
    return found._replace(out=found.out.transpose(1, 2) if out is None else out, lse=lse)


def _key(call: _Call, q: torch.Tensor, cache: Cache, attention: Hashable) -> Hashable:
    """All that checks and kernels depend on, lengths not among it. attention: the same of attention."""
    k, v, cos, sin = cache.k, cache.v, cache.rotary_cos, cache.rotary_sin
    outside, elsewhere = repeat.outside, cache.rotary_seqlens
    key = attention, v is None, cos is None, sin is None, elsewhere is None, cache.max_seqlen_q is None
    if k is None:
        return key
    key = *key, outside(k), outside(v), outside(call.append.cache_seqlens)
    if cos is None:
        return key
    elsewhere = None if elsewhere is None else outside(elsewhere)
    return *key, outside(q), outside(cos), outside(sin), elsewhere, cache.rotary_interleaved


def _as_cached(q: Any, k_cache: Any, cache: Cache) -> tuple[Any, Cache]:
    """q and new keys and values as autocast has them, which must be as the cache is: a copy would be lost."""
    device = q.device.type if isinstance(q, torch.Tensor) else None
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return q, cache
    dtype = torch.get_autocast_dtype(device)
    if isinstance(k_cache, torch.Tensor) and k_cache.dtype != dtype:
        raise TypeError(f"k_cache has dtype {k_cache.dtype}; allowed: {dtype}, as autocast has it")
    q, k, v = request.as_autocast_has_it(q, cache.k, cache.v)
    return q, cache._replace(k=k, v=v)


def _halves(q, k_cache, v_cache, cache: Cache, options: Options) -> _Call:
    """What is appended, and what attention is asked. A single query sees all keys without a causal mask."""
    packed, seqlens, rotary = cache.cu_seqlens_q is not None, cache.cache_seqlens, cache.rotary_cos
    longest = cache.max_seqlen_q if packed else q.shape[1]
    room = cached.room(k_cache, cache.block_table)
    if seqlens is not None and not isinstance(seqlens, torch.Tensor):
        most = room if cache.k is None else room - cache.k.shape[1]
        if not 0 <= seqlens <= most:
            words = "the cache's room, less new keys"
            raise ValueError(f"cache_seqlens is {seqlens}; allowed: 0 to {most}, {words}")
        batch = cache.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
        seqlens = torch.full((batch,), seqlens, dtype=torch.int32, device=q.device)
    append = found = None
    if cache.k is not None:
        steps = options.causal or _sees_by_position(options)
        append = Append(
            k_cache, v_cache, cache.k, cache.v, seqlens, cache.cache_batch_idx, cache.block_table,
            None if rotary is None else q, cache.cu_seqlens_q, longest, rotary, cache.rotary_sin,
            cache.rotary_seqlens, cache.rotary_interleaved, int(bool(steps)),
        )  # fmt: skip
        found = appending.new(append)
        seqlens, q = found.seqlens, q if rotary is None else found.q
    packing = Packing(
        cache.cu_seqlens_q, None, longest, room, None, seqlens, True, cache.cache_batch_idx,
        cache.cache_leftpad, cache.block_table,
    )  # fmt: skip
    if options.causal and longest == 1:
        options = options._replace(causal=False)
    if cache.batch_invariant and not options.num_splits:
        options = options._replace(num_splits=_invariant_splits(room, options))
    if (metadata := cache.scheduler_metadata) is not None:
        packing = packing._replace(
            sequence_splits=metadata.splits, sequence_order=metadata.order, scheduled_for=metadata.made_for
        )
        options = options._replace(num_splits=scheduling.splits_of(metadata, options.num_splits))
    return _Call(append, found, q, packing, options)


def _sees_by_position(options: Options) -> bool:
    """Whether a window or a mask is given; one of a wrong type is for the checks of attention to name."""
    window = options.window_size
    bounded = isinstance(window, (tuple, list)) and any(side not in (None, -1) for side in window)
    return bounded or options.mask is not None


def _invariant_splits(room: int, options: Options) -> int:
    """In how many parts to take keys, by the cache's room: those that a window or a mask leaves are few."""
    if _sees_by_position(options):
        return 1
    return max(1, min(scalars.MOST_SPLITS, -(-room // KEYS_OF_A_PART)))


def _checked(q, k_cache, v_cache, cache: Cache, options: Options) -> _Call:
    """The call, by all checks of both halves: what is refused must not have written."""
    kv_cache.check(q, k_cache, v_cache, cache)
    call = _halves(q, k_cache, v_cache, cache, options)
    asked = repeat.checked(call.q, k_cache, v_cache, call.packing, call.options)
    if not torch.compiler.is_compiling() and _plain(q, k_cache, v_cache, cache):
        place = place_of(q.device)
        sizes = problems.sizes_of(asked)
        planned = plan(problems.problem_of(asked), place.device, sizes, asked.num_splits)
        scheduling.check_plan(asked, planned)
        if contents.can_be_read(q.device):
            kv_contents.check_numbers(q, k_cache, cache, call.packing)
    return call


def _plain(q: Any, k_cache: Any, v_cache: Any, cache: Cache) -> bool:
    """Whether tensors are memory, and no others' idea of it."""
    given = (q, k_cache, v_cache, *cache, *(cache.scheduler_metadata or ()))
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    return all(repeat.plain(x) and not x.is_meta for x in tensors)


def _by_operators(q, k_cache, v_cache, cache: Cache, options: Options) -> Result:
    """As torch has it."""
    call = _checked(q, k_cache, v_cache, cache, options)
    q, packing = call.q, call.packing
    if call.append is not None:
        seqlens, rotated = torch.ops.cute_flash.append.default(*call.append)
        packing = packing._replace(seqused_k=seqlens)
        q = q if call.append.q is None else rotated
    return repeat.forward(q, k_cache, v_cache, packing, call.options)


def _first(keys: tuple[Hashable, Hashable], q, k_cache, v_cache, cache: Cache, options: Options) -> Result:
    """The first call of its key, that of both halves and that of attention: by all checks, and remembered."""
    if not _plain(q, k_cache, v_cache, cache):
        return _by_operators(q, k_cache, v_cache, cache, options)
    call = _checked(q, k_cache, v_cache, cache, options)
    bound, reached = None, ()
    if call.append is not None:
        bound = appending.answer(call.append, call.found)
        reached = kv_contents.reaches(call.append)
    result = repeat.forward(call.q, k_cache, v_cache, call.packing, call.options)
    attention = repeat.remembered(keys[1])
    if attention is not None and (bound is not None or call.append is None):
        repeat.remember(_DECIDED, keys[0], _Decided(bound, reached, attention))
    return result
