"""The operators that torch sees: `forward`, `forward_out`, which writes into `out`, and `probabilities`.

Being operators, they are traced by torch.compile without a graph break, captured by CUDA graphs and
seen by every tool that watches torch's dispatcher. Their arguments are those of `request.Call`; rules
travel as a string and lists of numbers and tensors. An operator has no state of its own: dropout's seed
is an argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import contents, flops, rules
from .arch.combine import CombineOperands
from .arch.problem import Operands, Problem, Sizes
from .dispatch import Place, Plan, place_of, plan
from .executable import executable
from .probabilities import signed_probabilities
from .request import DROPOUT_STEPS, Call, keep_threshold

_LIBRARY = torch.library.Library("cute_flash", "DEF")
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? seqused_q, Tensor? seqused_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? sink, Tensor? rng_state, Scalar softmax_scale, float dropout_p, "
    "str rules, Tensor[] rule_tensors, SymInt[] rule_ints, Scalar[] rule_floats, "
    "Tensor? block_counts, Tensor? block_indices, int[] block_size, bool lse, SymInt num_splits"
)


def forward(call: Call, out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a checked call. lse is empty where the call does not ask for it."""
    if out is None:
        return torch.ops.cute_flash.forward.default(*call)
    return out, torch.ops.cute_flash.forward_out.default(out, *call)


def probabilities(call: Call) -> torch.Tensor:
    """The softmax weights of a checked dense call, with a minus sign where dropout removed them."""
    return torch.ops.cute_flash.probabilities.default(*call)


