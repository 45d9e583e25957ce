"""The call that SGLang's attention backends make, from the fields of its layers and of their metadata.

SGLang is not imported: `attend` computes what `forward_extend` and `forward_decode` do once new keys and
values lie in the token pool. A pool is (tokens, kv_heads, head_dim): pages of one size, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch

from ..api import flash_attn_with_kvcache


def attend(
    q: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    layer: Any,
    metadata: Any,
    *,
    page_size: int,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Attention of a batch's queries to their keys in a token pool: (tokens, heads * v_head_dim).

    q: (tokens, heads * head_dim), or heads by themselves.
    key_pool, value_pool: (tokens of the pool, kv_heads, head_dim or v_head_dim), page_size of them in a page.
    layer: has tp_q_head_num, head_dim, scaling, logit_cap and sliding_window_size, as `RadixAttention` has.
    metadata: has cache_seqlens_int32, max_seq_len_q, cu_seqlens_q and page_table, the numbers of pages. The
        table's other columns hold anything.
    batch_invariant, sinks: as `flash_attn_with_kvcache` has them.
    """
    left = -1 if layer.sliding_window_size is None else layer.sliding_window_size
    window = (left, 0) if causal and left >= 0 else (left, -1)
    pages = (pool.unflatten(0, (-1, page_size)) for pool in (key_pool, value_pool))
    out = flash_attn_with_kvcache(
        q.reshape(-1, layer.tp_q_head_num, layer.head_dim), *pages, page_table=metadata.page_table,
        cache_seqlens=metadata.cache_seqlens_int32, softmax_scale=layer.scaling, causal=causal,
        window_size=window, softcap=layer.logit_cap, cu_seqlens_q=metadata.cu_seqlens_q,
        max_seqlen_q=metadata.max_seq_len_q,
        learnable_sink=sinks, batch_invariant=batch_invariant,
    )  # fmt: skip
    return out.flatten(1)
