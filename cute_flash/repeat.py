"""A call like an earlier one is not decided again: checks, plan and kernel are remembered under a key.

The key holds everything that they depend on: class, shape, strides, dtype, device and need of a gradient of
every tensor, every option with its type, the text of the rules, the device that is emulated. What may differ
between calls of one key, addresses and the contents of tensors and the numbers inside rules, is looked at in
every call. Only calls that went well are remembered, so that a wrong one always meets the checks.

Such a call goes past torch's dispatcher, where nobody watches it: neither torch.compile nor another tracer,
no mode, no transform of torch.func, no forward-mode differentiation, no profiler. It allocates the result
and nothing else, besides dropout's state, a sink in another dtype and the scratch of split keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import backward, cached, contents, dispatch, launch, ops, overlap, request, rules
from .latent import is_latent
from .request import Call, Options, Packing

MOST = 1024  # decisions that are remembered; the oldest is forgotten first
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_TABLES: list[dict] = []


def decisions() -> dict:
    """A table of what calls came to, by their keys, which `forget_calls` empties."""
    _TABLES.append({})
    return _TABLES[-1]


_DECIDED: dict[Hashable, Decided] = decisions()

_modes = torch._C._len_torch_dispatch_stack
_function_mode = torch._C._is_torch_function_mode_enabled
_transform = torch._C._functorch.peek_interpreter_stack
_tracer = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled


class Result(NamedTuple):
    """What a call returns; lse is None or empty where it is not asked for."""

    out: torch.Tensor
    lse: torch.Tensor | None


class Decided(NamedTuple):
    """What all calls of one key have in common; no tensor.

    mask_values, score_values: of causal, window_size and softcap.
    numbers: softmax_scale, keep_threshold, keep_scale and max_seqlen_q, as operands. like_q: out has the
    shape and the strides of q. spans: bytes that out and each input reach over, where the user gives out.
    """

    bound: launch.Bound
    mask_values: tuple
    score_values: tuple
    numbers: tuple
    out_shape: tuple[int, ...]
    like_q: bool
    lse_shape: tuple[int, ...] | None
    dropout: bool
    spans: tuple[int, ...]

    def again(self, q, k, v, packing: Packing | None, options: Options, seen: rules.Seen | None) -> Result:
        """Look at what differs between calls of a key, then launch."""
        given, slopes, sink = options.out, options.alibi_slopes, options.learnable_sink
        out = given
        if given is None:
            out = torch.empty_like(q) if self.like_q else q.new_empty(self.out_shape)
        if (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) % contents.ALIGNMENT:
            return _by_all_checks(q, k, v, packing, options)
        cu_q = cu_k = used_q = used_k = batch_idx = leftpad = table = parts = order = None
        counts = indices = None
        if packing is not None:
            cu_q, cu_k, _, _, used_q, used_k, _, batch_idx, leftpad, table, parts, order, _ = packing
            if contents.can_be_read(q.device):
                contents.check_lengths(packing, q, k)
        if options.block_mask is not None:
            counts, indices = options.block_mask.counts, options.block_mask.indices
            if contents.can_be_read(q.device):
                contents.check_lists(counts, indices, k.shape[1], options.block_mask.block_size)
        mask_values, score_values, tensors = self.mask_values, self.score_values, ()
        if slopes is not None:
            score_values, tensors = (*score_values, slopes), (slopes,)
        if seen is not None:
            mask_values, score_values = mask_values + seen.mask, score_values + seen.score
            tensors = (*tensors, *seen.tensors)
        if given is not None:
            lengths = (cu_q, cu_k, used_q, used_k, batch_idx, leftpad, table, parts, order)
            inputs = (q, k, v, *lengths, sink, counts, indices, *tensors)
            if _meet(out, inputs, self.spans):
                return _by_all_checks(q, k, v, packing, options)
        lse = None if self.lse_shape is None else ops.new_lse(q, self.lse_shape)
        scale, threshold, keep_scale, longest = self.numbers
        values = {
            "q": q, "k": k, "v": v, "out": out, "lse": lse, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
            "seqused_q": used_q, "seqused_k": used_k, "batch_idx": batch_idx, "leftpad": leftpad,
            "page_table": table, "sequence_splits": parts, "sequence_order": order, "block_counts": counts,
            "block_indices": indices, "max_seqlen_q": longest, "softmax_scale": scale,
            "sink": sink if sink is None or sink.dtype is torch.float32 else sink.float(),
            "rng_state": request.draw_rng_state(q.device) if self.dropout else None,
            "keep_threshold": threshold, "keep_scale": keep_scale,
            "mask_values": mask_values or None, "score_values": score_values or None,
        }  # fmt: skip
        launch.run(self.bound, values)
        if given is not None:
            ops.note_written(given)
        return Result(out, lse)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing | None, options: Options
) -> Result:
    """Attention, from the user's arguments; raises what `request` and the operators do."""
    if watched() or request.needs_gradient(q, k, v, options.learnable_sink):
        return _by_all_checks(q, k, v, packing, options)
    try:
        if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
            q, k, v = request.as_autocast_has_it(q, k, v)
        seen = rules_of(options)
        key = key_of(q, k, v, packing, options, seen)
        decided = _DECIDED.get(key)
    except Exception:  # what cannot be part of a key is for the checks to name
        return _by_all_checks(q, k, v, packing, options)
    if decided is None:
        return _first(key, q, k, v, packing, options, seen)
    return decided.again(q, k, v, packing, options, seen)


