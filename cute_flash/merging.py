"""Merging what attention to parts of the keys gives, of anyone's making: the operator `merge`, and functions.

Softmax over all keys is a weighted mean of softmaxes over parts of them, with weights exp(lse - the largest).
A part that saw no key has lse -inf; its result is not read, and where all parts have, the result is 0.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from . import contents, launch, ops, overlap, request, schema
from .arch.combine import CombineProblem
from .arch.problem import Sizes
from .dispatch import Place, beside, place_of

DTYPES = (torch.float32, *request.DTYPES)
BASES = ("e", 2)


class Merge(NamedTuple):
    """A checked call: the operator's arguments, in their order.

    partial_out: (parts, batch, rows, heads, dim). partial_lse: (parts, batch, heads, rows), contiguous.
    dtype: of the result. log2: log-sum-exps are to base 2. lse: whether the merged one is asked for.
    """

    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    dtype: str
    log2: bool
    lse: bool


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Merge results of attention over parts of the keys, in float32 (FlashAttention-3's function).

    out_partial: (parts, batch, seqlen, heads, head_dim), or packed (parts, total, heads, head_dim), float32,
        float16 or bfloat16; the last dimension contiguous, all other strides multiples of 16 bytes. Head
        dims: 8 to 576 by 8.
    lse_partial: float32 (parts, batch, seqlen, heads), or (parts, total, heads): natural log-sum-exps, -inf
        of a part that saw no key, whose out_partial is not read. Any strides; those of stacked log-sum-exps
        of `flash_attn_func`, transposed, are read in place.
    out: where the result is written, (batch, seqlen, heads, head_dim); it must not overlap inputs.
    out_dtype: of the result; that of `out`, or of out_partial, if None.

    Returns (out, lse), lse the natural log-sum-exp of all parts, float32 (batch, seqlen, heads); out alone
    without return_lse. There are no gradients. TypeError, ValueError and NotImplementedError name the
    argument, what was given and what is allowed.
    """
    _check("out_partial", out_partial, "lse_partial", lse_partial, (4, 5))
    if out_dtype is None:
        out_dtype = out_partial.dtype if out is None else out.dtype
    if out_dtype not in DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; allowed: {', '.join(map(str, DTYPES))}")
    packed = out_partial.ndim == 4
    if out is not None:
        _check_out(out, out_partial, out_dtype)
    parts, lses = (x.unsqueeze(1) if packed else x for x in (out_partial, lse_partial))
    call = Merge(parts, lses.transpose(2, 3).contiguous(), _name(out_dtype), False, bool(return_lse))
    if out is None:
        found, lse = torch.ops.cute_flash.merge.default(*call)
        out = found.squeeze(0) if packed else found
    else:
        lse = torch.ops.cute_flash.merge_out.default(out.unsqueeze(0) if packed else out, *call)
    if not return_lse:
        return out
    lse = lse.transpose(1, 2)
    return out, lse.squeeze(0) if packed else lse


