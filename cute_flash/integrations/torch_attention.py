"""cute_flash behind torch's own attention: `scaled_dot_product_attention` and `varlen_attn`, after one call.

    from cute_flash.integrations import torch_attention
    torch_attention.activate()  # torch.nn.attention.restore_flash_attention_impl() undoes it

torch has names for implementations of FlashAttention (2.13); activating one replaces what its own operators
run for CUDA tensors, gradients too. What torch decides before that stays: which calls go to FlashAttention
(`sdpa_kernel`), and which it pads. Of CPU tensors, for which torch has no such operators, only `varlen_attn`
and the operators themselves get here, and run where a GPU is emulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import attention

from .. import backward, contents, ops, repeat
from ..request import Call, Options, Packing, draw_rng_state

NAME = "cute_flash"
DEVICES = ("CUDA", "CPU")
LEAST = "2.13"  # of torch, which has the names


class Handle:
    """What torch keeps of an active implementation."""

    def __init__(self, library: torch.library.Library) -> None:
        self.library = library

    def remove(self) -> None:
        """Give torch its own operators back."""
        self.library._destroy()


def activate() -> None:
    """Have torch's attention run on cute_flash, in place of whatever is active.

    RuntimeError where torch is older than LEAST.
    """
    register()
    attention.activate_flash_attention_impl(NAME)


def register() -> None:
    """Make "cute_flash" known to `torch.nn.attention.activate_flash_attention_impl`."""
    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(f"torch is {torch.__version__}; allowed: {LEAST} or later")
    attention.register_flash_attention_impl(NAME, register_fn=_install)


def _install() -> Handle:
    library = torch.library.Library("aten", "IMPL")
    for device in DEVICES:
        for name, run in _OPERATORS.items():
            library.impl(name, run, device)
    return Handle(library)


def _call(q, k, v, packing: Packing | None, options: Options) -> Call:
    """A checked call, whose gradients torch asks for by an operator of its own."""
    with torch.no_grad():
        return repeat.checked(q, k, v, packing, options)


def _options(
    scale: float | None, causal: bool, window: tuple[Any, Any], slopes: Any = None, splits: Any = None
) -> Options:
    left, right = (-1 if side is None else side for side in window)
    return Options(
        0.0, scale, causal, (left, right), 0.0, slopes, None, None, None, True, None, num_splits=splits,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _packing(
    cum_seq_q, cum_seq_k, max_q: int, max_k: int, seqused_k: Any = None, block_table: Any = None
) -> Packing | None:
    if cum_seq_q is None:
        if seqused_k is not None or block_table is not None:
            raise NotImplementedError("seqused_k or block_table is given without cum_seq_q; allowed: with it")
        return None
    paged = block_table is not None
    if paged and seqused_k is not None:
        cum_seq_k = None
    return Packing(cum_seq_q, cum_seq_k, max_q, max_k, None, seqused_k, paged, None, None, block_table)


def _forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    block_table=None, out=None, num_splits=None,
):  # fmt: skip
    """aten::_flash_attention_forward: (batch, rows, heads, dim), or packed (total, heads, dim)."""
    if return_debug_mask:
        raise NotImplementedError("return_debug_mask is True; allowed: False")
    q, k, v = map(contents.as_kernels_read, (query, key, value))
    options = _options(scale, is_causal, (window_size_left, window_size_right), alibi_slopes, num_splits)
    packing = _packing(cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, block_table)
    call = _call(q, k, v, packing, options)
    if dropout_p > 0.0:
        call = call._replace(dropout_p=dropout_p, rng_state=draw_rng_state(q.device))
    found, lse, _ = ops.answer(call, out)
    state = q.new_zeros(2, dtype=torch.int64) if call.rng_state is None else call.rng_state
    return found, lse, state.view(torch.uint64), q.new_zeros((), dtype=torch.uint64), q.new_empty(0)


def _forward_in_place(out, *arguments, **options):
    """aten::_flash_attention_forward_no_dropout_inplace: the log-sum-exp; the result is in `out`."""
    return _forward(*arguments, **options, out=out)[1]


def _backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """aten::_flash_attention_backward: gradients of query, key and value."""
    q, k, v = map(contents.as_kernels_read, (query, key, value))
    options = _options(scale, is_causal, (window_size_left, window_size_right))
    call = _call(q, k, v, _packing(cum_seq_q, cum_seq_k, max_q, max_k), options)
    call = call._replace(deterministic=options.deterministic)
    if dropout_p > 0.0:
        call = call._replace(dropout_p=dropout_p, rng_state=rng_state.view(torch.int64))
    given = backward.Given(grad_out, None, contents.as_kernels_read(out), logsumexp)
    return tuple(backward.gradients(given, call)[:3])


def _sdpa(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    """aten::_scaled_dot_product_flash_attention: (batch, heads, rows, dim), out with query's strides."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = torch.empty_like(query)
    told = (None, None, q.shape[1], k.shape[1], dropout_p, is_causal, return_debug_mask)
    _, lse, *states = _forward(q, k, v, *told, scale=scale, out=out.transpose(1, 2))
    return out, lse, None, None, q.shape[1], k.shape[1], *states


def _sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    """aten::_scaled_dot_product_flash_attention_backward."""
    tensors = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    told = (None, None, max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset)
    return tuple(x.transpose(1, 2) for x in _backward(*tensors, logsumexp, *told, scale=scale))


_OPERATORS = {
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_in_place,
    "_flash_attention_backward": _backward,
    "_scaled_dot_product_flash_attention": _sdpa,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}
