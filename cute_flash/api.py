"""The public functions: flash-attn 2's arguments in its order and meaning, and keyword-only extras.

    q, k, v     float16 or bfloat16, (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim);
                the last dimension contiguous, all other strides multiples of 16 bytes
    positions   query row i of a sequence stands at key position i + seqlen_k - seqlen_q; a sequence has up to
                2**30 - 2**20 - 1 queries and as many keys
    a score     softmax_scale * q·k, then softcap, ALiBi, `score`; then what the masks hide is -inf
    numbers     scores of any size that float32 holds are as accurate as small ones; parts of the keys are
                merged as accurately up to about 4000. P V is summed in float32 before it is normalised, and
                overflows where values come near the largest of bfloat16. A NaN or an infinity in a row of q,
                in keys or values beyond a sequence's length or in another sequence reaches no other row; in
                a value that only a mask hides it may reach any row whose tile holds it, for 0 * NaN is NaN

    gradients   of q, k, v and learnable_sink, through out and through lse where it is returned (Dao 2023,
                algorithm 2); 0 for queries without keys, keys that no query sees and rows out of use. dq, and
                dk and dv where heads share k and v, are summed in float32 in no fixed order: last bits may
                differ from call to call. There are none of what a rule holds, and none of a second order

Errors: TypeError, ValueError and NotImplementedError name the argument, what was given and what is
allowed; RuntimeError for CPU tensors without an emulated device.
"""

from __future__ import annotations

from typing import Any

import torch