def merge_states(
    v: torch.Tensor, s: torch.Tensor, *, base: str | int = "e"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states of attention, (output, log-sum-exp), over parts of the keys (FlashInfer's function).

    v: (rows, states, heads, head_dim), float16, bfloat16 or float32. s: float32 (rows, states, heads),
    log-sum-exps, -inf of a state without keys. base: of their logarithm, "e", as this library has it, or 2,
    as FlashInfer does.

    Returns v (rows, heads, head_dim), in v's dtype, and s (rows, heads), to the same base. There are no
    gradients. TypeError, ValueError and NotImplementedError as for `flash_attn_combine`.
    """
    _check("v", v, "s", s, (4,))
    if isinstance(base, bool) or base not in BASES:
        raise ValueError(f"base is {base!r}; allowed: {', '.join(map(repr, BASES))}")
    parts, lses = v.transpose(0, 1).unsqueeze(1), s.permute(1, 2, 0).unsqueeze(1).contiguous()
    found, lse = torch.ops.cute_flash.merge.default(parts, lses, _name(v.dtype), base == 2, True)
    return found.squeeze(0), lse.squeeze(0).transpose(0, 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(name: str, parts: Any, name_lse: str, lses: Any, ranks: tuple[int, ...]) -> None:
    """The parts' results, and their log-sum-exps, whose shape is that without the last dimension."""
    for given, tensor, dtypes in ((name, parts, DTYPES), (name_lse, lses, (torch.float32,))):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{given} is {type(tensor).__name__}; allowed: torch.Tensor")
        if tensor.dtype not in dtypes:
            raise TypeError(f"{given} has dtype {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if request.needs_gradient(parts, lses):
        raise NotImplementedError(
            f"a gradient of {name} or {name_lse} is required, which merging has not; allowed: torch.no_grad()"
        )
    if parts.ndim not in ranks:
        allowed = " or ".join(map(str, ranks))
        raise ValueError(f"{name} has shape {tuple(parts.shape)}; allowed: {allowed} dimensions")
    if lses.shape != parts.shape[:-1]:
        raise ValueError(
            f"{name_lse} has shape {tuple(lses.shape)}; allowed: {tuple(parts.shape[:-1])}, that of {name} "
            "without its last dimension"
        )
    if lses.device != parts.device:
        raise ValueError(f"{name_lse} is on {lses.device}, {name} is on {parts.device}: they must be equal")
    if parts.shape[1 if name == "v" else 0] == 0:
        raise ValueError(f"{name} has shape {tuple(parts.shape)}; allowed: one part or more")


def _check_out(out: Any, parts: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is {type(out).__name__}; allowed: torch.Tensor")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}, out_dtype is {dtype}: they must be equal")
    if out.shape != parts.shape[1:]:
        raise ValueError(f"out has shape {tuple(out.shape)}; allowed: {tuple(parts.shape[1:])}")
    if out.device != parts.device:
        raise ValueError(f"out is on {out.device}, out_partial is on {parts.device}: they must be equal")


def _new(call: Merge) -> tuple[torch.Tensor, torch.Tensor]:
    _, *rows, dim = call.partial_out.shape
    return call.partial_out.new_empty((*rows, dim), dtype=getattr(torch, call.dtype)), _new_lse(call)


def _new_lse(call: Merge) -> torch.Tensor:
    return call.partial_lse.new_empty(call.partial_lse.shape[1:] if call.lse else (0,))


def _run(call: Merge, out: torch.Tensor, lse: torch.Tensor) -> None:
    contents.check_alignment("out_partial", call.partial_out)
    contents.check_alignment("out", out)
    if not call.partial_lse.numel():
        return
    batch, rows, heads, dim = out.shape
    problem = CombineProblem(call.dtype, int(dim), lse=call.lse, part_dtype=_name(call.partial_out.dtype),
                             log2=call.log2)
    place = place_of(out.device)
    bound = _bound(problem, place, Sizes(batch, heads, heads, rows, 0), launch.executable)
    launch.run(bound, call._asdict() | {"out": out, "lse": lse})


@functools.lru_cache(maxsize=1024)
def _bound(problem: CombineProblem, place: Place, sizes: Sizes, _executable: Any) -> launch.Bound:
    """The kernel, ready to run. Remembered with what makes kernels executable, which tests replace."""
    return launch.bind(beside(problem, place.device, sizes), place, {})


def _merge(*arguments):
    call = Merge(*arguments)
    out, lse = _new(call)
    _run(call, out, lse)
    return out, lse


def _merge_fake(*arguments):
    return _new(Merge(*arguments))


def _merge_out(out, *arguments):
    call = Merge(*arguments)
    if overlap.overlaps_itself(out):
        raise ValueError(f"out has strides {out.stride()}: several elements in one place; allowed: one each")
    for name, tensor in (("out_partial", call.partial_out), ("lse_partial", call.partial_lse)):
        if overlap.overlap(out, tensor):
            raise ValueError(f"out overlaps {name} in memory; allowed: memory that no input uses")
    lse = _new_lse(call)
    _run(call, out, lse)
    ops.note_written(out)
    return lse


def _merge_out_fake(out, *arguments):
    return _new_lse(Merge(*arguments))


_ARGUMENTS = schema.arguments(Merge)
ops.register("merge", f"merge({_ARGUMENTS}) -> (Tensor out, Tensor lse)", _merge, _merge_fake)
ops.register(
    "merge_out", f"merge_out(Tensor(a!) out, {_ARGUMENTS}) -> Tensor lse", _merge_out, _merge_out_fake
)
