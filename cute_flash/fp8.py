"""Training in FP8: `flash_attn_fp8_func` and `flash_attn_varlen_fp8_func`, which bring 16 bits to FP8 on
their way, and the operators `forward_fp8` and `backward_fp8`.

Saved between the two are q, k and v in 8 bits, their scales, out and the log-sum-exp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

from . import backward, flops, ops, request, schema
from .arch.quantized_backward import QuantizedBackwardProblem
from .backward import Given, Gradients
from .dispatch import dispatch, place_of
from .problems import problem_of, sizes_of
from .quantization import check_rotation, quantize
from .quantized import Scaling
from .request import Call, Options, Packing
from .rotation import Rotation


def flash_attn_fp8_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
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
    deterministic: bool = False,
    hadamard: bool = True,
    seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention whose products have 8 bits, forward and backward, on tensors of 16 bits.

    q: (batch, seqlen_q, heads, head_dim), k: (batch, seqlen_k, heads_kv, head_dim),
    v: (batch, seqlen_k, heads_kv, head_dim_v), float16 or bfloat16; head dims: 16 to 256 by 16, with a
        gradient to 128 on compute capability 9.0.
    softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, block_mask, learnable_sink,
        deterministic, return_lse: as in `flash_attn_func`.
    hadamard, seed: q and k are rotated by random signs and the Walsh–Hadamard transform before they are
        rounded, as `quantize` has it, which spreads outliers over a head.

    q, k, v, and dout in the backward pass, are brought to e4m3 with a scale for each sequence and KV head.
    Gradients are those of the rounded numbers and reach q, k and v as if nothing had been rounded. P is
    rounded to e4m3, dS to e5m2 (Micikevicius et al. 2022); both, and all sums, are computed in float32.
    profiling/results/accuracy.md has what it costs. Where the gradient of the log-sum-exp is 2**16 times as
    large as dout and more, dv loses digits, as dout then has a larger scale.

    Returns as `flash_attn_func`.

    Raises TypeError and ValueError with the argument, what was given and what is allowed; NotImplementedError
    with every reason where no kernel serves: there are some for compute capabilities 9.0 and 10.0 to 11.0.
    """
    options = Options(
        0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, None, block_mask, None, deterministic,
    )  # fmt: skip
    return _answer(request.dense(q, k, v, options), hadamard, seed, return_lse)


def flash_attn_varlen_fp8_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    mask: Any = None,
    score: Any = None,
    learnable_sink: torch.Tensor | None = None,
    deterministic: bool = False,
    hadamard: bool = True,
    seed: int = 0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same on packed sequences, all of which share the scale of a KV head.

    q: (total_q, heads, head_dim), k: (total_k, heads_kv, head_dim), v: (total_k, heads_kv, head_dim_v).
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k: as in
        `flash_attn_varlen_func`.
    All others, and what is raised: as in `flash_attn_fp8_func`.

    Returns as `flash_attn_varlen_func`.
    """
    options = Options(
        0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, None, deterministic=deterministic,
    )  # fmt: skip
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k)
    return _answer(request.varlen(q, k, v, packing, options), hadamard, seed, return_lse)


def _answer(
    call: Call, hadamard: bool, seed: int, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Of a checked call of 16 bits."""
    rotation = check_rotation(call.q.shape[-1], hadamard, seed)
    call = call._replace(lse=True)
    seed = NOT_ROTATED if rotation is None else rotation.seed
    out, lse, *_ = torch.ops.cute_flash.forward_fp8.default(*call, seed)
    return (out, lse) if return_lse else out


NOT_ROTATED = -1  # as a seed
LSE_ROOM = 23  # of the 2**24.8 units of v's and dO's scales that dS has room for
NOTHING = 2.0**-108  # the scale of zeros is less


