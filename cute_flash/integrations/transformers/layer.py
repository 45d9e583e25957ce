"""Attention of one layer, as transformers calls it: its words become flash_attn's, and none is overlooked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...api import flash_attn_func, flash_attn_varlen_func
from .rules import Bias, PaddedRuns, Runs, Shown

NAME = "cute_attention"
LARGEST_TABLE = 2**31 - 1  # a kernel's index into a table

# Arguments that reach a layer on their way to other parts of a model, or that only say what holds anyway.
# position_ids: packed sequences are known by them to the mask. deterministic: the forward pass is.
ELSEWHERE = frozenset(
    ("cache_position", "deterministic", "num_items_in_batch", "output_hidden_states", "output_router_logits",
     "position_ids", "return_dict", "seq_idx", "use_cache")
)  # fmt: skip


class Packed(NamedTuple):
    """Sequences one after the other in the rows of a batch. cu_q, cu_k: where each begins, and the end."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    longest_q: Any
    longest_k: Any


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
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    max_length_k: int | torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query, key, value (batch, heads, seqlen, dim) -> (batch, seqlen, heads, dim).

    attention_mask: what `visible_keys` returned; or bool (visible) or floating point (added to the scaled
        scores), each dimension that of (batch, heads, seqlen_q, seqlen_k) or 1. Where it is given it says
        all of who sees whom; is_causal (the module's own if None) and sliding_window (a query's own
        position counts) hold without one.
    s_aux: (heads,), sinks. position_bias: as a floating-point mask, beside any mask.
    cu_seq_lens_q, cu_seq_lens_k: int (sequences + 1,), packed sequences in the rows of all batches.
    max_length_q, max_length_k: the longest sequence's length; without it as many as there are rows.

    Raises NotImplementedError for what this and the kernels do not know, by its name; ValueError for shapes.
    """
    _refuse(rest)
    packed = _packed(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    options = _rules(attention_mask, position_bias, packed, (*query.shape[:3], key.shape[2]))
    by_sequence = packed is not None and "mask" not in options
    if by_sequence and options:
        raise NotImplementedError(
            f"{NAME}: cu_seq_lens_q is given beside a floating-point mask or bias; allowed: one of them"
        )
    if attention_mask is None:
        options |= _words(module, is_causal, sliding_window)
    options |= {"dropout_p": dropout, "softmax_scale": scaling, "softcap": softcap or 0.0}
    options["learnable_sink"] = s_aux
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if by_sequence:
        return _by_sequence(q, k, v, packed, options), None
    return flash_attn_func(q, k, v, **options), None


def _refuse(rest: dict[str, Any]) -> None:
    """Raise for arguments that say something which nothing here reads."""
    unknown = sorted(n for n in rest if not (n in ELSEWHERE or rest[n] is None or rest[n] is False))
    if "output_attentions" in unknown:
        raise NotImplementedError(
            f"{NAME}: output_attentions=True, but the softmax's weights are never in memory; leave it out, "
            'or use attn_implementation="eager"'
        )
    if unknown:
        raise NotImplementedError(
            f"{NAME}: attention is given {', '.join(unknown)}, which nothing here reads: leave it out of "
            "the model's call or, where the model itself passes it, use another attn_implementation"
        )


def _words(module: torch.nn.Module, is_causal: bool | None, sliding_window: int | None) -> dict[str, Any]:
    """causal and window_size of a layer without a mask."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A window of n in transformers is the position itself and n - 1 before it.
    left = None if sliding_window is None else sliding_window - 1
    return {"causal": causal, "window_size": (left, None if causal else left)}


def _packed(cu_q: Any, cu_k: Any, longest_q: Any, longest_k: Any) -> Packed | None:
    if cu_q is None and cu_k is None:
        return None
    if cu_q is None or cu_k is None:
        missing = "cu_seq_lens_q" if cu_q is None else "cu_seq_lens_k"
        raise ValueError(f"{NAME}: {missing} is None; allowed: both or none of cu_seq_lens_q, cu_seq_lens_k")
    return Packed(cu_q.int(), cu_k.int(), longest_q, longest_k)


