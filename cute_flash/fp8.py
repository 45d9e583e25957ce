"""Training in FP8: `flash_attn_fp8_func`, which brings 16 bits to FP8 on its way, and the operator
`backward_quantized`, its gradients.

Saved between the two are q, k and v in 8 bits, their scales, out and the log-sum-exp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import backward, ops, request, schema
from .arch.quantized_backward import QuantizedBackwardProblem
from .backward import Given, Gradients
from .dispatch import place_of, plan
from .problems import problem_of, sizes_of
from .quantization import Quantized, quantize
from .quantized import Scaling
from .request import Call, Options
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
        gradient to 128.
    softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, block_mask, learnable_sink,
        deterministic, return_lse: as in `flash_attn_func`.
    hadamard, seed: q and k are rotated by random signs and the Walsh–Hadamard transform before they are
        rounded, as `quantize` has it, which spreads outliers over a head.

    q, k, v, and dout in the backward pass, are brought to e4m3 with a scale for each sequence and KV head.
    Gradients are those of the rounded numbers and reach q, k and v as if nothing had been rounded. P is
    rounded to e4m3, dS to e5m2 (Micikevicius et al. 2022); both, and all sums, are computed in float32.
    profiling/results/accuracy.md has what it costs.

    Returns as `flash_attn_func`.

    Raises TypeError and ValueError with the argument, what was given and what is allowed; NotImplementedError
    with every reason where no kernel serves: there are some for compute capabilities 9.0 and 10.0 to 11.0,
    for gradients from 10.0 on.
    """
    options = Options(
        0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, mask, score, learnable_sink,
        return_lse, None, block_mask, None, deterministic,
    )  # fmt: skip
    call = request.dense(q, k, v, options)
    rotation = Rotation(call.q.shape[-1], seed) if hadamard else None
    out, lse = _Attention.apply(call.q, call.k, call.v, call.sink, call, rotation)
    return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    """Of a checked call of 16 bits; its tensors with gradients come by themselves, too."""

    @staticmethod
    def forward(ctx, q, k, v, sink, call: Call, rotation: Rotation | None):
        call, scaling = quantized(call._replace(q=q, k=k, v=v, sink=sink), rotation)
        if any(ctx.needs_input_grad):
            check(call, scaling)
        out, lse = torch.ops.cute_flash.forward_quantized.default(*call, *scaling)
        ctx.set_materialize_grads(False)
        tensors = {
            name: x
            for given in (call, scaling)
            for name, x in given._asdict().items()
            if isinstance(x, torch.Tensor)
        }
        ctx.names, ctx.rotation = list(tensors), rotation
        ctx.call = call._replace(**{name: None for name in tensors if name in Call._fields}, rule_tensors=[])
        ctx.scaling = scaling._replace(**{name: None for name in tensors if name in Scaling._fields})
        ctx.save_for_backward(out, lse, *tensors.values(), *call.rule_tensors)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        out, lse, *rest = ctx.saved_tensors
        count = len(ctx.names)
        named = dict(zip(ctx.names, rest[:count], strict=True))
        call, scaling = (
            given._replace(**{name: x for name, x in named.items() if name in given._fields})
            for given in (ctx.call, ctx.scaling)
        )
        call = call._replace(rule_tensors=rest[count:])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_out = quantize(grad_out.contiguous(), heads_kv=call.k.shape[-2], hadamard=False)
        given = Incoming(grad_out.data, grad_lse, out, lse, grad_out.scale)
        found = Gradients(*torch.ops.cute_flash.backward_quantized.default(*given, *call, *scaling))
        q, k = found.q, found.k
        if ctx.rotation is not None:
            q, k = map(ctx.rotation.undo_by_product, (q, k))
        return q, k, found.v, None if call.sink is None else found.sink, None, None


class Incoming(NamedTuple):
    """What the operator takes besides a call and its scales: as `backward.Given`, dO in 8 bits."""

    grad_out: torch.Tensor
    grad_lse: torch.Tensor | None
    out: torch.Tensor
    softmax_lse: torch.Tensor
    grad_out_scale: torch.Tensor


def quantized(call: Call, rotation: Rotation | None) -> tuple[Call, Scaling]:
    """A call of 16 bits in 8, and its scales."""
    told: dict[str, Any] = {"heads_kv": call.k.shape[-2]}
    turned = {"hadamard": False} if rotation is None else {"seed": rotation.seed}
    q, k = (quantize(x, **told, **turned) for x in (call.q, call.k))
    v: Quantized = quantize(call.v, **told, hadamard=False)
    scaling = Scaling(q.scale, k.scale, v.scale, 0, call.q.dtype is torch.float16)
    return call._replace(q=q.data, k=k.data, v=v.data, lse=True), scaling


def check(call: Call, scaling: Scaling) -> None:
    """NotImplementedError with every kernel's every reason where a call has no gradients."""
    if not call.q.is_meta:
        plan(asked(call, scaling, None), place_of(call.q.device).device, sizes_of(call))


def asked(call: Call, scaling: Scaling, grad_lse: torch.Tensor | None) -> QuantizedBackwardProblem:
    """What the gradients of a checked call depend on."""
    out_dtype = str(scaling.out_dtype).removeprefix("torch.")
    forward = problem_of(call, out_dtype=out_dtype, block=None)
    return QuantizedBackwardProblem(forward, grad_lse is not None, call.deterministic)


def _split(arguments: tuple) -> tuple[Incoming, Call, Scaling]:
    given, call = len(Incoming._fields), len(Incoming._fields) + len(Call._fields)
    return Incoming(*arguments[:given]), Call(*arguments[given:call]), Scaling(*arguments[call:])


def _backward(*arguments):
    incoming, call, scaling = _split(arguments)
    given = Given(*incoming[:4])
    in_bytes = {"q": call.q, "k": call.k, "v": call.v, "grad_out": given.grad_out}
    others = {name: x.view(torch.uint8) for name, x in in_bytes.items()}
    others |= scaling._asdict() | {"grad_out_scale": incoming.grad_out_scale}
    found = backward.new(call, scaling.out_dtype)
    return tuple(backward.computed(given, call, asked(call, scaling, given.grad_lse), found, others))


def _backward_fake(*arguments):
    _, call, scaling = _split(arguments)
    return tuple(backward.new(call, scaling.out_dtype))


_ARGUMENTS = f"{schema.arguments(Incoming)}, {schema.arguments(Call)}, {schema.arguments(Scaling)}"
_RESULTS = ", ".join(f"Tensor grad_{name}" for name in Gradients._fields)
ops.register(
    "backward_quantized", f"backward_quantized({_ARGUMENTS}) -> ({_RESULTS})", _backward, _backward_fake
)
