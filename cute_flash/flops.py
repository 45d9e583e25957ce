"""What torch's FlopCounterMode counts for a call: two products, as for scaled_dot_product_attention;
five of its gradients.

    2 * heads * seqlen_q * seqlen_k * (head_dim + head_dim_v)    of each sequence

Like torch's, the count knows no masks: a causal call counts every pair of query and key. Of packed
sequences it takes the lengths in cu_seqlens, for which it waits for the GPU, and where they cannot be read
(meta and fake tensors) the longest of each. Of keys in a cache it takes the longest sequence's for every
query.
"""

from __future__ import annotations

from typing import Any

import torch

from .request import Call


def of_forward(*arguments: Any, out_val: Any = None) -> int:
    """Floating-point operations of the operators `forward` and `probabilities`, from their arguments."""
    call = Call(*arguments)
    per_pair = 2 * call.q.shape[-2] * (call.q.shape[-1] + call.v.shape[-1])
    if call.cached:
        rows_q = call.q.numel() // (call.q.shape[-2] * call.q.shape[-1])
        return per_pair * rows_q * call.max_seqlen_k
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return per_pair * call.q.shape[0] * call.q.shape[1] * call.k.shape[1]
    lengths = zip(
        _lengths(call.cu_seqlens_q, call.max_seqlen_q),
        _lengths(call.cu_seqlens_k, call.max_seqlen_k),
        strict=True,
    )
    return per_pair * sum(rows_q * rows_k for rows_q, rows_k in lengths)


def of_forward_out(out: torch.Tensor, *arguments: Any, out_val: Any = None) -> int:
    """The same of `forward_out`."""
    return of_forward(*arguments)


def of_backward(*arguments: Any, out_val: Any = None) -> int:
    """The same of `backward`, which computes q·k anew: three products over head_dim, two over head_dim_v."""
    call = arguments[4:]
    q, _, v, *_ = call
    return of_forward(*call) * (3 * q.shape[-1] + 2 * v.shape[-1]) // (q.shape[-1] + v.shape[-1])


def _lengths(cu_seqlens: torch.Tensor, longest: int) -> list[int]:
    try:
        return cu_seqlens.diff().tolist()
    except RuntimeError:  # a meta or fake tensor, which has no numbers
        return [longest] * (cu_seqlens.shape[0] - 1)
