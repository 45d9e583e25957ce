"""Appending to a KV cache: the operator `append`, which writes new keys and values into the caches, in place.

An operator of its own beside attention's, so that torch.compile and CUDA graphs see what it writes. Lengths
stay on the device: where the new keys end, for which attention asks, is written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import contents, kv_contents, launch, ops, schema
from .arch.append import AppendProblem
from .arch.problem import Sizes
from .dispatch import beside, place_of
from .kv_cache import Append
from .kv_contents import Reach


class Appended(NamedTuple):
    """seqlens: int32 (batch,), where the new keys end. q: rotated; None without a rotation."""

    seqlens: torch.Tensor
    q: torch.Tensor | None


def answer(call: Append, found: Appended) -> launch.Bound | None:
    """Write; what was launched for it, None where nothing was."""
    sizes = sizes_of(call)
    kv_contents.check_append(call)
    if not (sizes.batch and sizes.seqlen_q * sizes.heads_q + sizes.seqlen_k * sizes.heads_kv):
        found.seqlens.copy_(call.cache_seqlens)
        return None
    place = place_of(call.k_new.device)
    bound = launch.bind(beside(problem_of(call), place.device, sizes), place, {})
    _launch(bound, call, found)
    return bound


def again(call: Append, found: Appended, bound: launch.Bound, reached: Sequence[Reach]) -> None:
    """The same for a call like one that was right, whose tensors `reached` so far."""
    if kv_contents.needs_a_closer_look(call, reached):
        kv_contents.check_append(call)
    elif contents.can_be_read(call.k_new.device):
        kv_contents.check_append_numbers(call)
    _launch(bound, call, found)


def new(call: Append) -> Appended:
    """Where results are written."""
    q = call.q
    return Appended(torch.empty_like(call.cache_seqlens), None if q is None else q.new_empty(q.shape))


def problem_of(call: Append) -> AppendProblem:
    """What is compiled."""
    rotary = call.rotary_cos is not None
    return AppendProblem(
        dtype=str(call.k_new.dtype).removeprefix("torch."),
        head_dim=int(call.k_new.shape[-1]),
        head_dim_v=int(call.v_new.shape[-1]),
        varlen=rotary and call.cu_seqlens_q is not None,
        paged=call.block_table is not None,
        batch_idx=call.cache_batch_idx is not None,
        rotary_dim=2 * int(call.rotary_cos.shape[-1]) if rotary else 0,
        interleaved=rotary and call.rotary_interleaved,
        rotary_seqlens=call.rotary_seqlens is not None,
    )


def sizes_of(call: Append) -> Sizes:
    """How large: seqlen_k is that of the new keys."""
    batch, new, heads_kv, _ = call.k_new.shape
    if call.q is None:
        return Sizes(batch, 1, heads_kv, 0, new)
    return Sizes(batch, call.q.shape[-2], heads_kv, call.max_seqlen_q, new)


def _launch(bound: launch.Bound, call: Append, found: Appended) -> None:
    values = call._asdict()
    values["seqlens"], values["q_rotated"] = found
    launch.run(bound, values)
    ops.note_written(call.k_cache)
    ops.note_written(call.v_cache)


def _append(*arguments):
    call = Append(*arguments)
    found = new(call)
    answer(call, found)
    return _results(call, found)


def _append_fake(*arguments):
    call = Append(*arguments)
    return _results(call, new(call))


def _results(call: Append, found: Appended) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator has a tensor for every result."""
    return found.seqlens, call.k_new.new_empty(0) if found.q is None else found.q


_SCHEMA = f"append({schema.arguments(Append)}) -> (Tensor seqlens, Tensor q_rotated)"
ops.register("append", _SCHEMA, _append, _append_fake)
