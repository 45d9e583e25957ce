"""Splits of keys and the order of sequences, decided on the device by lengths that the host never reads.

What is launched is decided by sizes alone, with an upper bound for the parts of a sequence's keys: the number
of CTAs and the workspace are the same for every length, and a CUDA graph captured once serves them all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import request, rules, scalars
from .arch.kernel import Steps
from .arch.packing import count_tiles
from .arch.problem import Device, KvCache, Sizes
from .arch.quantized import DTYPES
from .dispatch import dispatch, place_of, plan
from .latent import STEP, WIDER_THAN, heads_are_rows, serves
from .problems import problem, sizes_of
from .request import Call

INT32 = (torch.int32,)
# A CTA takes up to this ratio of an equal share, for parts that are rounded up (FlashAttention-3's rule).
MARGIN = 11, 10


class SchedulerMetadata(NamedTuple):
    """How the sequences of a call are shared out, from `get_scheduler_metadata`.

    splits: int32 (batch,), in how many parts the keys of each sequence are taken, 1 to num_splits.
    order: int32 (batch,), the sequences, each once, in the order in which CTAs take them.
    num_splits: for so many parts of every sequence there are CTAs and workspace.
    made_for: the kernel, its config and the sizes of the only calls that take it.
    """

    splits: torch.Tensor
    order: torch.Tensor
    num_splits: int
    made_for: str


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    has_softcap: bool = False,
    num_splits: int | None = 0,
    *,
    alibi_slopes: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    latent: bool = False,
    kv_dtype: torch.dtype | None = None,
    quantization_block: int | None = None,
    out: SchedulerMetadata | None = None,
) -> SchedulerMetadata:
    """Share out the keys of `flash_attn_with_kvcache` among CTAs, by lengths that stay on the device.

    Long sequences are taken in more parts than short ones, each about as long as a CTA's equal share of all,
    and before them. Nothing is read on the host: some small operations of torch's run on the device, which a
    CUDA graph captures, with the calls behind them or apart. One result serves the calls of all layers; after
    lengths have changed it still gives right values, only not evenly shared out. Names and the rule are those
    of FlashAttention-3's function; parts of keys: Dao et al. 2023, "Flash-Decoding".

    batch_size, max_seqlen_q, num_heads_q, num_heads_kv, headdim, headdim_v (headdim if None), qkv_dtype: of
        q and the cache, of 16 bits or float8_e4m3fn or float8_e5m2. max_seqlen_q: queries of a sequence, of
        the longest if packed.
    max_seqlen_k: keys that a sequence may have, new ones included: what the cache has room for, or fewer.
    cache_seqlens: int32 (batch,), keys in the cache before `max_seqlen_k_new` new ones are appended.
    cu_seqlens_q: int32 (batch + 1,), of packed q. cache_leftpad: int32 (batch,). page_size: keys of a page.
    causal, window_size, alibi_slopes, mask, score: as the call has them. has_softcap: whether it has one.
    latent: v_cache is the beginning of k_cache's rows, of more than 256 numbers, headdim; headdim_v is a
        multiple of 64. Of single queries the calls then have no sinks.
    kv_dtype: of the cache, float8_e4m3fn or float8_e5m2, where it is not qkv_dtype.
    quantization_block: as the call has it, beside a qkv_dtype of 8 bits.
    num_splits: an upper bound for the parts of one sequence's keys, 1 to 128; 0 or None: as many as a single
        sequence of max_seqlen_k keys is split in to fill the GPU. Workspace grows with it:
        num_splits * batch * seqlen_q * heads * (head_dim_v + 1) numbers in float32.
    out: written in place and returned, instead of new tensors; it must have been made by the same arguments.

    Returns a SchedulerMetadata, for `scheduler_metadata` of calls with the same arguments; others refuse it
    with a ValueError that says what it was made for. TypeError and ValueError name an argument that is wrong,
    NotImplementedError what no kernel serves. Not within torch.compile.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "get_scheduler_metadata is traced by torch.compile; allowed: calls outside of it"
        )
    sizes = _sizes(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv)
    of_bits = _of_bits(qkv_dtype, kv_dtype, quantization_block)
    new, numbers = scalars.length("max_seqlen_k_new", max_seqlen_k_new), (sizes.batch,)
    _check_numbers("cache_seqlens", cache_seqlens, cache_seqlens, numbers)
    for name, given, shape in (
        ("cu_seqlens_q", cu_seqlens_q, (sizes.batch + 1,)), ("cache_leftpad", cache_leftpad, numbers)
    ):  # fmt: skip
        if given is not None:
            _check_numbers(name, given, cache_seqlens, shape)
    if page_size is not None and not scalars.length("page_size", page_size):
        raise ValueError("page_size is 0; allowed: 1 or more, or None")
    masks = rules.mask_of(
        bool(causal) and sizes.seqlen_q != 1,  # a single query sees all keys
        scalars.window(window_size, sizes.seqlen_q, sizes.seqlen_k),
        mask,
    )
    if latent and not serves(headdim, headdim if headdim_v is None else headdim_v):
        raise ValueError(
            f"latent is {latent} with headdim {headdim} and headdim_v {headdim_v}; allowed: headdim above "
            f"{WIDER_THAN}, and headdim_v, a multiple of {STEP}, up to it"
        )
    if latent and cu_seqlens_q is None and heads_are_rows(
        sizes.seqlen_q, sizes.heads_q, sizes.heads_kv, window_size, mask, score, alibi_slopes
    ):
        sizes = sizes._replace(seqlen_q=sizes.heads_q, heads_q=1)
    scores = rules.score_of(1.0 if has_softcap else 0.0, alibi_slopes, score)
    asked = problem(
        dtype=qkv_dtype,
        head_dim=headdim,
        head_dim_v=headdim_v,
        code=rules.encode(masks, scores).code,
        varlen=cu_seqlens_q is not None,
        seqused_k=True,
        gqa=sizes.heads_q != sizes.heads_kv,
        cache=KvCache(page_size=page_size, leftpad=cache_leftpad is not None, latent=bool(latent)),
        scheduled=True,
        **of_bits,
    )
    device, bound = place_of(cache_seqlens.device).device, scalars.num_splits(num_splits, False)
    if not bound:
        kernel, _ = dispatch(asked, device)
        bound = kernel.splits(asked, device, sizes._replace(batch=1))
    planned = plan(asked, device, sizes, bound)
    keys = cache_seqlens + new if cache_leftpad is None else cache_seqlens + new - cache_leftpad
    shares = _shared_out(keys.clamp(min=0), planned, device, sizes, bound, rows=cu_seqlens_q)
    found = SchedulerMetadata(*shares, bound, made_for(planned, sizes, bound))
    return found if out is None else _into(out, found)