from . import decoding, latent, ops, quantized, repeat, request, widened
from .block_mask import BlockMask
from .kv_cache import Cache
from .quantized import Descale
from .repeat import Result
from .request import Options, Packing
from .scheduling import SchedulerMetadata


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    block_mask: BlockMask | None = None,
    num_splits: int | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    quantization_block: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Exact attention on dense batches, in O(seqlen) memory (Dao et al. 2022; Dao 2023).

    q: (batch, seqlen_q, heads, head_dim). k: (batch, seqlen_k, heads_kv, head_dim).
    v: (batch, seqlen_k, heads_kv, head_dim_v). heads is a multiple of heads_kv: query head i uses
        head i // (heads // heads_kv) of k and v (Ainslie et al. 2023). Head dims: 8 to 576 by 8, with
        a gradient to 256.
    dropout_p: probability that a softmax weight is set to 0, the others being scaled up. The mask is
        Philox's (Salmon et al. 2011) from a seed that torch's default generator of q's device draws:
        after the same `torch.manual_seed`, the same mask on every architecture.
    softmax_scale: factor on q·k, above 0; head_dim**-0.5 if None.
    causal: a query sees keys up to its own position: the lower right corner is the last key.
    window_size: (left, right), how many keys before and after its position a query sees, inclusive;
        -1 or None is unbounded. causal makes right 0.
    softcap: scores become softcap * tanh(score / softcap); 0.0 is off.
    alibi_slopes: float32 (heads,) or (batch, heads): slope * |distance| is taken off (Press et al. 2022).
    deterministic: the same call gives the same bits of out and lse either way. True: a row's bits depend on
        its sequence alone, not on the batch, the heads or the other queries: num_splits, where it is left
        open, is 1; and gradients have the same bits whenever they are computed. Without it the order in which
        CTAs add to dq, and to dk and dv where heads share k and v, is left to chance: last bits vary.
        (On compute capability 10.0 with causal or window_size the last bits may differ with the number of
        queries: blocks that are wholly visible to all of a tile's compute some exponentials by polynomials.)
    return_attn_probs: also return lse and S_dmask, the float32 softmax weights before dropout, (batch,
        heads, seqlen_q, seqlen_k), with a minus sign where dropout removed them. For tests only: it is
        computed by plain torch in O(seqlen**2) memory.
    mask: a `Mask` object (`Causal`, `SlidingWindow`, `PrefixLM`, `Document`, your own), or a plain
        function visible(q, k) of two positions. A pair must be visible to causal, window and mask alike.
    score: a `Score` object, or a plain function score(s, batch, head, q, k) of a scaled score.
    learnable_sink: (heads,), a score per query head that takes part in the softmax's sum and has no
        value (gpt-oss).
    return_lse: also return lse.
    out: (batch, seqlen_q, heads, head_dim_v), where the result is written; it must not overlap inputs.
    block_mask: a `BlockMask`: only its blocks are computed, and its own rule takes the place of causal,
        window_size and mask. Its block sizes must be multiples of a kernel's tile, as 128 always is.
    num_splits: in how many parts, 1 to 128, the keys are taken at the same time and then merged in float32
        (Flash-Decoding, Dao et al. 2023): for few queries and many keys. None or 0: as many as fill the GPU,
        so that a row's last bits may depend on how large the call is; 1 where the kernel cannot split;
        more than 1 there is NotImplementedError.
    q_descale, k_descale, v_descale: of q, k and v of float8_e4m3fn or float8_e5m2, all three of one, what
        their numbers are multiplied by, above 0: float32 (batch, heads_kv), of which q's is for all heads
        that share a KV head; or with a quantization_block of 64 or 128 rows a number for each: (batch, heads
        or heads_kv, blocks). None: 1. Without gradients, dropout and return_attn_probs.
    out_dtype: of the result for such q, k and v: bfloat16 or float16; if None out's, or bfloat16.

    Returns out, (batch, seqlen_q, heads, head_dim_v) in q's dtype; (out, lse) with return_lse, lse the
    natural log of the softmax's sum, float32 (batch, heads, seqlen_q); (out, lse, S_dmask) with
    return_attn_probs. A query that sees no key has out 0 and lse -inf, or the sink's score.
    """
    lse = return_lse or return_attn_probs
    # By position, here and below: keywords would cost every call a microsecond. A test holds the order.
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        lse, out, block_mask, num_splits, deterministic,
    )
    descale = Descale(q_descale, k_descale, v_descale, quantization_block, out_dtype)
    if quantized.is_meant(q, descale):
        if return_attn_probs:
            raise NotImplementedError("return_attn_probs is True; allowed for q of 8 bits: False")
        return _result(quantized.forward(q, k, v, None, options, descale), return_lse)
    return _dense(q, k, v, options, return_lse, return_attn_probs)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    block_mask: BlockMask | None = None,
    num_splits: int | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    quantization_block: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Exact attention on sequences of different lengths, packed one after the other without padding.

    q: (total_q, heads, head_dim). k: (total_k, heads_kv, head_dim). v: (total_k, heads_kv, head_dim_v).
    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,), contiguous: the first row of each sequence, from 0,
        and the end of the last. Their numbers are checked for CPU tensors; for CUDA tensors, which would
        have to wait for the GPU, where CUTE_FLASH_CHECK=1 is set.
    max_seqlen_q, max_seqlen_k: at least the longest sequence's length; longer costs idle blocks.
    seqused_q, seqused_k: int32 (batch,): use only so many rows of each sequence. Rows of q beyond get
        out 0 and lse -inf.
    block_table: int32 (batch, pages), contiguous: k is (num_pages, page_size, heads_kv, head_dim), v as k,
        and key j of sequence b is row j % page_size of page block_table[b, j // page_size]. seqused_k, or
        else cu_seqlens_k, says how many keys a sequence has; one of both may be None. Nothing else is used:
        neither a page's rows beyond the last key nor the table's numbers there. No gradients.
    block_mask: for dense batches only: NotImplementedError unless None.
    q_descale, k_descale, v_descale, with a quantization_block: (batch, heads or heads_kv, blocks), as many
        blocks as max_seqlen_q or max_seqlen_k rows have, counted from the first row of each sequence; of
        pages, as many as the block_table has room for.
    q of 16 bits beside pages of 8: as in `flash_attn_with_kvcache`.
    All others: as in `flash_attn_func`; alibi_slopes (heads,) or (batch, heads); tables of rules by
    sequence and position inside it. return_attn_probs: NotImplementedError if True.

    Returns out, (total_q, heads, head_dim_v); with return_lse (out, lse), lse float32 (heads, total_q).
    Rows that belong to no sequence, beyond cu_seqlens_q[-1], are not written.
    """
    if block_mask is not None:
        raise NotImplementedError(
            "block_mask is given; allowed for packed sequences: None, for its blocks are of one seqlen_q and "
            "seqlen_k. Use flash_attn_func, or a mask: blocks that it hides are skipped where it has bounds"
        )
    _refuse_probabilities(return_attn_probs)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, out, num_splits=num_splits, deterministic=deterministic,
    )
    packing = Packing(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k,
        block_table is not None, None, None, block_table,
    )  # fmt: skip
    descale = Descale(q_descale, k_descale, v_descale, quantization_block, out_dtype)
    if block_table is not None and widened.is_meant(q, k, v):
        return _result(widened.forward(q, k, v, packing, options, descale), return_lse)
    if quantized.is_meant(q, descale):
        return _result(quantized.forward(q, k, v, packing, options, descale), return_lse)
    return _result(repeat.forward(q, k, v, packing, options), return_lse)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    block_mask: BlockMask | None = None,
    num_splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`flash_attn_func` of q, k and v in one tensor, whose gradient is written in place, part by part.

    qkv: (batch, seqlen, 3, heads, head_dim): q, k and v are qkv[:, :, 0], [:, :, 1] and [:, :, 2].
    All others, what is returned and what is raised: as in `flash_attn_func`.
    """
    qkv = request.joint("qkv", qkv, ("batch", "seqlen"))
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse or return_attn_probs, out, block_mask, num_splits, deterministic, qkv,
    )
    return _dense(*qkv.unbind(2), options, return_lse, return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    block_mask: BlockMask | None = None,
    num_splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`flash_attn_func` of k and v in one tensor, whose gradient is written in place, part by part.

    q: (batch, seqlen_q, heads, head_dim).
    kv: (batch, seqlen_k, 2, heads_kv, head_dim): k and v are kv[:, :, 0] and kv[:, :, 1].
    All others, what is returned and what is raised: as in `flash_attn_func`.
    """
    kv = request.joint("kv", kv, ("batch", "seqlen"))
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse or return_attn_probs, out, block_mask, num_splits, deterministic, kv,
    )
    return _dense(q, *kv.unbind(2), options, return_lse, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`flash_attn_varlen_func` of q, k and v in one tensor, whose gradient is written in place, part by part.

    qkv: (total, 3, heads, head_dim): q, k and v are qkv[:, 0], qkv[:, 1] and qkv[:, 2].
    cu_seqlens, max_seqlen, seqused: of queries and keys alike.
    All others, what is returned and what is raised: as in `flash_attn_varlen_func`.
    """
    _refuse_probabilities(return_attn_probs)
    qkv = request.joint("qkv", qkv, ("total",))
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, out, num_splits=num_splits, deterministic=deterministic, joint=qkv,
    )
    packing = Packing(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, seqused, seqused)
    return _result(repeat.forward(*qkv.unbind(1), packing, options), return_lse)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`flash_attn_varlen_func` of k and v in one tensor, whose gradient is written in place, part by part.

    q: (total_q, heads, head_dim). kv: (total_k, 2, heads_kv, head_dim): k and v are kv[:, 0] and kv[:, 1].
    All others, what is returned and what is raised: as in `flash_attn_varlen_func`.
    """
    _refuse_probabilities(return_attn_probs)
    kv = request.joint("kv", kv, ("total",))
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, out, num_splits=num_splits, deterministic=deterministic, joint=kv,
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    return _result(repeat.forward(q, *kv.unbind(1), packing, options), return_lse)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int | None = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    scheduler_metadata: SchedulerMetadata | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    quantization_block: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention to the keys of a cache, after new ones are appended to it, in place: prefill and decoding.

    Nothing reads a length on the host, so that a CUDA graph serves every length; they are checked as
    cu_seqlens are. A sequence's keys are those in the cache and the new ones: masks, windows and ALiBi count
    from its last, new ones included. What lies in the cache beyond them, NaN too, reaches no result.

    q: (batch, seqlen_q, heads, head_dim), or packed (total_q, heads, head_dim), with cu_seqlens_q int32
        (batch + 1,) and max_seqlen_q as in `flash_attn_varlen_func`.
    k_cache: (batch_cache, seqlen_cache, heads_kv, head_dim), or pages of any size (pages, page_size,
        heads_kv, head_dim). v_cache: the same with head_dim_v.
    k, v: (batch, seqlen_new, heads_kv, head_dim or head_dim_v), new keys and values. Key j of a sequence is
        written at position cache_seqlens + j of its row of the cache or of its pages.
    rotary_cos, rotary_sin: (seqlen_rotary, rotary_dim / 2) in q's dtype, as many rows as a sequence may have
        keys in the cache: new keys and q are rotated in float32 and rounded once, the keys before they are
        written. rotary_dim is a multiple of 16 up to head_dim. Only with k and v.
    cache_seqlens: int32 (batch,), or an int: keys in the cache before new ones are appended, counted from
        the cache's first position. None: all that there is room for. An int is made a tensor in every call.
    cache_batch_idx: int32 (batch,): the row of the cache of each sequence, instead of its own number.
    cache_leftpad: int32 (batch,): the position of each sequence's first key; none before it is read.
    block_table, page_table: int32 (batch, max_pages), two names of one argument: the pages of each sequence,
        in order; behind those in use it may hold anything. Not with cache_batch_idx or cache_leftpad.
    rotary_interleaved: pairs are neighbours, (0, 1), (2, 3), ...; False: of the halves of rotary_dim (NeoX).
    rotary_seqlens: int32 (batch,): the position of the first new key in the rotary tables, instead of
        cache_seqlens. Query i stands at that position + i where causal, a window or a mask is given, and
        all queries at that position elsewhere.
    num_splits: as in `flash_attn_func`; few queries of many keys are split to fill the GPU where it is 0.
    qv: (batch, seqlen_q, heads, head_dim_v), or packed as q: scores are q k + qv v, and softmax_scale is by
        default (head_dim + head_dim_v)^-0.5: latent attention, absorbed (MLA, DeepSeek-V2 2024, section 2.1).
        v_cache and k_cache are then row[..., :head_dim_v] and row[..., head_dim_v:] of one tensor. The same
        as [qv, q] beside the whole row as k_cache; rows of more than 256 numbers are read once. Not with k.
    batch_invariant: a sequence's bits depend on its own keys and queries, not on the others nor on how many
        there are: num_splits, where it is left open, comes from the cache's room alone (a row's keys, or the
        table's pages), a part for each 1024 keys of it, and is 1 with a window or a mask. Of packed queries
        max_seqlen_q must be the same, too. Without it as many parts as fill the GPU.
    scheduler_metadata: from `get_scheduler_metadata`, made for calls like this one: in how many parts the
        keys of each sequence are taken, and in which order, by lengths on the device. Beside it num_splits is
        left open or its own. Without it all sequences have as many parts, which the cache's room decides.
    q_descale, k_descale, v_descale, quantization_block, out_dtype: of q and a cache of float8_e4m3fn or
        float8_e5m2, all of one, as in `flash_attn_func`, with a scale for each sequence and KV head or for
        each block of a sequence's rows, counted from its first query and its first key in use: (batch, heads
        or heads_kv, blocks), as many as seqlen_q or max_seqlen_q rows have, and as the cache has room for.
        k and v are then of the cache's dtype, divided by its scales, and written as they are: nothing is
        rotated.
        With q of 16 bits beside such a cache k and v are widened to its dtype, exactly, and multiplied as
        they are of 16 bits; q_descale and quantization_block are None, and the result has q's dtype.
    All others: as in `flash_attn_func`.

    Returns out, shaped as q with head_dim_v; (out, lse) with return_softmax_lse, lse float32 (batch, heads,
    seqlen_q), or (heads, total_q). There are no gradients. Two keys that are to be written to one place, by
    cache_batch_idx or block_table, are a ValueError where numbers are looked at.
    """
    widens = widened.is_meant(q, k_cache, v_cache)
    if qv is not None:
        if widens:
            raise NotImplementedError("qv is given beside a cache of 8 bits; allowed: None")
        if k is not None:
            raise NotImplementedError("k is given beside qv; allowed: None, others write a row's parts")
        q, k_cache, v_cache = latent.joined(q, qv, k_cache, v_cache)
    if page_table is not None:
        if block_table is not None:
            raise ValueError("block_table and page_table are given, two names of one argument; allowed: one")
        block_table = page_table
    cache = Cache(
        k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table,
        bool(rotary_interleaved), rotary_seqlens, cu_seqlens_q, max_seqlen_q, bool(batch_invariant),
        scheduler_metadata,
    )
    options = Options(
        0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_softmax_lse, out, num_splits=num_splits,
    )
    descale = quantized.Descale(q_descale, k_descale, v_descale, quantization_block, out_dtype)
    if widens:
        found = decoding.forward_widened(q, k_cache, v_cache, cache, options, descale)
    elif quantized.is_meant(q, descale):
        found = decoding.forward_quantized(q, k_cache, v_cache, cache, options, descale)
    else:
        found = decoding.forward(q, k_cache, v_cache, cache, options)
    return _result(found, return_softmax_lse)


def _dense(q, k, v, options: Options, return_lse: bool, return_attn_probs: bool) -> Any:
    if not return_attn_probs:
        return _result(repeat.forward(q, k, v, None, options), return_lse)
    call = repeat.checked(q, k, v, None, options)
    return *ops.forward(call, options.out), ops.probabilities(call)


def _refuse_probabilities(asked: bool) -> None:
    if asked:
        raise NotImplementedError(
            "return_attn_probs is True; allowed for packed sequences: False. Use flash_attn_func on one "
            "sequence at a time, or return_lse=True for the log-sum-exp"
        )


def _result(found: Result, return_lse: bool) -> Any:
    return tuple(found) if return_lse else found.out
