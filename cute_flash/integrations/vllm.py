"""What a vLLM attention backend asks of its kernels: whether they serve a configuration, and the call.

Neither half imports vLLM. `reasons` has the arguments of `AttentionBackend.validate_configuration`, and
answers as that does: a list of reasons, empty where all is well. `attend` is what `AttentionImpl.forward`
computes once new keys and values lie in their pages, from the fields of `CommonAttentionMetadata`;
`schedule` what a metadata builder does before, for all layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .. import dispatch, problems
from ..api import flash_attn_varlen_func, flash_attn_with_kvcache
from ..arch.problem import Device, KvCache
from ..scheduling import SchedulerMetadata, get_scheduler_metadata

ELEMENTS = (None, "auto", "float16", "bfloat16")  # of a cache: what q has
ATTENTION = "decoder"  # keys in pages; an encoder's are packed, for `flash_attn_varlen_func` as it is


def reasons(
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    block_size: int | None,
    use_mla: bool,
    has_sink: bool,
    use_sparse: bool,
    use_mm_prefix: bool,
    use_per_head_quant_scales: bool,
    device_capability: tuple[int, int],
    attn_type: str,
    use_non_causal: bool = False,
    use_batch_invariant: bool = False,
    use_kv_connector: bool = False,
) -> list[str]:
    """Why cute_flash does not serve a configuration; nothing where it does.

    head_size: of keys and values. block_size: keys of a page; None where that is left open.
    device_capability: (major, minor).
    use_non_causal, use_batch_invariant, use_kv_connector: served, whatever else.
    """
    refused = {
        "MLA is not served": use_mla,
        "sparse attention by indices is not served": use_sparse,
        "queries that see what comes after them, of images, are not served": use_mm_prefix,
        "scales per head of a cache in 8 bits are not served": use_per_head_quant_scales,
        f"kv_cache_dtype {kv_cache_dtype} is not served; allowed: q's": kv_cache_dtype not in ELEMENTS,
        f"attention type {attn_type} is not served; allowed: {ATTENTION}": attn_type != ATTENTION,
    }
    found = [text for text, applies in refused.items() if applies]
    asked = problems.problem(
        dtype=dtype, head_dim=head_size, varlen=True, seqused_k=True, gqa=True, sink=has_sink,
        cache=KvCache(block_size or 16),
    )  # fmt: skip
    answer = dispatch.select(asked, _device(*device_capability))
    if not answer:
        told = (text for _, texts in answer.refusals for text in texts)
        found += dict.fromkeys(told)
    return found


def _device(major: int, minor: int) -> Device:
    """A GPU of a compute capability; of one that is not listed as the first of its kind is."""
    known = list(dispatch.EMULATED.values())
    alike = [device for device in known if device.capability == (major, minor)]
    alike += [device for device in known if device.capability[0] == major] or known[:1]
    return replace(alike[0], capability=(major, minor))


def schedule(
    common: Any,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    sliding_window: tuple[int, int] = (-1, -1),
    logits_soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    out: SchedulerMetadata | None = None,
) -> SchedulerMetadata:
    """How a step's sequences share the GPU, decided on the device: for `attend` in all layers of one kind.

    common: as in `attend`. num_splits, out: as in `get_scheduler_metadata`; a CUDA graph that has captured
    `attend` reads what is written into its `out`. Errors: as there.
    """
    return get_scheduler_metadata(
        common.query_start_loc.shape[0] - 1, common.max_query_len, common.max_seq_len, num_heads,
        num_kv_heads, head_size, common.seq_lens, dtype, cu_seqlens_q=common.query_start_loc,
        page_size=block_size, causal=common.causal, window_size=sliding_window,
        has_softcap=bool(logits_soft_cap), num_splits=num_splits, alibi_slopes=alibi_slopes, out=out,
    )  # fmt: skip


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    common: Any,
    *,
    scale: float,
    sliding_window: tuple[int, int] = (-1, -1),
    logits_soft_cap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    batch_invariant: bool = False,
    scheduler_metadata: SchedulerMetadata | None = None,
) -> torch.Tensor:
    """Attention of a batch's queries to their keys in pages, written into `output`, which is returned.

    query, output: (tokens, heads, head_size); tokens beyond num_actual_tokens are left alone.
    key_cache, value_cache: (num_blocks, block_size, kv_heads, head_size), of vLLM's one tensor the halves.
    common: has num_actual_tokens, query_start_loc, max_query_len, seq_lens, max_seq_len, block_table_tensor
        and causal, as `CommonAttentionMetadata` has them.
    batch_invariant: keys are taken whole, so that a sequence's bits do not depend on the others.
    scheduler_metadata: from `schedule` with the same numbers; not with batch_invariant. None: all sequences
    have their keys in as many parts.
    All others: as `flash_attn_varlen_func` has them.
    """
    tokens = common.num_actual_tokens
    given = {
        "softmax_scale": scale, "causal": common.causal, "window_size": sliding_window,
        "softcap": logits_soft_cap or 0.0, "alibi_slopes": alibi_slopes, "learnable_sink": sinks,
        "block_table": common.block_table_tensor, "out": output[:tokens],
    }  # fmt: skip
    if scheduler_metadata is not None:
        flash_attn_with_kvcache(
            query[:tokens], key_cache, value_cache, cache_seqlens=common.seq_lens,
            cu_seqlens_q=common.query_start_loc, max_seqlen_q=common.max_query_len,
            batch_invariant=batch_invariant, scheduler_metadata=scheduler_metadata, **given,
        )  # fmt: skip
        return output
    flash_attn_varlen_func(
        query[:tokens], key_cache, value_cache, common.query_start_loc, None, common.max_query_len,
        common.max_seq_len, seqused_k=common.seq_lens, num_splits=1 if batch_invariant else None, **given,
    )  # fmt: skip
    return output