def _shared_out(keys: torch.Tensor, planned: Steps, device: Device, sizes: Sizes, bound: int, *, rows: Any):
    """(splits, order) of sequences of so many keys. rows: cu_seqlens_q, where queries are packed."""
    kernel, asked, config = planned.steps[0].compiled
    blocks = (keys + (config.tile_n - 1)) // config.tile_n
    tiles = count_tiles(config.tile_m, config.heads, sizes._replace(batch=1))
    if rows is not None:
        of_a_tile = config.tile_m // config.heads
        groups = count_tiles(config.tile_m, config.heads, sizes._replace(batch=1, seqlen_q=1))
        tiles = (rows.diff() + (of_a_tile - 1)) // of_a_tile * groups
    at_once = kernel.tuning.at_once(config, asked, device)
    more, than = MARGIN
    total = (blocks.long() * tiles).sum() * more
    share = ((total + (at_once * than - 1)) // (at_once * than)).clamp(min=1)
    splits = ((blocks + (share - 1)) // share).clamp(1, bound)
    return splits.int(), torch.argsort(blocks, descending=True, stable=True).int()


def _of_bits(qkv_dtype: Any, kv_dtype: Any, block: Any) -> dict[str, Any]:
    """What a problem is told of q or a cache of 8 bits, if there is one."""
    narrow = {getattr(torch, name): name for name in DTYPES}
    if qkv_dtype not in (*request.DTYPES, *narrow):
        raise TypeError(f"qkv_dtype is {qkv_dtype}; allowed: {_listed(*request.DTYPES, *narrow)}")
    if qkv_dtype in narrow:
        if kv_dtype not in (None, qkv_dtype):
            raise TypeError(f"kv_dtype is {kv_dtype}; allowed beside {qkv_dtype}: None, {qkv_dtype}")
        return {"block": scalars.quantization_block(block)}
    if block is not None:
        raise ValueError(f"quantization_block is {block!r}; allowed beside {qkv_dtype}: None")
    if kv_dtype in (None, qkv_dtype):
        return {}
    if kv_dtype not in narrow:
        raise TypeError(f"kv_dtype is {kv_dtype}; allowed: {_listed(None, qkv_dtype, *narrow)}")
    return {"kv_dtype": narrow[kv_dtype]}


def _listed(*values: Any) -> str:
    return ", ".join(map(str, values))


def _sizes(batch: Any, seqlen_q: Any, seqlen_k: Any, heads_q: Any, heads_kv: Any) -> Sizes:
    names = ("batch_size", "num_heads_q", "num_heads_kv", "max_seqlen_q", "max_seqlen_k")
    given = zip(names, (batch, heads_q, heads_kv, seqlen_q, seqlen_k), strict=True)
    sizes = Sizes(*(scalars.length(name, value) for name, value in given))
    if sizes.heads_kv == 0 or sizes.heads_q % sizes.heads_kv:
        raise ValueError(
            f"num_heads_q is {sizes.heads_q}, num_heads_kv {sizes.heads_kv}; allowed: a multiple of it"
        )
    return sizes


def _check_numbers(name: str, given: Any, beside: Any, shape: tuple[int, ...]) -> None:
    request.check_tensor(name, given, beside, INT32, 1)
    if given.shape != shape:
        raise ValueError(f"{name} has {given.shape[0]} numbers; allowed: {shape[0]}")


def _into(out: SchedulerMetadata, found: SchedulerMetadata) -> SchedulerMetadata:
    """Copy, so that what a captured call reads is up to date."""
    if not isinstance(out, SchedulerMetadata):
        raise TypeError(f"out is {type(out).__name__}; allowed: SchedulerMetadata")
    if out[2:] != found[2:]:
        raise ValueError(f"out is for {out.made_for}; allowed: for {found.made_for}")
    out.splits.copy_(found.splits)
    out.order.copy_(found.order)
    return out


def made_for(planned: Steps, sizes: Sizes, num_splits: int) -> str:
    """What tells calls apart that take another metadata."""
    kernel, asked, config = planned.steps[0].compiled
    packed = "packed " if asked.varlen else ""
    return (
        f"{kernel.name} with {config}, {sizes.batch} {packed}sequences of up to {sizes.seqlen_q} queries, "
        f"{sizes.heads_q} heads and {sizes.heads_kv} of keys, num_splits {num_splits}"
    )


def check(metadata: Any, q: torch.Tensor, batch: int) -> None:
    """What shapes and types tell."""
    if not isinstance(metadata, SchedulerMetadata):
        raise TypeError(
            f"scheduler_metadata is {type(metadata).__name__}; allowed: a SchedulerMetadata, from "
            "get_scheduler_metadata"
        )
    for name in ("splits", "order"):
        request.check_tensor(f"scheduler_metadata.{name}", getattr(metadata, name), q, INT32, 1)
        if (found := getattr(metadata, name).shape[0]) != batch:
            raise ValueError(
                f"scheduler_metadata.{name} has {found} numbers; allowed: {batch}, one per sequence"
            )


def splits_of(metadata: SchedulerMetadata, given: Any) -> int:
    """A call's num_splits: the metadata's, which the call may repeat."""
    if given not in (None, 0, metadata.num_splits):
        raise ValueError(
            f"num_splits is {given} beside scheduler_metadata; allowed: None, 0 or its own, "
            f"{metadata.num_splits}"
        )
    return metadata.num_splits


def check_plan(call: Call, planned: Steps) -> None:
    """ValueError where a call's metadata was made for other calls than those that are planned so."""
    if call.sequence_order is None:
        return
    wanted = made_for(planned, sizes_of(call), call.num_splits)
    if call.scheduled_for != wanted:
        raise ValueError(f"scheduler_metadata is for {call.scheduled_for}; allowed: for {wanted}")