def forget() -> None:
    """Decide every call anew, plans included: for whoever changes what kernels say of themselves."""
    for remembered in (dispatch.select, dispatch._planned):
        remembered.cache_clear()
    forget_calls()


def forget_calls() -> None:
    """Check and decide every call anew; plans stay."""
    for decided in _TABLES:
        decided.clear()


def watched() -> bool:
    """Whether anything may want to see operators rather than what they do."""
    return (
        torch.compiler.is_compiling()
        or _modes() > 0
        or _function_mode()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or _profiled()
        or _tracer() is not None
    )


def checked(q, k, v, packing: Packing | None, options: Options) -> Call:
    """The call, by all checks that `request` has, and that of its gradients, where any is required."""
    if packing is None:
        call = request.dense(q, k, v, options)
    else:
        call = (cached.checked if packing.cached else request.varlen)(q, k, v, packing, options)
    if request.needs_gradient(q, k, v, options.learnable_sink) and not torch.compiler.is_compiling():
        backward.check(call)
    return call


def rules_of(options: Options) -> rules.Seen | None:
    """The user's mask and score, whose values may change from call to call; None where there is neither."""
    block_mask, score = options.block_mask, options.score
    mask = options.mask if block_mask is None else block_mask.mask
    return None if mask is None and score is None else rules.seen(mask, score)


def key_of(q, k, v, packing: Packing | None, options: Options, seen: rules.Seen | None) -> Hashable:
    """All that checks, plan and kernel depend on. Numbers come with their types: 1.0 equals 1 and True."""
    (
        dropout_p, scale, causal, window, softcap, slopes, mask, score, sink,
        lse, out, block_mask, num_splits, deterministic, _,
    ) = options
    window = tuple(window)
    key = (
        *outside(q), *outside(k), *outside(v),
        dropout_p, type(dropout_p), scale, type(scale), softcap, type(softcap), num_splits, type(num_splits),
        window, *map(type, window), bool(causal), bool(deterministic), lse,
        torch.is_grad_enabled(), launch.executable, dispatch.wanted(),
        None if q.is_cuda else dispatch.emulation().device,
        None if slopes is None else outside(slopes),
        None if sink is None else outside(sink),
        None if out is None else outside(out),
    )
    if packing is not None:
        cu_q, cu_k, longest_q, longest_k, used_q, used_k, in_cache, *of_cache = packing
        batch_idx, leftpad, table, parts, order, scheduled_for = of_cache
        key += (
            longest_q, type(longest_q), longest_k, type(longest_k),
            None if cu_q is None else outside(cu_q), None if cu_k is None else outside(cu_k),
            None if used_q is None else outside(used_q), None if used_k is None else outside(used_k),
        )
        if in_cache:
            key += (
                None if batch_idx is None else outside(batch_idx),
                None if leftpad is None else outside(leftpad),
                None if table is None else outside(table), in_cache, is_latent(k, v),
                None if parts is None else outside(parts), None if order is None else outside(order),
                scheduled_for,
            )
    if block_mask is not None:
        key += (
            block_mask.__class__, mask is None, outside(block_mask.counts), outside(block_mask.indices),
            block_mask.block_size, block_mask.seqlens,
        )
    if seen is not None:
        key += (seen.key, *map(outside, seen.tensors))
    return key


