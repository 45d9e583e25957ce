"""Attention on q, k and v of 8 bits: `flash_attn_quantized_func`, what `flash_attn_func` and
`flash_attn_varlen_func` do with such tensors, and the operators, `forward_quantized` and
`forward_quantized_out`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from . import block_scaled, cached, contents, launch, ops, request, scalars, scheduling, schema
from .arch.kernel import Steps
from .arch.quantized import DTYPES as NAMES
from .dispatch import place_of, plan
from .launch import Bound
from .problems import problem_of, sizes_of
from .quantization import Quantized
from .repeat import Result
from .request import Call, Options, Packing

DTYPES = tuple(getattr(torch, name) for name in NAMES)
OUT_DTYPES = (torch.float16, torch.bfloat16)
NAMED = ("q_descale", "k_descale", "v_descale", "quantization_block", "out_dtype")


class Descale(NamedTuple):
    """The arguments that are for tensors of 8 bits, in the order of NAMED."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    block: int | None = None
    out_dtype: torch.dtype | None = None


class Scaling(NamedTuple):
    """What the operator is given besides a `Call`. block 0: a scale for all rows. half: out is float16."""

    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    block: int
    half: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the result."""
        return torch.float16 if self.half else torch.bfloat16


def flash_attn_quantized_func(
    q: Quantized,
    k: Quantized,
    v: Quantized,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    block_mask: Any = None,
    learnable_sink: torch.Tensor | None = None,
    num_splits: int | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in few bits: products of 8- or 4-bit numbers, softmax and sums in float32, no gradients.

    q: (batch, seqlen_q, heads, head_dim), k: (batch, seqlen_k, heads_kv, head_dim),
    v: (batch, seqlen_k, heads_kv, head_dim_v), from `quantize`; heads is a multiple of heads_kv. q and k are
        rotated alike or not at all, v is not. Formats:

        q, k "e4m3" or "e5m2", v the same, all of one block: compute capabilities 9.0 and 10.0 to 11.0
        q, k "mxfp8" or "nvfp4", v "e4m3" without a block or "mxfp8" along "seqlen": 10.0 to 11.0, where
        tensor cores apply their scales; head dims are multiples of 32

        What has a float32 scale for all rows of a head has one for each KV head: quantize(q,
        heads_kv=heads_kv).
    softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, block_mask, learnable_sink,
        num_splits, return_lse: as in `flash_attn_func`.
    out_dtype: float16 or bfloat16.

    P is lifted before it is rounded to e4m3, to 2**8 at most. On compute capability 9.0 it is divided by the
    sum of what was rounded, and O is summed in float32 tile by tile, since the tensor core keeps less;
    beyond, by the sum of P itself (profiling/results/accuracy.md has what all of it costs). Beside v in mxfp8
    P's own scales are all 1.

    Returns out, (batch, seqlen_q, heads, head_dim_v), and with return_lse (out, lse), lse float32 (batch,
    heads, seqlen_q), the natural log of the softmax's sum.

    Raises TypeError and ValueError with the argument, what was given and what is allowed; NotImplementedError
    with every reason where no kernel serves: there are some for compute capabilities 9.0 and 10.0 to 11.0.
    """
    _check(q, k, v)
    options = Options(
        0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, None, block_mask, num_splits,
    )
    if q.format in block_scaled.FORMS:
        _check_out_dtype(out_dtype)
        _refuse_gradients(learnable_sink)
        found = block_scaled.forward(q, k, v, options, out_dtype)
    else:
        descale = Descale(*(x.scale for x in (q, k, v)), q.block, out_dtype)
        found = forward(q.data, k.data, v.data, None, options, descale)
    return tuple(found) if return_lse else found.out


