"""cute_flash as an attention implementation of Hugging Face transformers.

    from cute_flash.integrations import transformers
    transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="cute_attention", dtype=torch.float16)

The name avoids the word "flash": transformers takes any name that contains it for one of the hub's kernels,
downloads that, and has some models pass packed sequences in a way of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from ..api import flash_attn_func, flash_attn_varlen_func
from ..extras import missing

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise missing("transformers", "transformers", error) from error

NAME = "cute_attention"


def register() -> None:
    """Make `attn_implementation="cute_attention"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, used_lengths)


def used_lengths(
    *,
    kv_length: int,
    q_length: int | None = None,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **_,
) -> torch.Tensor | None:
    """What transformers hands to every layer as its mask: int32 (batch,) used lengths, None without padding.

    Runs once per forward of the model. attention_mask: bool (batch, kv_length), True where a token is real.
    cache_position: what transformers 5.0 gives instead of q_length, the positions of the queries.
    Raises NotImplementedError for padding that is not at the right end, and for custom mask functions.
    """
    if use_vmap:
        raise NotImplementedError(
            f"{NAME}: the model adds a mask function of its own (packed sequences, or an image's tokens); "
            'use attn_implementation="sdpa" or "flex_attention" for it'
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    used = attention_mask.sum(dim=1, dtype=torch.int32)
    at_the_right = torch.arange(kv_length, device=used.device) < used[:, None]
    if attention_mask.shape[1] != kv_length or not bool((attention_mask.bool() == at_the_right).all()):
        raise NotImplementedError(
            f"{NAME}: padding must be at the right end of each sequence (its used length is what a kernel "
            'takes); set tokenizer.padding_side = "right", or leave the padding out'
        )
    q_length = len(cache_position) if q_length is None else q_length
    if q_length != kv_length:
        raise NotImplementedError(
            f"{NAME}: padding with a KV cache ({q_length} queries, {kv_length} keys) is not supported; "
            "generate from sequences of equal length"
        )
    return used


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query, key, value (batch, heads, seqlen, dim) -> (batch, seqlen, heads, dim).

    attention_mask: what `used_lengths` returned. Raises NotImplementedError for any other mask.
    """
    if attention_mask is not None and attention_mask.ndim != 1:
        raise NotImplementedError(
            f"{NAME}: takes no mask tensors, got one of shape {tuple(attention_mask.shape)}; "
            "give the model the tokenizer's attention_mask (batch, seqlen)"
        )
    causal = module.is_causal if is_causal is None else is_causal
    # A window of n in transformers is the position itself and n - 1 before it.
    left = None if sliding_window is None else sliding_window - 1
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": (left, None if causal else left),
        "softcap": softcap or 0.0,
        "learnable_sink": s_aux,
    }
    if attention_mask is None:
        return flash_attn_func(q, k, v, **options), None
    return _padded(q, k, v, attention_mask, options), None


def _padded(q, k, v, used: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """Sequences of one length, of which the first `used` rows count: packed ones with used lengths."""
    batch, seqlen = q.shape[:2]
    starts = torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        *(x.reshape(batch * seqlen, *x.shape[2:]) for x in (q, k, v)),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=seqlen,
        max_seqlen_k=seqlen,
        # Positions are aligned at the last used query and key, so that causal needs both.
        seqused_q=used if options["causal"] else None,
        seqused_k=used,
        **options,
    )
    return out.view(batch, seqlen, *out.shape[1:])
