"""What only real tensors tell, checked before a launch: addresses, and the numbers inside tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from . import cached, overlap
from .arch.precision import FLOAT8_E8M0, Quantization
from .request import Call, Packing

ALIGNMENT = 16  # bytes: the widest load a kernel does
_NAMES = {  # of the interface, where an operator's differ
    "sink": "learnable_sink",
    "sequence_splits": "scheduler_metadata.splits",
    "sequence_order": "scheduler_metadata.order",
    "block_counts": "block_mask.counts",
    "block_indices": "block_mask.indices",
}


def check(call: Call, out: torch.Tensor) -> None:
    """Alignment, and the numbers inside cu_seqlens, seqused and the lists of a block mask."""
    _check_addresses(call, out)
    named = call.cu_seqlens_q is not None or call.cached or call.block_counts is not None
    if named and can_be_read(call.q.device):
        check_lengths(call, call.q, call.k)
        check_lists(call.block_counts, call.block_indices, call.k.shape[1], call.block_size)


def check_scales(scales: Mapping[str, torch.Tensor]) -> None:
    """What tensors of 8 bits are multiplied by, by argument: a maximum of scores stays one."""
    for name, scale in scales.items():
        if can_be_read(scale.device) and (wrong := scale[~(scale.isfinite() & (scale > 0))]).numel():
            raise ValueError(f"{name} has {wrong[0].item()}; allowed: finite numbers above 0")


def check_factors(name: str, factors: torch.Tensor | None, form: Quantization) -> None:
    """Bytes that tensor cores take for scales: none of them is NaN, or in ue4m3 negative."""
    if factors is None or not can_be_read(factors.device):
        return
    unsigned = form.scale == FLOAT8_E8M0
    wrong = factors[factors == 0xFF if unsigned else factors >= 0x7F]
    if wrong.numel():
        allowed = "0 to 254, powers of two" if unsigned else "0 to 126, e4m3 from 0 on"
        raise ValueError(f"{name} has the byte {wrong[0].item()}; allowed: {allowed}")


def can_be_read(device: torch.device) -> bool:
    """Whether to look at the numbers inside tensors.

    On a GPU they cannot be seen without waiting for it: there, where CUTE_FLASH_CHECK=1 is set and no graph
    is being captured.
    """
    if device.type != "cuda":
        return True
    asked = os.environ.get("CUTE_FLASH_CHECK", "") not in ("", "0")
    return asked and not torch.cuda.is_current_stream_capturing()


def as_kernels_read(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where a kernel can read it in place, otherwise a copy.

    For gradients: autograd makes them, and may make them of any strides.
    """
    size = tensor.element_size()
    aligned = tensor.data_ptr() % ALIGNMENT == 0 and tensor.stride(-1) == 1
    steps = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    if aligned and all(stride * size % ALIGNMENT == 0 for length, stride in steps if length > 1):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def check_out(call: Call, out: torch.Tensor) -> None:
    """A place for the result is not an input's too: some of it is written while the rest is computed."""
    if overlap.overlaps_itself(out):
        raise ValueError(
            f"out has shape {tuple(out.shape)} and strides {out.stride()}: several elements in one place; "
            "allowed: memory where each has its own"
        )
    for name, tensor in _tensors(call):
        if overlap.overlap(out, tensor):
            raise ValueError(f"out overlaps {name} in memory; allowed: memory that no input uses")


