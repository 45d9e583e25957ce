"""What a call of attention asks, in the words of kernels: the one place where its Problem is made."""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import rules
from .arch.block_scaled import BlockScaledProblem
from .arch.problem import KvCache, Problem, Sizes
from .arch.quantized import DTYPES, QuantizedProblem, ScheduledQuantizedProblem
from .arch.scheduled import ScheduledProblem
from .arch.widened import ScheduledWidenedProblem, WidenedProblem
from .latent import is_latent
from .request import Call


@functools.cache
def problem(
    *,
    dtype: torch.dtype | str,
    head_dim: int,
    head_dim_v: int | None = None,
    code: str = "",
    scheduled: bool = False,
    **features: Any,
) -> Problem:
    """The Problem of a call with these head dims, rules and features, remembered.

    head_dim_v: head_dim if None. code: the rules, as `rules.encode` has them. scheduled: a ScheduledProblem.
    features: fields of Problem, with a dtype of 8 bits of QuantizedProblem, with a `form` of
    BlockScaledProblem, with a kv_dtype of WidenedProblem; TypeError for others.
    """
    mask, score = rules.decode(code)
    name = str(dtype).removeprefix("torch.")
    kind = ScheduledProblem if scheduled else Problem
    if name in DTYPES or "form" in features:
        of_8_bits = ScheduledQuantizedProblem if scheduled else QuantizedProblem
        kind = BlockScaledProblem if "form" in features else of_8_bits
        features = {"out_dtype": "bfloat16", **features}
    elif "kv_dtype" in features:
        kind = ScheduledWidenedProblem if scheduled else WidenedProblem
    return kind(
        dtype=name,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        mask=mask,
        score=score,
        **features,
    )


def problem_of(call: Call, **others: Any) -> Problem:
    """What a checked call asks. What kernels are compiled for is a number, no symbol of torch.compile.

    others: fields that only a QuantizedProblem or a WidenedProblem has, and out_dtype; of bytes the dtype and
    head_dim, too.
    """
    cache = None
    if call.cached:
        cache = KvCache(
            page_size=None if call.block_table is None else int(call.k.shape[1]),
            batch_idx=call.cache_batch_idx is not None,
            leftpad=call.cache_leftpad is not None,
            latent=is_latent(call.k, call.v),
        )
    return problem(
        **({"dtype": call.q.dtype, "head_dim": int(call.q.shape[-1])} | others),
        head_dim_v=int(call.v.shape[-1]),
        code=call.rules,
        varlen=call.cu_seqlens_q is not None,
        seqused_q=call.seqused_q is not None,
        seqused_k=call.seqused_k is not None,
        gqa=bool(call.q.shape[-2] != call.v.shape[-2]),
        dropout=call.rng_state is not None,
        sink=call.sink is not None,
        lse=call.lse,
        block_size=tuple(call.block_size) or None,
        cache=cache,
        scheduled=call.sequence_order is not None,
    )


def sizes_of(call: Call) -> Sizes:
    """How large a checked call is."""
    return Sizes(
        batch=call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1,
        heads_q=call.q.shape[-2],
        heads_kv=call.k.shape[-2],
        seqlen_q=call.max_seqlen_q,
        seqlen_k=call.max_seqlen_k,
    )
