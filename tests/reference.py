"""The oracle: attention in plain torch, in float64 unless told otherwise, one sequence and head at a time.

    S = softmax_scale q·k -> softcap -> ALiBi -> score rule -> mask -> softmax (sink) -> dropout -> P V

Positions: a query's is its row + seqlen_k - seqlen_q, a key's is its row. Arguments have the names, shapes
and meaning that cute_flash's have, except dropout, which is told its seed.
"""

from __future__ import annotations

import math
from inspect import isfunction
from typing import Any, NamedTuple

import torch

WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """Kept with probability 1 - p, by 16 bits of Philox4x32-7 for each (batch, head, row, key)."""

    p: float
    seed: int
    offset: int

    @property
    def threshold(self) -> int:
        """An element is kept where its 16 bits are below this."""
        return round((1 - self.p) * 65536)


class Call(NamedTuple):
    """What a call asks besides tensors and lengths."""

    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    softcap: float = 0.0
    alibi_slopes: Any = None
    score: Any = None
    mask: Any = None
    learnable_sink: Any = None
    dropout: Dropout | None = None
    block_mask: Any = None


def attention(q, k, v, *, compute=torch.float64, cu_seqlens_q=None, cu_seqlens_k=None, **call):
    """out (batch, seqlen_q, heads, dim_v) and lse (batch, heads, seqlen_q), both in `compute`.

    With cu_seqlens_q and cu_seqlens_k: (total_q, heads, dim_v) and (heads, total_q).
    """
    if cu_seqlens_q is None:
        starts = (torch.arange(len(x) + 1) * x.shape[1] for x in (q, k))
        out, lse = packed(*(x.flatten(0, 1).to(compute) for x in (q, k, v)), *starts, **call)
        return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1)
    return packed(*(x.to(compute) for x in (q, k, v)), cu_seqlens_q, cu_seqlens_k, **call)