def _new_out(q, k, v, *_) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def new_lse(q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Where a kernel puts the log-sum-exp."""
    return q.new_empty(shape, dtype=torch.float32)


def lse_shape(call: Call) -> tuple[int, ...]:
    """(heads, total) or (batch, heads, seqlen_q); nothing where the call does not ask for it."""
    return _by_head(call.q, call.cu_seqlens_q) if call.lse else (0,)


def _by_head(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> tuple[int, ...]:
    *rows, heads, _ = q.shape
    return (rows[0], heads, rows[1]) if cu_seqlens_q is None else (heads, *rows)


def _forward(*arguments):
    call, out = Call(*arguments), _new_out(*arguments)
    if has_no_sequence(call):
        out.zero_()
    return out, _fill(out, call)


def _forward_out(out, *arguments):
    call = Call(*arguments)
    contents.check_out(call, out)
    lse = _fill(out, call)
    note_written(out)
    return lse


def note_written(out: torch.Tensor) -> None:
    """Raise a tensor's version, as every in-place operator does."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


def _fill(out, call):
    lse = new_lse(call.q, lse_shape(call))
    if has_no_sequence(call):
        contents.check(call, out)
        lse.fill_(-torch.inf)
    elif out.numel():
        _launch(call, out, lse)
    return lse


def has_no_sequence(call: Call) -> bool:
    """Whether no row of a packed q belongs to any sequence: there is no block to launch."""
    return call.cu_seqlens_q is not None and (call.max_seqlen_q == 0 or call.cu_seqlens_q.shape[0] == 1)


def _forward_fake(*arguments):
    return _new_out(*arguments), _forward_out_fake(None, *arguments)


def _forward_out_fake(out, *arguments):
    call = Call(*arguments)
    return new_lse(call.q, lse_shape(call))


def _probabilities(*arguments):
    return signed_probabilities(Call(*arguments))


def _probabilities_fake(q, k, *_):
    (batch, seqlen_q, heads, _), seqlen_k = q.shape, k.shape[1]
    return q.new_empty((batch, heads, seqlen_q, seqlen_k), dtype=torch.float32)


def _launch(call: Call, out: torch.Tensor, lse: torch.Tensor) -> None:
    planned, place = plan_of(call)
    contents.check(call, out)
    run(bound(planned, place), operands(call, out, lse if call.lse else None))


class Bound(NamedTuple):
    """A plan's kernels, ready to be called."""

    forward: Callable[..., None]
    splits: int
    combine: Callable[..., None] | None


def bound(planned: Plan, place: Place) -> Bound:
    """The plan's kernels, compiled and loaded."""
    combine = planned.combine and executable(*planned.combine, place.device, place.route)
    return Bound(executable(*planned.forward, place.device, place.route), planned.splits, combine)


def run(kernels: Bound, given: Operands) -> None:
    """Launch. Where keys are split: attention over their parts into fp32 scratch, then the parts' merging."""
    if kernels.combine is None:
        kernels.forward(*given)
        return
    q, out = given.q, given.out
    partial_out = q.new_empty((kernels.splits, *out.shape), dtype=torch.float32)
    partial_lse = new_lse(q, (kernels.splits, *_by_head(q, given.cu_seqlens_q)))
    kernels.forward(*given._replace(out=partial_out, lse=partial_lse, sink=None))
    merged = (out, given.lse, given.cu_seqlens_q, given.seqused_q, given.sink, given.max_seqlen_q)
    kernels.combine(*CombineOperands(partial_out, partial_lse, *merged))


def plan_of(call: Call) -> tuple[Plan, Place]:
    """Which kernels serve a call, and where."""
    q, v = call.q, call.v
    problem = _problem(
        q.dtype, q.shape[-1], v.shape[-1], call.rules,
        call.cu_seqlens_q is not None, call.seqused_q is not None, call.seqused_k is not None,
        q.shape[-2] != v.shape[-2], call.rng_state is not None, call.sink is not None, call.lse,
        tuple(call.block_size) or None,
    )
    place = place_of(q.device)
    return plan(problem, place.device, _sizes(call), call.num_splits), place


def _sizes(call: Call) -> Sizes:
    batch = call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
    return Sizes(batch, call.q.shape[-2], call.k.shape[-2], call.max_seqlen_q, call.max_seqlen_k)


@functools.cache
def _problem(dtype: torch.dtype, head_dim: int, head_dim_v: int, code: str, *rest: Any) -> Problem:
    """A Problem from what a call's tensors and rules show; building one anew costs more than this lookup."""
    mask, score = rules.decode(code)
    return Problem(str(dtype).removeprefix("torch."), head_dim, head_dim_v, mask, score, *rest)


def operands(call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> Operands:
    """What a kernel is launched with for a call."""
    mask_values, score_values = rules.values(
        call.rules, call.rule_tensors, call.rule_ints, call.rule_floats
    )
    threshold = scale = None
    if call.rng_state is not None:
        threshold = keep_threshold(call.dropout_p)
        scale = DROPOUT_STEPS / threshold
    return Operands(
        call.q, call.k, call.v, out, lse,
        call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_q, call.seqused_k,
        call.sink, call.rng_state, call.softmax_scale, threshold, scale,
        None if call.cu_seqlens_q is None else call.max_seqlen_q,
        call.block_counts, call.block_indices,
        mask_values, score_values,
    )


def _no_vmap(*_):
    raise NotImplementedError(
        "torch.vmap over cute_flash does not exist: make the mapped dimension part of batch or of heads, "
        "which a call takes any number of"
    )


def _register(name: str, schema: str, run, fake) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"cute_flash::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"cute_flash::{name}", _no_vmap, lib=_LIBRARY)


_register("forward", f"forward({_ARGUMENTS}) -> (Tensor out, Tensor lse)", _forward, _forward_fake)
_register(
    "forward_out", f"forward_out(Tensor(a!) out, {_ARGUMENTS}) -> Tensor lse", _forward_out, _forward_out_fake
)
_register("probabilities", f"probabilities({_ARGUMENTS}) -> Tensor", _probabilities, _probabilities_fake)
register_flop_formula([torch.ops.cute_flash.forward, torch.ops.cute_flash.probabilities], get_raw=True)(
    flops.of_forward
)
register_flop_formula(torch.ops.cute_flash.forward_out, get_raw=True)(flops.of_forward_out)