class Stored(NamedTuple):
    """What the operator `forward_fp8` gives the other besides out and the log-sum-exp: elements of e4m3 as
    bytes, and scales, float32 (batch, KV heads).
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor

    def scaling(self, half: bool) -> Scaling:
        """As operators of 8 bits have it. half: the result is float16."""
        return Scaling(self.q_scale, self.k_scale, self.v_scale, 0, half)


def in_8_bits(x: torch.Tensor, call: Call, seed: int = NOT_ROTATED) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements of e4m3, shaped as x, and scales, (batch, KV heads); packed sequences have the same."""
    heads_kv, batch = call.k.shape[-2], sizes_of(call).batch
    if not x.numel():
        return x.to(torch.float8_e4m3fn), x.new_ones((batch, heads_kv), dtype=torch.float32)
    turned = {"hadamard": False} if seed == NOT_ROTATED else {"seed": seed}
    packed = call.cu_seqlens_q is not None
    found = quantize(x[None] if packed else x, heads_kv=heads_kv, **turned)
    if not packed:
        return found.data, found.scale
    return found.data[0], found.scale.expand(batch, -1).contiguous()


def with_room(given: Given, stored: Stored, call: Call) -> tuple[Stored, torch.Tensor, torch.Tensor]:
    """What is stored, and elements and scales of dO, such that dS holds a gradient of the log-sum-exp too.

    dS is in units of v's and dO's scales: dO's is so large that P times that gradient does not saturate.
    Where v is nothing but zeros, whose scale says nothing, it is 1.
    """
    packed, heads_kv = call.cu_seqlens_q is not None, call.k.shape[-2]
    nothing = stored.v_scale < NOTHING
    v_scale = stored.v_scale.masked_fill(nothing, 1.0)
    v = stored.v.masked_fill(_by_row(nothing, call.v, packed), 0)
    _, scale = in_8_bits(given.grad_out.contiguous(), call)
    largest = given.grad_lse.unflatten(-2, (heads_kv, -1)).abs().nan_to_num(0.0).amax((-2, -1))
    scale = torch.maximum(scale, largest * 2.0**-LSE_ROOM / v_scale)
    if packed:
        scale = scale.amax(0, keepdim=True).expand_as(v_scale).contiguous()
    limit = torch.finfo(torch.float8_e4m3fn).max
    grad_out = given.grad_out.float() / _by_row(scale, given.grad_out, packed)
    grad_out = grad_out.clamp(-limit, limit).to(torch.float8_e4m3fn)
    return stored._replace(v=v, v_scale=v_scale), grad_out, scale