def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *, seqused_q=None, seqused_k=None, **call):
    """(total, heads, dim) tensors; sequence b's rows start at cu_seqlens[b]."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    lengths_q = cu_seqlens_q.diff() if seqused_q is None else seqused_q
    lengths_k = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full((heads, len(q)), -math.inf)
    for b in range(len(lengths_q)):
        rows = slice(cu_seqlens_q[b], cu_seqlens_q[b] + lengths_q[b])
        keys = slice(cu_seqlens_k[b], cu_seqlens_k[b] + lengths_k[b])
        for h in range(heads):
            tiles = q[rows, h], k[keys, h // group], v[keys, h // group]
            out[rows, h], lse[h, rows] = one_head(*tiles, (b, h, heads), Call(**call))
    return out, lse


def gradients(tensors, dout, dlse, *, compute=torch.float64, learnable_sink=None, **call):
    """What sum(out * dout) + sum(lse * dlse) changes by, for q, k, v and, where there is one, the sink.

    By autograd in `compute`, in which the gradients are. dout, dlse: shaped as out and lse, NaN where unread.
    """
    given = tuple(x.to(compute) for x in (*tensors, learnable_sink) if x is not None)

    def function(q, k, v, sink=None):
        return attention(q, k, v, compute=compute, learnable_sink=sink, **call)

    return torch.autograd.functional.vjp(function, given, (dout.to(compute), dlse.to(compute)))[1]


def one_head(q, k, v, where: tuple[int, int, int], call: Call):
    """(out, lse) of q (seqlen_q, dim), k (seqlen_k, dim), v (seqlen_k, dim_v); where: batch, head, heads."""
    batch, head, heads = where
    scale = q.shape[1] ** -0.5 if call.softmax_scale is None else call.softmax_scale
    s = scores(q @ k.T * scale, batch, head, call)
    if call.learnable_sink is not None:
        s = torch.cat([s, call.learnable_sink[head].to(s).expand(len(s), 1)], dim=1)
    without = s.isneginf().all(dim=1)  # rows without keys: softmax has no value there, and no gradient
    s = s.masked_fill(without[:, None], 0.0)
    lse = s.logsumexp(dim=1).masked_fill(without, -math.inf)
    p = s.softmax(dim=1)[:, : len(k)].masked_fill(without[:, None], 0.0)
    if call.dropout is None:
        return p @ v, lse
    keep = keep_mask(call.dropout, batch * heads + head, *p.shape)
    return p.masked_fill(~keep, 0.0) @ v * (65536 / call.dropout.threshold), lse


def scores(s, batch: int, head: int, call: Call):
    """Scaled scores (seqlen_q, seqlen_k) after every rule, -inf where masked."""
    rows, keys = s.shape
    at, dtype = (batch, head, rows, keys), s.dtype
    q, k = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None, :]
    if call.softcap:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.alibi_slopes is not None:
        slope = call.alibi_slopes[(batch, head)[-call.alibi_slopes.ndim :]]
        s = s - slope.to(s) * (q - k).abs()
    if call.score is not None:
        rule = call.score if isfunction(call.score) else call.score.at(*at).score
        s = rule(s, batch, head, q, k)
    left, right = (None if side in (None, -1) else side for side in call.window_size)
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if call.causal:
        visible &= k <= q
    if left is not None:
        visible &= k >= q - left
    if right is not None:
        visible &= k <= q + right
    if call.mask is not None:
        rule = call.mask if isfunction(call.mask) else call.mask.at(*at).visible
        visible &= rule(q, k)
    if call.block_mask is not None:
        visible &= in_blocks(call.block_mask, at)
    return s.to(dtype).masked_fill(~visible, -math.inf)


def in_blocks(block_mask, at: tuple[int, int, int, int]):
    """(seqlen_q, seqlen_k) bool: pairs in full blocks, and in partial ones where the rule shows them."""
    batch, head, rows, keys = at
    block_q, block_k = block_mask.block_size
    counts, indices = (x[min(batch, len(x) - 1)] for x in (block_mask.counts, block_mask.indices))
    counts, indices = (x[min(head, len(x) - 1)].tolist() for x in (counts, indices))
    q, k = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None, :]
    shown, mask = torch.ones(rows, keys, dtype=torch.bool), block_mask.mask
    if mask is not None:
        shown &= (mask if isfunction(mask) else mask.at(*at).visible)(q, k)
    visible = torch.zeros(rows, keys, dtype=torch.bool)
    for i, (partial, full) in enumerate(counts):
        for place, j in enumerate(indices[i][: partial + full]):
            pairs = slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
            visible[pairs] = shown[pairs] if place < partial else True
    return visible


def keep_mask(dropout: Dropout, batch_head: int, rows: int, keys: int) -> torch.Tensor:
    """(rows, keys) bool: what is kept of one head, batch_head = batch * heads + head.

    One Philox call serves the keys 2t and 2t + 1 (mod 8) of 32 consecutive keys: eight 16-bit numbers.
    """
    row, k = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    key = dropout.seed & WORD, (dropout.seed >> 32 ^ dropout.offset >> 32) & WORD
    rest = torch.tensor(batch_head), torch.tensor(dropout.offset & WORD)
    words = philox(torch.broadcast_tensors(k // 32 * 4 + k % 8 // 2, row, *rest), key)
    number = (k % 32 // 8 * 2 + k % 2).expand(rows, keys)
    word = torch.stack(words).gather(0, (number // 2)[None])[0]
    return (word >> number % 2 * 16 & 0xFFFF) < dropout.threshold


def philox(counter, key: tuple[int, int], rounds: int = 7):
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).

    counter: four int64 tensors of 32-bit words. Returns four such tensors.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        (high0, low0), (high1, low1) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def multiply(a: int, b):
    """High and low word of the product of two 32-bit words, without overflowing 63 bits."""
    low = (a & 0xFFFF) * b
    rest = (a >> 16) * b + (low >> 16)
    return rest >> 16, (rest & 0xFFFF) << 16 | (low & 0xFFFF)