def _rules(
    given: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    packed: Packed | None,
    shape: tuple[int, ...],
) -> dict[str, Any]:
    """Mask and score that a layer's mask and bias become. shape: (batch, heads, seqlen_q, seqlen_k)."""
    rules, added = {}, position_bias
    if given is not None and given.dtype == torch.int32:
        rules["mask"] = _runs(given, packed, shape)
    elif given is not None and given.dtype == torch.bool:
        if packed is not None:
            raise NotImplementedError(
                f"{NAME}: cu_seq_lens_q is given beside a mask with a number per pair; allowed: one of them"
            )
        rules["mask"] = Shown(_table("attention_mask", given, shape).view(torch.uint8))
    elif given is not None:
        if not given.is_floating_point():
            raise TypeError(f"{NAME}: attention_mask has dtype {given.dtype}; allowed: bool, floating point")
        added = given if added is None else added + given
    if added is not None:
        name = "position_bias" if given is None else "attention_mask"
        rules["score"] = Bias(_table(name, added, shape))
    return rules


def _runs(bounds: torch.Tensor, packed: Packed | None, shape: tuple[int, ...]) -> Runs | PaddedRuns:
    """The rule of what `visible_keys` returned, within packed sequences where such are told."""
    batch, _, seqlen_q, seqlen_k = shape
    padded = bounds.ndim == 4 and bounds.shape[2] == 3
    width = max(seqlen_q, seqlen_k) if padded else seqlen_q
    if tuple(bounds.shape) != (batch, 1, 3 if padded else 2, width):
        raise ValueError(
            f"{NAME}: attention_mask is int32 of shape {tuple(bounds.shape)}, not what {NAME} makes for "
            f"{seqlen_q} queries and {seqlen_k} keys; allowed: that, or a mask that is bool or floating "
            'point. A model that reworks its mask needs attn_implementation="sdpa"'
        )
    bounds = bounds[:, 0]
    if packed is not None:
        bounds = _within_sequences(bounds, packed, seqlen_q, seqlen_k)
    return PaddedRuns(bounds) if padded else Runs(bounds)


def _within_sequences(bounds: torch.Tensor, packed: Packed, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """Runs cut at the ends of each query's sequence."""
    batch = bounds.shape[0]
    rows = torch.arange(batch * seqlen_q, dtype=torch.int32, device=bounds.device)
    sequence = torch.searchsorted(packed.cu_q, rows, right=True) - 1
    sequence = sequence.clamp(0, packed.cu_q.shape[0] - 2).view(batch, seqlen_q)
    row_0 = torch.arange(batch, dtype=torch.int32, device=bounds.device)[:, None] * seqlen_k
    first = torch.maximum(bounds[:, 0, :seqlen_q], packed.cu_k[sequence] - row_0)
    end = torch.minimum(bounds[:, 1, :seqlen_q], packed.cu_k[sequence + 1] - row_0)
    cut = torch.stack([first, end], dim=1)
    if bounds.shape[1] == 2:
        return cut
    return torch.cat([torch.nn.functional.pad(cut, (0, bounds.shape[2] - seqlen_q)), bounds[:, 2:]], dim=1)


def _table(name: str, table: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A number per pair, as a rule takes it."""
    fits = table.ndim == 4 and all(n in (1, wanted) for n, wanted in zip(table.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"{NAME}: {name} has shape {tuple(table.shape)}; allowed: {shape}, or 1 in place of any of these"
        )
    if table.numel() > LARGEST_TABLE:
        raise NotImplementedError(
            f"{NAME}: {name} has {table.numel()} numbers; allowed: {LARGEST_TABLE}, "
            "give fewer sequences at once"
        )
    return table.contiguous()


def _by_sequence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, options: dict[str, Any]
) -> torch.Tensor:
    """Packed sequences, each attended to by itself."""
    rows_q, rows_k = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=packed.cu_q,
        cu_seqlens_k=packed.cu_k,
        max_seqlen_q=_longest(packed.longest_q, rows_q),
        max_seqlen_k=_longest(packed.longest_k, rows_k),
        **options,
    )
    return out.view(*q.shape[:3], out.shape[-1])


def _longest(told: int | torch.Tensor | None, rows: int) -> int:
    """A length that no sequence exceeds. While compiling, a tensor's number is not looked at."""
    if told is None or (isinstance(told, torch.Tensor) and torch.compiler.is_compiling()):
        return rows
    return int(told) if isinstance(told, torch.Tensor) else told