def outside(tensor: torch.Tensor) -> tuple:
    """What can be told of a tensor without looking inside."""
    return (
        tensor.__class__, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
    )


def _meet(out: torch.Tensor, inputs: Iterable[torch.Tensor | None], spans: tuple[int, ...]) -> bool:
    """Whether `out` lies where an input begins to end; then it takes more to say whether they overlap."""
    first, length = out.data_ptr(), spans[0]
    given = [tensor.data_ptr() for tensor in inputs if tensor is not None]
    reached = zip(given, spans[1:], strict=True)
    return any(start < first + length and first < start + span for start, span in reached)


def _by_all_checks(q, k, v, packing: Packing | None, options: Options) -> Result:
    """By the operators, as torch has it."""
    return Result(*ops.forward(checked(q, k, v, packing, options), options.out))


def _first(key: Hashable, q, k, v, packing: Packing | None, options: Options, seen) -> Result:
    """The first call of its key: by all checks, and remembered; by torch's dispatcher if it has a say."""
    call = checked(q, k, v, packing, options)
    given = (options.out, *call, *call.rule_tensors)
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    if call.q.is_meta or not all(map(plain, tensors)):
        return Result(*ops.forward(call, options.out))
    out, lse, bound = ops.answer(call, options.out)
    if bound is not None:
        remember(_DECIDED, key, _decide(call, out, bound, options, seen))
    return Result(out, lse)


def remember(decided: dict[Hashable, Any], key: Hashable, decision: Any) -> None:
    """Keep what a call came to; the oldest goes where there are too many."""
    if len(decided) >= MOST:
        decided.pop(list(decided)[0], None)  # other threads may be doing the same
    decided[key] = decision


def remembered(key: Hashable) -> Decided | None:
    """What calls of a key have in common, where there was one."""
    return _DECIDED.get(key)


def plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of no class of somebody's own, and its memory holds its numbers as they are."""
    return type(tensor) in _PLAIN and not tensor.is_neg()


def _decide(
    call: Call, out: torch.Tensor, bound: launch.Bound, options: Options, seen: rules.Seen | None
) -> Decided:
    mine, slopes = ops.values_of(call, out, None), options.alibi_slopes
    mask_values, score_values = mine["mask_values"] or (), mine["score_values"] or ()
    _, mask, score, _ = seen or rules.Seen((), (), (), [])
    tensors = (() if slopes is None else (slopes,)) + (() if seen is None else (*seen.tensors,))
    given = options.out is not None
    order = (
        call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
        call.cache_batch_idx, call.cache_leftpad, call.block_table, call.sequence_splits,
        call.sequence_order, options.learnable_sink,
        call.block_counts, call.block_indices, *tensors,
    )
    shape = tuple(out.shape)
    return Decided(
        bound=bound,
        mask_values=mask_values[: len(mask_values) - len(mask)],
        score_values=score_values[: len(score_values) - len(score) - (slopes is not None)],
        numbers=(
            mine["softmax_scale"], mine["keep_threshold"], mine["keep_scale"], mine["max_seqlen_q"],
        ),
        out_shape=shape,
        like_q=shape == call.q.shape and call.q.stride() == out.stride() and not given,
        lse_shape=ops.lse_shape(call) if call.lse else None,
        dropout=call.rng_state is not None,
        spans=tuple(overlap.span(tensor) for tensor in (out, *order) if tensor is not None) if given else (),
    )
