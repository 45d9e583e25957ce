"""Attention of q of 16 bits to a cache of 8, and the operators `forward_widened`, `forward_widened_out`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from . import cached, contents, launch, ops, quantized, request, scheduling, schema
from .arch.kernel import Steps
from .dispatch import place_of, plan
from .launch import Bound
from .problems import problem_of, sizes_of
from .quantized import Descale
from .repeat import Result
from .request import Call, Options, Packing


class Scaling(NamedTuple):
    """What the operators are given besides a `Call`: float32 (batch, heads_kv) each."""

    k_scale: torch.Tensor
    v_scale: torch.Tensor


def is_meant(q: Any, k_cache: Any, v_cache: Any) -> bool:
    """Whether a call is one of q of another dtype beside a cache of 8 bits."""
    kinds = [x.dtype if isinstance(x, torch.Tensor) else None for x in (q, k_cache, v_cache)]
    return kinds[0] not in quantized.DTYPES and any(kind in quantized.DTYPES for kind in kinds[1:])


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: Options, descale: Descale
) -> Result:
    """Attention to a cache of 8 bits, from the user's arguments; raises what is wrong with them."""
    return attend(*checked(q, k, v, packing, options, descale), options)


def attend(call: Call, scaling: Scaling, options: Options) -> Result:
    """A checked call, by the operators."""
    if options.out is None:
        return Result(*torch.ops.cute_flash.forward_widened.default(*call, *scaling))
    lse = torch.ops.cute_flash.forward_widened_out.default(options.out, *call, *scaling)
    return Result(options.out, lse)


def checked(
    q: Any, k: Any, v: Any, packing: Packing, options: Options, descale: Descale
) -> tuple[Call, Scaling]:
    """A call and its scales, by all checks of a cache of 16 bits and what one of 8 needs."""
    (q,) = request.as_autocast_has_it(q)
    if descale.q is not None:
        raise TypeError(f"q_descale is given, q is of {q.dtype}; allowed beside it: None")
    if descale.block is not None:
        raise TypeError(f"quantization_block is given, q is of {q.dtype}; allowed beside it: None")
    if descale.out_dtype not in (None, q.dtype):
        raise TypeError(f"out_dtype is {descale.out_dtype}; allowed: None or q's, {q.dtype}")
    call = cached.checked_of(q, k, v, packing, options, request.DTYPES, dtypes_kv=quantized.DTYPES)
    sizes = sizes_of(call)
    given, shape = {"k_descale": descale.k, "v_descale": descale.v}, (sizes.batch, sizes.heads_kv)
    scales = (quantized.scale_of(name, scale, call.q, shape) for name, scale in given.items())
    return call, Scaling(*scales)


def _parted(arguments: tuple) -> tuple[Call, Scaling]:
    count = len(Call._fields)
    return Call(*arguments[:count]), Scaling(*arguments[count:])


def check_scales(scaling: Scaling) -> None:
    """The numbers."""
    contents.check_scales({"k_descale": scaling.k_scale, "v_descale": scaling.v_scale})


def planned(call: Call, scaling: Scaling) -> Steps:
    """What a call launches."""
    asked = problem_of(call, kv_dtype=str(call.k.dtype).removeprefix("torch."))
    found = plan(asked, place_of(call.q.device).device, sizes_of(call), call.num_splits)
    scheduling.check_plan(call, found)
    return found


def _answer(out: torch.Tensor | None, arguments: tuple) -> ops.Answer:
    call, scaling = _parted(arguments)
    check_scales(scaling)
    return ops.answer(call, out, functools.partial(_launch, scaling))


def _forward(*arguments):
    out, lse, _ = _answer(None, arguments)
    return out, lse


def _forward_out(out, *arguments):
    return _answer(out, arguments).lse


def _forward_fake(*arguments):
    call, _ = _parted(arguments)
    return ops.new_out(call), _forward_out_fake(None, *arguments)


def _forward_out_fake(out, *arguments):
    call, _ = _parted(arguments)
    return ops.new_lse(call.q, ops.lse_shape(call))


def _launch(scaling: Scaling, call: Call, out: torch.Tensor, lse: torch.Tensor) -> Bound:
    steps = planned(call, scaling)
    contents.check(call, out)
    values = ops.values_of(call, out, lse) | scaling._asdict()
    values |= {name: values[name].view(torch.uint8) for name in "kv"}
    bound = launch.bind(steps, place_of(call.q.device), values)
    launch.run(bound, values)
    return bound


_ARGUMENTS = f"{schema.arguments(Call)}, {schema.arguments(Scaling)}"
ops.register(
    "forward_widened", f"forward_widened({_ARGUMENTS}) -> (Tensor out, Tensor lse)", _forward, _forward_fake
)
ops.register(
    "forward_widened_out",
    f"forward_widened_out(Tensor(a!) out, {_ARGUMENTS}) -> Tensor lse",
    _forward_out,
    _forward_out_fake,
)