def _check(q: Any, k: Any, v: Any) -> None:
    tensors = {"q": q, "k": k, "v": v}
    for name, x in tensors.items():
        if not isinstance(x, Quantized):
            raise TypeError(f"{name} is {type(x).__name__}; allowed: Quantized, from cute_flash.quantize")
        if x.data.device != q.data.device:
            raise ValueError(f"{name} is on {x.data.device}, q on {q.data.device}: they must be equal")
    _check_shapes(q, k, v)
    if q.format in block_scaled.FORMS:
        block_scaled.check(tensors)
        return
    for name, x in tensors.items():
        if (x.block, x.format) != (q.block, q.format):
            raise ValueError(
                f"{name} has block {x.block} in {x.format}, q has block {q.block} in {q.format}: "
                "they must be equal"
            )
        if q.block is None and x.scale.shape[1] != k.shape[2]:
            raise ValueError(
                f"{name} has {x.scale.shape[1]} scales for each sequence; allowed: {k.shape[2]}, one for "
                f"each KV head: quantize({name}, heads_kv={k.shape[2]})"
            )


def _check_shapes(q: Quantized, k: Quantized, v: Quantized) -> None:
    """Sizes and rotations."""
    (batch, _, heads, head_dim), (_, seqlen_k, heads_kv, _) = q.shape, k.shape
    if k.shape != (batch, seqlen_k, heads_kv, head_dim) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k and v have shapes {k.shape} and {v.shape}, q has {q.shape}; allowed: ({batch}, seqlen_k, "
            f"heads_kv, {head_dim}) and ({batch}, seqlen_k, heads_kv, head_dim_v)"
        )
    if heads % heads_kv:
        raise ValueError(f"q has {heads} heads and k {heads_kv}; allowed: a multiple")
    if q.rotation != k.rotation:
        raise ValueError(f"q is rotated by {q.rotation}, k by {k.rotation}: they must be equal")
    if v.rotation is not None:
        raise ValueError(f"v is rotated by {v.rotation}; allowed: None, quantize(v, hadamard=False)")


def _refuse_gradients(*tensors: torch.Tensor | None) -> None:
    if request.needs_gradient(*tensors):
        raise NotImplementedError("a gradient is required; of q, k and v of 8 bits there is none: no_grad()")


def _check_out_dtype(out_dtype: Any) -> None:
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; allowed: {_listed(OUT_DTYPES)}")


def forward(q: Any, k: Any, v: Any, packing: Packing | None, options: Options, descale: Descale) -> Result:
    """Attention on tensors of 8 bits, from the user's arguments."""
    return attend(*checked(q, k, v, packing, options, descale), options)


def attend(call: Call, scaling: Scaling, options: Options) -> Result:
    """A checked call, by the operators."""
    if options.out is None:
        out, lse = torch.ops.cute_flash.forward_quantized.default(*call, *scaling)
    else:
        out = options.out
        lse = torch.ops.cute_flash.forward_quantized_out.default(out, *call, *scaling)
    return Result(out, lse if options.lse else None)


def is_meant(q: Any, descale: Descale) -> bool:
    """Whether a call is one on 8 bits; TypeError where q is not but an argument is for such tensors."""
    if isinstance(q, torch.Tensor) and q.dtype in DTYPES:
        return True
    if descale.count(None) < len(descale):
        name = next(name for name, given in zip(NAMED, descale, strict=True) if given is not None)
        kind = q.dtype if isinstance(q, torch.Tensor) else type(q).__name__
        raise TypeError(f"{name} is given, q is of {kind}; allowed beside it: {_listed(DTYPES)}")
    return False


def checked(
    q: Any, k: Any, v: Any, packing: Packing | None, options: Options, descale: Descale
) -> tuple[Call, Scaling]:
    """A call and its scales, by all checks of those of 16 bits and what 8 bits need."""
    out, out_dtype = options.out, descale.out_dtype
    if out_dtype is None:
        given = getattr(out, "dtype", None)
        out_dtype = given if given in OUT_DTYPES else torch.bfloat16
    _check_out_dtype(out_dtype)
    _refuse_gradients(q, k, v, options.learnable_sink, out)
    options = options._replace(out=None)
    if packing is None:
        call = request.dense_of(q, k, v, options, DTYPES)
    elif packing.cached:
        call = cached.checked_of(q, k, v, packing, options, DTYPES)
    else:
        call = request.varlen_of(q, k, v, packing, options, DTYPES)
    request.check_out(out, q, v, out_dtype)
    return call, _scaling(call, descale, out_dtype)


