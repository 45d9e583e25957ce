"""The operators that torch sees: `forward`, `forward_out`, which writes into `out`, and `probabilities`.

Being operators, they are traced by torch.compile without a graph break, captured by CUDA graphs and
seen by every tool that watches torch's dispatcher. Their arguments are those of `request.Call`; rules
travel as a string and lists of numbers and tensors. An operator has no state of its own: dropout's seed
is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import contents, flops, launch, rules, scheduling, schema
from .dispatch import place_of, plan
from .launch import Bound
from .probabilities import signed_probabilities
from .problems import problem_of, sizes_of
from .request import DROPOUT_STEPS, Call, keep_threshold

LIBRARY = torch.library.Library("cute_flash", "DEF")
_ARGUMENTS = schema.arguments(Call)


def forward(call: Call, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a checked call. lse is empty where the call does not ask for it."""
    if out is None:
        return torch.ops.cute_flash.forward.default(*call)
    return out, torch.ops.cute_flash.forward_out.default(out, *call)


def probabilities(call: Call) -> torch.Tensor:
    """The softmax weights of a checked dense call, with a minus sign where dropout removed them."""
    return torch.ops.cute_flash.probabilities.default(*call)


def new_out(call: Call, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Where a kernel puts the result. dtype: q's if None."""
    return call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]), dtype=dtype)


def new_lse(q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Where a kernel puts the log-sum-exp."""
    return q.new_empty(shape, dtype=torch.float32)


def lse_shape(call: Call) -> tuple[int, ...]:
    """(heads, total) or (batch, heads, seqlen_q); nothing where the call does not ask for it."""
    return _by_head(call.q, call.cu_seqlens_q) if call.lse else (0,)


def _by_head(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple[int, ...]:
    *rows, heads, _ = q.shape
    return (rows[0], heads, rows[1]) if cu_seqlens_q is None else (heads, *rows)


class Answer(NamedTuple):
    """What a call comes to. bound: what was launched for it; None where nothing was."""

    out: torch.Tensor
    lse: torch.Tensor
    bound: Bound | None


def answer(
    call: Call, out: torch.Tensor | None, launched: Callable | None = None, dtype: torch.dtype | None = None
) -> Answer:
    """What the operators do. out: where the user wants the result. launched: see `_launch`.

    dtype: of a result that nobody has given a place; q's if None.
    """
    given, launched = out, launched or _launch
    if out is None:
        out = new_out(call, dtype)
        if has_no_sequence(call):
            out.zero_()
    else:
        contents.check_out(call, out)
    lse, bound = new_lse(call.q, lse_shape(call)), None
    if has_no_sequence(call):
        contents.check(call, out)
        lse.fill_(-torch.inf)
    elif out.numel():
        bound = launched(call, out, lse)
    if given is not None:
        note_written(out)
    return Answer(out, lse, bound)


def _forward(*arguments):
    out, lse, _ = answer(Call(*arguments), None)
    return out, lse


def _forward_out(out, *arguments):
    return answer(Call(*arguments), out).lse


def note_written(out: torch.Tensor) -> None:
    """Raise a tensor's version, as every in-place operator does."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def has_no_sequence(call: Call) -> bool:
    """Whether no row of a packed q belongs to any sequence: there is no block to launch."""
    return call.cu_seqlens_q is not None and (call.max_seqlen_q == 0 or call.cu_seqlens_q.shape[0] == 1)


def _forward_fake(*arguments):
    return new_out(Call(*arguments)), _forward_out_fake(None, *arguments)


def _forward_out_fake(out, *arguments):
    call = Call(*arguments)
    return new_lse(call.q, lse_shape(call))


def _probabilities(*arguments):
    return signed_probabilities(Call(*arguments))


def _probabilities_fake(*arguments):
    call = Call(*arguments)
    (batch, seqlen_q, heads, _), seqlen_k = call.q.shape, call.k.shape[1]
    return call.q.new_empty((batch, heads, seqlen_q, seqlen_k), dtype=torch.float32)


def _launch(call: Call, out: torch.Tensor, lse: torch.Tensor) -> Bound:
    """Into `out` and `lse` what a call asks; what was launched for it."""
    place = place_of(call.q.device)
    planned = plan(problem_of(call), place.device, sizes_of(call), call.num_splits)
    scheduling.check_plan(call, planned)
    contents.check(call, out)
    values = values_of(call, out, lse)
    bound = launch.bind(planned, place, values)
    launch.run(bound, values)
    return bound


def values_of(call: Call, out: torch.Tensor | None, lse: torch.Tensor | None) -> dict[str, Any]:
    """The values of a call by the names of the kernels' operands; what it lacks is None."""
    mask_values, score_values = rules.values(
        call.rules, call.rule_tensors, call.rule_ints, call.rule_floats
    )
    threshold = scale = None
    if call.rng_state is not None:
        threshold = keep_threshold(call.dropout_p)
        scale = DROPOUT_STEPS / threshold
    return {
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "out": out,
        "lse": lse,
        "cu_seqlens_q": call.cu_seqlens_q,
        "cu_seqlens_k": call.cu_seqlens_k,
        "seqused_q": call.seqused_q,
        "seqused_k": call.seqused_k,
        "sink": call.sink,
        "rng_state": call.rng_state,
        "softmax_scale": call.softmax_scale,
        "keep_threshold": threshold,
        "keep_scale": scale,
        "max_seqlen_q": call.max_seqlen_q,
        "batch_idx": call.cache_batch_idx,
        "leftpad": call.cache_leftpad,
        "page_table": call.block_table,
        "sequence_splits": call.sequence_splits,
        "sequence_order": call.sequence_order,
        "block_counts": call.block_counts,
        "block_indices": call.block_indices,
        "mask_values": mask_values,
        "score_values": score_values,
    }


def _no_vmap(*_):
    raise NotImplementedError(
        "torch.vmap over cute_flash does not exist: make the mapped dimension part of batch or of heads, "
        "which a call takes any number of"
    )


def register(name: str, schema: str, run: Callable, fake: Callable) -> None:
    """Define an operator. fake: what its results are like, without computing them."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"cute_flash::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"cute_flash::{name}", _no_vmap, lib=LIBRARY)
    LIBRARY.impl(name, _no_vmap, "Batched")  # the older vmap, which autograd.grad(is_grads_batched=True) uses


register("forward", f"forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)", _forward, _forward_fake)
register(
    "forward_out", f"forward_out(Tensor(a!) out, {_ARGUMENTS}) -> Tensor lse", _forward_out, _forward_out_fake
)
register("probabilities", f"probabilities({_ARGUMENTS}) -> Tensor", _probabilities, _probabilities_fake)
register_flop_formula([torch.ops.cute_flash.forward, torch.ops.cute_flash.probabilities], get_raw=True)(
    flops.of_forward
)
register_flop_formula(torch.ops.cute_flash.forward_out, get_raw=True)(flops.of_forward_out)