def _tensors(call: Call) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything that a kernel reads."""
    for name, value in call._asdict().items():
        if name == "rule_tensors":
            yield from (("a rule's tensor", tensor) for tensor in value)
        elif isinstance(value, torch.Tensor):
            yield _NAMES.get(name, name), value


def _check_addresses(call: Call, out: torch.Tensor) -> None:
    check_alignment("q", call.q)
    check_alignment("k", call.k)
    check_alignment("v", call.v)
    check_alignment("out", out)


def check_lengths(call: Call | Packing, q: torch.Tensor, k: torch.Tensor) -> None:
    """The numbers in cu_seqlens and seqused, and those that find keys in a cache, where there are any."""
    if call.cu_seqlens_q is not None:
        check_sequences(call, "q", q.shape[0])
    if call.cached:
        cached.check_places(call, q, k, _lengths_in_cache(call, q, k))
    elif call.cu_seqlens_k is not None:
        check_sequences(call, "k", k.shape[0])


def check_sequences(call: Call | Packing, side: str, total: int) -> list[int]:
    """Rows in use of packed sequences of q, or of k, checked."""
    cu_seqlens, used = getattr(call, f"cu_seqlens_{side}"), getattr(call, f"seqused_{side}")
    lengths = _check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, total)
    longest = getattr(call, f"max_seqlen_{side}")
    if used is not None:
        _check_used(f"seqused_{side}", used, lengths)
        lengths = used.tolist()
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{side} is {longest}, the longest sequence has {max(lengths)}")
    return lengths


def _lengths_in_cache(call: Call | Packing, q: torch.Tensor, k: torch.Tensor) -> list[int]:
    """Keys of each sequence in a cache: used lengths, or by cu_seqlens_k, or all that it has room for."""
    most, batch, used = cached.room(k, call.block_table), cached.batch_of(call, q), call.seqused_k
    if used is not None:
        _check_used("seqused_k", used, [most] * batch)
        return used.tolist()
    if call.cu_seqlens_k is None:
        return [most] * batch
    return _check_cu_seqlens("cu_seqlens_k", call.cu_seqlens_k, most * batch)


def check_lists(counts: Any, indices: Any, seqlen_k: int, block_size: Sequence[int]) -> None:
    """The numbers in the lists of a block mask, where there is one."""
    if counts is None:
        return
    block_k = block_size[1]
    k_blocks, most = -(-seqlen_k // block_k), indices.shape[-1]
    total = counts.sum(-1, keepdim=True)
    if counts.numel() and not (counts.min() >= 0 and total.max() <= most):
        found = f"numbers from {counts.min()} and sums up to {total.max()}"
        raise ValueError(f"block_mask.counts has {found}; allowed: from 0, sums up to {most}")
    place = torch.arange(most, device=indices.device)
    listed = indices[place < total]
    if listed.numel() and not (listed.min() >= 0 and listed.max() < k_blocks):
        found = f"{listed.min()} to {listed.max()}"
        raise ValueError(f"block_mask.indices has numbers from {found}; allowed: 0 to {k_blocks - 1}")
    # The kernels look for keys that do not exist in the first block only, where they evaluate the mask.
    late = (place < total) & ((place > 0) | (counts[..., :1] == 0))
    if seqlen_k % block_k and (indices == k_blocks - 1)[late].any():
        raise ValueError(
            f"block_mask.indices has {k_blocks - 1}, which reaches beyond the {seqlen_k} keys, as a full "
            "block or not at the beginning of its list"
        )


def check_alignment(name: str, tensor: torch.Tensor) -> None:
    size, strides, address = tensor.element_size(), tensor.stride(), tensor.data_ptr()
    bits = address
    for stride in strides[:-1]:
        bits |= stride * size
    if bits % ALIGNMENT == 0 and strides[-1] == 1 or 0 in tensor.shape:
        return
    if strides[-1] != 1:
        raise ValueError(
            f"{name} has strides {tuple(strides)}: the last dimension must be contiguous (stride 1)"
        )
    for length, stride in zip(tensor.shape[:-1], strides[:-1], strict=True):
        if length > 1 and stride * size % ALIGNMENT:
            raise ValueError(
                f"{name} has strides {tuple(strides)}: all but the last must be multiples of {ALIGNMENT} "
                f"bytes, {ALIGNMENT // size} elements"
            )
    if address % ALIGNMENT:
        raise ValueError(
            f"{name} begins at address {address:#x}: it must be a multiple of {ALIGNMENT} bytes; "
            f"a slice that starts at a multiple of {ALIGNMENT // size} elements is"
        )


def _check_cu_seqlens(name: str, tensor: torch.Tensor, total: int) -> list[int]:
    """The sequences' lengths."""
    starts = tensor.tolist()
    if starts[0] != 0:
        raise ValueError(f"{name} starts with {starts[0]}; it must start with 0")
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    if min(lengths, default=0) < 0:
        at = next(i for i, length in enumerate(lengths) if length < 0)
        raise ValueError(f"{name} decreases from {starts[at]} to {starts[at + 1]}; it must not")
    if starts[-1] > total:
        raise ValueError(f"{name} ends with {starts[-1]}, the tensor has {total} rows")
    return lengths


def _check_used(name: str, used: torch.Tensor, lengths: list[int]) -> None:
    for sequence, (count, length) in enumerate(zip(used.tolist(), lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"{name}[{sequence}] is {count}; allowed: 0 to {length}, the sequence's rows")