def _scaling(call: Call, descale: Descale, out_dtype: torch.dtype) -> Scaling:
    block, sizes = scalars.quantization_block(descale.block), sizes_of(call)
    shape_q = shape_k = (sizes.batch, sizes.heads_kv)
    if block is not None:
        shape_q = (sizes.batch, sizes.heads_q, -(-sizes.seqlen_q // block))
        shape_k = (*shape_k, -(-sizes.seqlen_k // block))
    scales = (
        scale_of(f"{name}_descale", getattr(descale, name), call.q, shape)
        for name, shape in (("q", shape_q), ("k", shape_k), ("v", shape_k))
    )
    return Scaling(*scales, block or 0, out_dtype is torch.float16)


def scale_of(name: str, scale: Any, q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What a tensor's numbers are multiplied by; None: 1."""
    if scale is None:
        return q.new_ones(shape, dtype=torch.float32)
    scale = scale.contiguous() if isinstance(scale, torch.Tensor) else scale
    request.check_tensor(name, scale, q, (torch.float32,), None)
    if tuple(scale.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(scale.shape)}; allowed: {shape}")
    return scale


def _listed(values: tuple) -> str:
    return ", ".join(map(str, values))


def _parted(arguments: tuple) -> tuple[Call, Scaling]:
    count = len(Call._fields)
    return Call(*arguments[:count]), Scaling(*arguments[count:])


def check_scales(scaling: Scaling) -> None:
    """The numbers."""
    contents.check_scales(dict(zip(NAMED, scaling[:3], strict=False)))


def planned(call: Call, scaling: Scaling) -> Steps:
    """What a call launches."""
    out_dtype = str(scaling.out_dtype).removeprefix("torch.")
    asked = problem_of(call, out_dtype=out_dtype, block=scaling.block or None)
    found = plan(asked, place_of(call.q.device).device, sizes_of(call), call.num_splits)
    scheduling.check_plan(call, found)
    return found


def _answer(out: torch.Tensor | None, arguments: tuple) -> ops.Answer:
    call, scaling = _parted(arguments)
    check_scales(scaling)
    return ops.answer(call, out, functools.partial(_launch, scaling), scaling.out_dtype)


def _forward(*arguments):
    out, lse, _ = _answer(None, arguments)
    return out, lse


def _forward_out(out, *arguments):
    return _answer(out, arguments).lse


def _forward_fake(*arguments):
    call, scaling = _parted(arguments)
    return ops.new_out(call, scaling.out_dtype), _forward_out_fake(None, *arguments)


def _forward_out_fake(out, *arguments):
    call, _ = _parted(arguments)
    return ops.new_lse(call.q, ops.lse_shape(call))


def _launch(scaling: Scaling, call: Call, out: torch.Tensor, lse: torch.Tensor) -> Bound:
    steps = planned(call, scaling)
    contents.check(call, out)
    values = ops.values_of(call, out, lse) | scaling._asdict()
    values |= {name: values[name].view(torch.uint8) for name in "qkv"}
    bound = launch.bind(steps, place_of(call.q.device), values)
    launch.run(bound, values)
    return bound


_ARGUMENTS = f"{schema.arguments(Call)}, {schema.arguments(Scaling)}"
ops.register(
    "forward_quantized",
    f"forward_quantized({_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
)
ops.register(
    "forward_quantized_out",
    f"forward_quantized_out(Tensor(a!) out, {_ARGUMENTS}) -> Tensor lse",
    _forward_out,
    _forward_out_fake,
)
