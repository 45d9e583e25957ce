"""Gradients: the operator `backward`, and how the operator `forward` comes to it through autograd.

Saved between the two are q, k, v, out, the log-sum-exp and dropout's seed: O(seqlen) memory. P is recomputed
(Dao 2023, algorithm 2). What comes through the log-sum-exp is part of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import contents, flops, launch, ops, schema
from .arch.backward import BackwardProblem
from .dispatch import dispatch, place_of, plan
from .problems import problem_of, sizes_of
from .request import Call, parts_of


class Given(NamedTuple):
    """What the operator takes besides a Call: gradients of its results, and the results.

    grad_lse: None where nothing comes through the log-sum-exp.
    """

    grad_out: torch.Tensor
    grad_lse: torch.Tensor | None
    out: torch.Tensor
    softmax_lse: torch.Tensor  # `lse` is a Call's: whether one is asked for


class Gradients(NamedTuple):
    """Of q, k and v, or of what they are parts of, in their dtype, and of the sink in float32.

    Empty where a call has none: of `joint`, which takes the place of its parts, and of the sink.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    joint: torch.Tensor
    sink: torch.Tensor


def check(call: Call) -> None:
    """NotImplementedError with every kernel's every reason where a call has no gradients."""
    if not call.q.is_meta:
        plan(asked(call, None), place_of(call.q.device).device, sizes_of(call))


def asked(call: Call, grad_lse: torch.Tensor | None) -> BackwardProblem:
    """What the gradients of a checked call depend on."""
    return BackwardProblem(problem_of(call), grad_lse is not None, call.deterministic)


def gradients(given: Given, call: Call) -> Gradients:
    """What the operator does."""
    return computed(given, call, asked(call, given.grad_lse), new(call), {})


def computed(
    given: Given, call: Call, problem: BackwardProblem, found: Gradients, others: dict[str, Any]
) -> Gradients:
    """`found`, filled. others: values of the call that only such a problem's kernels take."""
    if not (given.out.numel() and call.k.numel() and call.max_seqlen_k) or ops.has_no_sequence(call):
        for gradient in found:
            gradient.zero_()
        # Rows without keys: their lse is the sink.
        if call.sink is not None and given.grad_lse is not None and given.softmax_lse.numel():
            found.sink.copy_(_by_head(given.grad_lse.masked_fill(given.softmax_lse.isneginf(), 0.0)))
        return found
    place = place_of(call.q.device)
    planned = plan(problem, place.device, sizes_of(call))
    values = ops.values_of(call, given.out, given.softmax_lse)
    places = found._asdict() | parts_of(None if call.joint is None else found.joint)
    keep_scale = values["keep_scale"]
    values |= {
        "grad_out": contents.as_kernels_read(given.grad_out),
        "grad_lse": None if given.grad_lse is None else given.grad_lse.contiguous(),
        "block_counts": call.key_block_counts,
        "block_indices": call.key_block_indices,
        "block_turns": call.key_block_turns,
        "grad_q": places["q"],
        "grad_k": places["k"],
        "grad_v": places["v"],
        "grad_sink_rows": None if call.sink is None else torch.zeros_like(given.softmax_lse),
        "value_scale": 1.0 if keep_scale is None else keep_scale,
        "max_seqlen_k": call.max_seqlen_k,
        **others,
    }
    launch.run(launch.bind(planned, place, values), values)
    if call.sink is not None:
        found.sink.copy_(_by_head(values["grad_sink_rows"]))
    return found


def _by_head(rows: torch.Tensor) -> torch.Tensor:
    """(heads,): sums of what is shaped as the log-sum-exp."""
    return rows.sum(dim=(0, 2) if rows.ndim == 3 else 1)


def new(call: Call, dtype: torch.dtype | None = None) -> Gradients:
    """Where gradients are written. Rows of packed tensors that belong to no sequence have gradient 0.

    dtype: that of the tensors if None.
    """
    packed = call.cu_seqlens_q is not None
    make = torch.zeros_like if packed else torch.empty_like
    parts = parts_of(call.joint)
    owners = {name: None if name in parts else getattr(call, name) for name in ("q", "k", "v", "joint")}
    found = {name: call.q.new_empty(0) if x is None else make(x, dtype=dtype) for name, x in owners.items()}
    sink = call.q.new_empty((0,) if call.sink is None else call.sink.shape, dtype=torch.float32)
    return Gradients(**found, sink=sink)


def _split(arguments: tuple) -> tuple[Given, Call]:
    given = len(Given._fields)
    return Given(*arguments[:given]), Call(*arguments[given:])


def _backward(*arguments):
    return tuple(gradients(*_split(arguments)))


def _backward_fake(*arguments):
    return tuple(new(_split(arguments)[1]))


def _set_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients are computed from, where any is asked for."""
    call = Call(*inputs)
    # Nobody checked a call that is traced; its sizes may be symbols, which no plan is remembered for.
    if not call.q.is_meta:
        dispatch(asked(call, None), place_of(call.q.device).device)
    ctx.set_materialize_grads(False)
    tensors = {name: value for name, value in call._asdict().items() if isinstance(value, torch.Tensor)}
    ctx.call = call._replace(**dict.fromkeys(tensors), rule_tensors=[])
    ctx.tensors = [name for name in tensors if name not in parts_of(call.joint)]
    ctx.save_for_backward(*output, *(tensors[name] for name in ctx.tensors), *call.rule_tensors)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple:
    """Gradients of the operator's arguments, None for all but q, k, v and the sink."""
    out, lse, *tensors = ctx.saved_tensors
    count = len(ctx.tensors)
    named = dict(zip(ctx.tensors, tensors[:count], strict=True))
    parts = parts_of(named.get("joint"))
    call = ctx.call._replace(**named, **parts, rule_tensors=tensors[count:])
    given = Given(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, out, lse)
    found = Gradients(*torch.ops.cute_flash.backward.default(*given, *call))
    return tuple((by_argument(call, found) | dict.fromkeys(parts)).values())


def by_argument(call: Call, found: Gradients) -> dict[str, Any]:
    """Gradients of an operator's arguments, in their order, None for all but those that are found.

    Of a list of tensors, and of an empty one, torch wants a list.
    """
    none = {name: [] if value == [] else None for name, value in call._asdict().items()}
    none["rule_tensors"] = [None] * len(call.rule_tensors)
    return none | {name: x for name, x in found._asdict().items() if getattr(call, name) is not None}


def no_second(context: Any, *_: Any) -> None:
    raise NotImplementedError("attention has no second derivative here; allowed: create_graph=False")


_ARGUMENTS = f"{schema.arguments(Given)}, {schema.arguments(Call)}"
_RESULTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
ops.register("backward", f"backward({_ARGUMENTS}) -> ({_RESULTS})", _backward, _backward_fake)
torch.library.register_autograd("cute_flash::forward", _differentiate, setup_context=_set_up, lib=ops.LIBRARY)
torch.library.register_autograd("cute_flash::backward", no_second, lib=ops.LIBRARY)
register_flop_formula(torch.ops.cute_flash.backward, get_raw=True)(flops.of_backward)