def _by_row(of_heads: torch.Tensor, rows: torch.Tensor, packed: bool) -> torch.Tensor:
    """(batch, KV heads), of packed sequences all the same, for the heads of (batch, rows, heads, dim)."""
    found = of_heads.repeat_interleave(rows.shape[-2] // of_heads.shape[1], 1)
    return found[0][None, :, None] if packed else found[:, None, :, None]


def of_bytes(call: Call, stored: Stored) -> Call:
    """The call on what is stored."""
    q, k, v = (x.view(torch.float8_e4m3fn) for x in stored[:3])
    return call._replace(q=q, k=k, v=v)


def asked(call: Call, half: bool, grad_lse: torch.Tensor | None) -> QuantizedBackwardProblem:
    """What the gradients of a call on 8 bits depend on."""
    forward = problem_of(
        call, dtype=torch.float8_e4m3fn, head_dim=int(call.q.shape[-1]), block=None,
        out_dtype="float16" if half else "bfloat16",
    )  # fmt: skip
    return QuantizedBackwardProblem(forward, grad_lse is not None, call.deterministic)


def _forward(*arguments):
    call, seed = Call(*arguments[:-1]), arguments[-1]
    (q, q_scale), (k, k_scale) = (in_8_bits(x, call, seed) for x in (call.q, call.k))
    v, v_scale = in_8_bits(call.v, call)
    stored = Stored(*(x.view(torch.uint8) for x in (q, k, v)), q_scale, k_scale, v_scale)
    scaling = stored.scaling(call.q.dtype is torch.float16)
    out, lse = torch.ops.cute_flash.forward_quantized.default(*of_bytes(call, stored), *scaling)
    return out, lse, *stored


def _forward_fake(*arguments):
    call = Call(*arguments[:-1])
    elements = (x.new_empty(x.shape, dtype=torch.uint8) for x in (call.q, call.k, call.v))
    shape = sizes_of(call).batch, call.k.shape[-2]
    scales = (call.q.new_empty(shape, dtype=torch.float32) for _ in range(3))
    return ops.new_out(call), ops.new_lse(call.q, ops.lse_shape(call)), *elements, *scales


def _split(arguments: tuple) -> tuple[Given, Stored, bool, int, Call]:
    given, stored = len(Given._fields), len(Given._fields) + len(Stored._fields)
    half, seed, *call = arguments[stored:]
    return Given(*arguments[:given]), Stored(*arguments[given:stored]), half, seed, Call(*call)


def _backward(*arguments):
    given, stored, half, seed, call = _split(arguments)
    nothing = not (given.grad_out.numel() and stored.k.numel()) or ops.has_no_sequence(call)
    if given.grad_lse is None or nothing:
        grad_out, scale = in_8_bits(given.grad_out.contiguous(), of_bytes(call, stored))
    else:
        stored, grad_out, scale = with_room(given, stored, of_bytes(call, stored))
    call = of_bytes(call, stored)
    given = given._replace(grad_out=grad_out)
    others = stored._asdict() | {"grad_out": grad_out.view(torch.uint8), "grad_out_scale": scale}
    found = backward.new(call, torch.float16 if half else torch.bfloat16)
    found = backward.computed(given, call, asked(call, half, given.grad_lse), found, others)
    if seed != NOT_ROTATED:
        rotation = Rotation(call.q.shape[-1], seed)
        found = found._replace(q=rotation.undo_by_product(found.q), k=rotation.undo_by_product(found.k))
    return tuple(found)


def _backward_fake(*arguments):
    _, stored, half, _, call = _split(arguments)
    return tuple(backward.new(of_bytes(call, stored), torch.float16 if half else torch.bfloat16))


def _set_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keep what the gradients are computed from, where any is asked for."""
    call, ctx.seed = Call(*inputs[:-1]), inputs[-1]
    ctx.half = call.q.dtype is torch.float16
    # Nobody checked a call that is traced.
    if not call.q.is_meta:
        dispatch(asked(call, ctx.half, None), place_of(call.q.device).device)
    ctx.set_materialize_grads(False)
    tensors = {name: value for name, value in call._asdict().items() if isinstance(value, torch.Tensor)}
    ctx.call = call._replace(**dict.fromkeys(tensors), rule_tensors=[])
    ctx.tensors = [name for name in tensors if name not in ("q", "k", "v")]
    ctx.save_for_backward(*output, *(tensors[name] for name in ctx.tensors), *call.rule_tensors)


def _differentiate(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, *_: Any) -> tuple:
    """Gradients of the operator's arguments, None for all but q, k, v and the sink."""
    out, lse, *tensors = ctx.saved_tensors
    count = len(Stored._fields)
    stored, tensors = Stored(*tensors[:count]), tensors[count:]
    named = dict(zip(ctx.tensors, tensors, strict=False)) | dict(zip("qkv", stored, strict=False))
    call = ctx.call._replace(**named, rule_tensors=tensors[len(ctx.tensors) :])
    given = Given(torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, out, lse)
    told = (*given, *stored, ctx.half, ctx.seed, *call)
    found = Gradients(*torch.ops.cute_flash.backward_fp8.default(*told))
    return (*backward.by_argument(call, found).values(), None)


def _flops(*arguments: Any, out_val: Any = None) -> int:
    return flops.of_forward(*arguments[:-1])


def _flops_of_backward(*arguments: Any, out_val: Any = None) -> int:
    given, _, _, _, call = _split(arguments)
    return flops.of_backward(*given, *call)


_STORED = ", ".join(f"Tensor {name}_stored" for name in Stored._fields)
ops.register(
    "forward_fp8",
    f"forward_fp8({schema.arguments(Call)}, int seed) -> (Tensor out, Tensor lse, {_STORED})",
    _forward,
    _forward_fake,
)
_GIVEN = f"{schema.arguments(Given)}, {_STORED}, bool half, int seed, {schema.arguments(Call)}"
_RESULTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
ops.register("backward_fp8", f"backward_fp8({_GIVEN}) -> ({_RESULTS})", _backward, _backward_fake)
torch.library.register_autograd(
    "cute_flash::forward_fp8", _differentiate, setup_context=_set_up, lib=ops.LIBRARY
)
torch.library.register_autograd("cute_flash::backward_fp8", backward.no_second, lib=ops.LIBRARY)
register_flop_formula(torch.ops.cute_flash.forward_fp8, get_raw=True)(_flops)
register_flop_formula(torch.ops.cute_flash.backward_fp8, get_raw=True)(_flops_of_backward)
