"""Attention with scales that tensor cores apply: what `flash_attn_quantized_func` does with MXFP8 and NVFP4,
and the operator, `forward_block_scaled`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import contents, launch, ops, request, scale_factors, schema
from .arch.block_scaled import FORMS as FORMS
from .arch.block_scaled import V_FORMS
from .arch.precision import QUANTIZATIONS
from .dispatch import place_of, plan
from .problems import problem_of, sizes_of
from .quantization import Quantized
from .repeat import Result
from .request import Call, Options


class Factors(NamedTuple):
    """What the operator is given besides a `Call` of bytes.

    q_scale, k_scale, v_scale: float32 (batch, KV heads). q_factors, k_factors, v_factors: bytes in the order
    that tensor cores take, v's None where it has none. form, v_form: formats. head_dim: of q. half: out is
    float16.
    """

    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    q_factors: torch.Tensor
    k_factors: torch.Tensor
    v_factors: torch.Tensor | None
    form: str
    v_form: str
    head_dim: int
    half: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the result."""
        return torch.float16 if self.half else torch.bfloat16


def check(tensors: dict[str, Quantized]) -> None:
    """Formats, axes and scales of q, k and v, whose shapes fit each other."""
    q, k, v = tensors.values()
    if k.format != q.format:
        raise ValueError(f"k has format {k.format}, q has {q.format}: they must be equal")
    if v.format not in V_FORMS:
        allowed = ", ".join(V_FORMS)
        raise NotImplementedError(f"v has format {v.format}; allowed beside q in {q.format}: {allowed}")
    along_keys = QUANTIZATIONS[v.format].group is not None
    axes = {"q": "head_dim", "k": "head_dim", "v": "seqlen" if along_keys else "head_dim"}
    for name, x in tensors.items():
        if x.axis != axes[name]:
            raise ValueError(f"{name} has scales along {x.axis}; allowed: {axes[name]}, the axis that its "
                             f"product sums over: quantize({name}, {x.format!r}, axis={axes[name]!r})")
        if x.block is not None:
            raise ValueError(f"{name} has scales of blocks of {x.block} rows; allowed with {q.format}: None")
        _check_scale(name, x)
    heads_kv = k.shape[2]
    for name, x in tensors.items():
        one = x.tensor_scale if x.format == "nvfp4" else x.scale if x.format == "e4m3" else None
        if one is not None and one.shape[1] != heads_kv:
            raise ValueError(f"{name} has {one.shape[1]} float32 scales for each sequence; allowed: "
                             f"{heads_kv}, one for each KV head: quantize({name}, heads_kv={heads_kv})")


def _check_scale(name: str, x: Quantized) -> None:
    """A scale tensor in the order, the dtype and the size that its format has."""
    form, (batch, seqlen, heads, head_dim) = QUANTIZATIONS[x.format], x.shape
    dtype = getattr(torch, form.scale.name)
    if x.scale.dtype is not dtype or x.scale.device != x.data.device:
        raise TypeError(f"{name}.scale is {x.scale.dtype} on {x.scale.device}; allowed: {dtype} on "
                        f"{x.data.device}")
    if form.group is None:
        return
    along = (seqlen, head_dim) if x.axis == "head_dim" else (head_dim, seqlen)
    shape = (batch, heads, *scale_factors.shape_of(along[0], -(-along[1] // form.group)))
    if tuple(x.scale.shape) != shape or not x.scale.is_contiguous():
        raise ValueError(f"{name}.scale has shape {tuple(x.scale.shape)} and strides {x.scale.stride()}; "
                         f"allowed: {shape}, contiguous, in the order of scale_factors.to_atoms")


def forward(q: Quantized, k: Quantized, v: Quantized, options: Options, out_dtype: torch.dtype) -> Result:
    """Attention on checked tensors."""
    if options.softmax_scale is None:
        options = options._replace(softmax_scale=q.shape[3] ** -0.5)
    call = request.dense_of(*(x.data.view(torch.uint8) for x in (q, k, v)), options, (torch.uint8,))
    ones = q.scale.new_ones((q.shape[0], k.shape[2]), dtype=torch.float32)
    factors = Factors(
        *(ones if x.tensor_scale is None else x.tensor_scale for x in (q, k)),
        ones if v.format == "mxfp8" else v.scale,
        q.scale.view(torch.uint8),
        k.scale.view(torch.uint8),
        v.scale.view(torch.uint8) if v.format == "mxfp8" else None,
        q.format,
        v.format,
        q.shape[3],
        out_dtype is torch.float16,
    )
    out, lse = torch.ops.cute_flash.forward_block_scaled.default(*call, *factors)
    return Result(out, lse if options.lse else None)


def _parted(arguments: tuple) -> tuple[Call, Factors]:
    count = len(Call._fields)
    return Call(*arguments[:count]), Factors(*arguments[count:])


def _new(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call, factors = _parted(arguments)
    out = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]), dtype=factors.out_dtype)
    return out, ops.new_lse(call.q, ops.lse_shape(call))


def _forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (call, factors), (out, lse) = _parted(arguments), _new(*arguments)
    contents.check_scales({f"{name}'s scale": x for name, x in zip("qkv", factors[:3], strict=False)})
    for name, form in (("q", factors.form), ("k", factors.form), ("v", factors.v_form)):
        contents.check_factors(f"{name}.scale", getattr(factors, f"{name}_factors"), QUANTIZATIONS[form])
    if out.numel():
        _launch(call, factors, out, lse)
    return out, lse


def _launch(call: Call, factors: Factors, out: torch.Tensor, lse: torch.Tensor) -> None:
    form = QUANTIZATIONS[factors.form]
    asked = problem_of(
        call, dtype=form.element.name, head_dim=int(factors.head_dim), form=factors.form,
        v_form=factors.v_form, out_dtype=str(out.dtype).removeprefix("torch."),
    )
    place = place_of(call.q.device)
    planned = plan(asked, place.device, sizes_of(call), call.num_splits)
    contents.check(call, out)
    values = ops.values_of(call, out, lse) | factors._asdict()
    launch.run(launch.bind(planned, place, values), values)


ops.register(
    "forward_block_scaled",
    f"forward_block_scaled({schema.arguments(Call)}, {schema.arguments(Factors)}) -> (Tensor, Tensor)",
    _forward,
    _new,
)
