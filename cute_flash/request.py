"""From the user's arguments to one checked `Call`: the only file that rejects user input.

`dense` and `varlen` check what shapes, dtypes and devices tell, also while torch.compile traces;
`check_tensors` what only real tensors tell: alignment, and the numbers inside cu_seqlens. Every
rejection names the argument, what was given and what is allowed: TypeError for a wrong type or dtype,
ValueError for a wrong size or number, NotImplementedError for what no kernel does.
"""

from __future__ import annotations

import numbers
import os
from typing import Any, NamedTuple

import torch

from . import rules
from .arch.rule import Rule
from .block_mask import BlockMask

DTYPES = (torch.float16, torch.bfloat16)
SINK_DTYPES = (torch.float32, *DTYPES)
TABLE_DTYPES = (torch.int32, torch.int64, torch.uint8, torch.int8, torch.float32, *DTYPES)
ALIGNMENT = 16  # bytes: the widest load a kernel does
LARGEST_GRID = 65535  # blocks along y and z of a launch
DROPOUT_STEPS = 65536  # dropout compares 16 random bits
MOST_SPLITS = 128  # parts of the keys
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)


class Options(NamedTuple):
    """What dense and packed calls have in common besides q, k and v, in the words of the interface."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int | None, int | None]
    softcap: float
    alibi_slopes: torch.Tensor | None
    mask: Any
    score: Any
    learnable_sink: torch.Tensor | None
    lse: bool
    out: torch.Tensor | None
    block_mask: BlockMask | None = None
    num_splits: int | None = None
    deterministic: bool = False


class Packing(NamedTuple):
    """What only packed calls have."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None


class Call(NamedTuple):
    """A checked call: the arguments of the operators, in their order, without `out`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    sink: torch.Tensor | None
    rng_state: torch.Tensor | None
    softmax_scale: float
    dropout_p: float
    rules: str
    rule_tensors: list[torch.Tensor]
    rule_ints: list[int]
    rule_floats: list[float]
    block_counts: torch.Tensor | None
    block_indices: torch.Tensor | None
    block_size: list[int]
    lse: bool
    num_splits: int


class _Sizes(NamedTuple):
    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Call:
    """Check a call on dense batches."""
    _check_qkv(q, k, v, ("batch", "seqlen", "heads", "head_dim"))
    batch, seqlen_q, heads, _ = q.shape
    batch_k, seqlen_k, _, _ = k.shape
    if batch_k != batch:
        raise ValueError(f"k has batch {batch_k}, q has {batch}: they must be equal")
    packing = (None, None, None, None, seqlen_q, seqlen_k)
    return _call(q, k, v, packing, options, _Sizes(batch, heads, seqlen_q, seqlen_k))


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: Options) -> Call:
    """Check a call on packed sequences."""
    _check_qkv(q, k, v, ("total", "heads", "head_dim"))
    cu_q, cu_k, longest_q, longest_k, used_q, used_k = packing
    for name, tensor in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _check_tensor(name, tensor, q, (torch.int32,), 1)
        if tensor.shape[0] < 1:
            raise ValueError(f"{name} is empty: it must hold batch + 1 numbers, the first 0")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_q.shape[0]} numbers and cu_seqlens_k {cu_k.shape[0]}: "
            "both must hold batch + 1"
        )
    batch = cu_q.shape[0] - 1
    for name, tensor in (("seqused_q", used_q), ("seqused_k", used_k)):
        if tensor is not None:
            _check_tensor(name, tensor, q, (torch.int32,), 1)
            if tensor.shape[0] != batch:
                raise ValueError(f"{name} has {tensor.shape[0]} numbers, cu_seqlens has {batch} sequences")
    for name, longest in (("max_seqlen_q", longest_q), ("max_seqlen_k", longest_k)):
        if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
            raise TypeError(f"{name} is {longest!r} ({type(longest).__name__}); allowed: an int")
        if longest < 0:
            raise ValueError(f"{name} is {longest}; allowed: 0 or more")
    sizes = _Sizes(batch, q.shape[1], longest_q, longest_k)
    return _call(q, k, v, (cu_q, cu_k, used_q, used_k, longest_q, longest_k), options, sizes)


def draw_rng_state(device: torch.device) -> torch.Tensor:
    """Philox seed and offset, int64 (2,), for one call with dropout, from torch's default generator.

    A call draws its state exactly so: after the same `torch.manual_seed`, the same state and mask.
    """
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """Of the 65536 values of 16 random bits, how many mean keep."""
    return round((1.0 - dropout_p) * DROPOUT_STEPS)


def check_tensors(call: Call, out: torch.Tensor) -> None:
    """What can be checked on real tensors only; called before a launch.

    Numbers inside CUDA tensors cannot be seen without waiting for the GPU: they are checked where
    CUTE_FLASH_CHECK=1 is set and no graph is being captured.
    """
    _check_addresses(call, out)
    if call.q.device.type == "cuda" and (call.cu_seqlens_q is not None or call.block_counts is not None):
        asked = os.environ.get("CUTE_FLASH_CHECK", "") not in ("", "0")
        if not asked or torch.cuda.is_current_stream_capturing():
            return
    if call.cu_seqlens_q is not None:
        _check_lengths(call)
    if call.block_counts is not None:
        _check_lists(call)


def _check_addresses(call: Call, out: torch.Tensor) -> None:
    _check_alignment("q", call.q)
    _check_alignment("k", call.k)
    _check_alignment("v", call.v)
    _check_alignment("out", out)


def _check_lengths(call: Call) -> None:
    """The numbers in cu_seqlens and seqused."""
    for side in ("q", "k"):
        cu_seqlens, used = getattr(call, f"cu_seqlens_{side}"), getattr(call, f"seqused_{side}")
        lengths = _check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, getattr(call, side).shape[0])
        longest = getattr(call, f"max_seqlen_{side}")
        if used is not None:
            _check_used(f"seqused_{side}", used, lengths)
            lengths = used.tolist()
        if max(lengths, default=0) > longest:
            raise ValueError(f"max_seqlen_{side} is {longest}, the longest sequence has {max(lengths)}")


def _check_lists(call: Call) -> None:
    """The numbers in the lists of a block mask."""
    counts, indices = call.block_counts, call.block_indices
    seqlen_k, block_k = call.k.shape[1], call.block_size[1]
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


def _call(q, k, v, packing: tuple, options: Options, sizes: _Sizes) -> Call:
    softcap = _number("softcap", options.softcap, 0.0)
    dropout_p = _number("dropout_p", options.dropout_p, 0.0)
    if not (dropout_p < 1.0 and keep_threshold(dropout_p) > 0):
        raise ValueError(f"dropout_p is {dropout_p}; allowed: 0 <= dropout_p <= 1 - 1/{DROPOUT_STEPS}")
    scale = options.softmax_scale
    scale = q.shape[-1] ** -0.5 if scale is None else _number("softmax_scale", scale, None)
    if max(sizes.batch, sizes.heads) > LARGEST_GRID:
        raise NotImplementedError(
            f"q has {sizes.batch} sequences and {sizes.heads} heads; allowed: {LARGEST_GRID} of each"
        )
    if options.alibi_slopes is not None:
        _check_tensor("alibi_slopes", options.alibi_slopes, q, (torch.float32,), None)
    masks, blocks = _masks(options, q, sizes)
    scores = rules.score_of(softcap, options.alibi_slopes, options.score)
    encoded = rules.encode(masks, scores)
    if encoded.tensors:
        for rule in (*masks, *scores):
            _check_tables(rule, q, sizes)
    _check_out(options.out, q, v)
    _check_no_grad(q, k, v, options, encoded.tensors)
    sink = _sink(options.learnable_sink, q, sizes.heads)
    rng_state = draw_rng_state(q.device) if dropout_p > 0.0 else None
    splits = _num_splits(options.num_splits, options.deterministic)
    return Call(
        q, k, v, *packing, sink, rng_state, scale, dropout_p, *encoded, *blocks, options.lse, splits
    )


def _masks(options: Options, q: torch.Tensor, sizes: _Sizes) -> tuple[list, tuple]:
    """Masks that must all show a pair, and counts, indices and block size of a block mask."""
    window, block_mask = _window(options.window_size), options.block_mask
    if block_mask is None:
        return rules.mask_of(bool(options.causal), window, options.mask), (None, None, [])
    _check_block_mask(block_mask, q, sizes)
    present = (options.causal, window != (None, None), options.mask is not None)
    named = zip(("causal", "window_size", "mask"), present, strict=True)
    if beside := " and ".join(name for name, given in named if given):
        raise ValueError(
            f"{beside} is given beside block_mask, which does not evaluate it in full blocks; allowed: a "
            "block mask made of all rules together, create_block_mask(Causal() & ..., ...)"
        )
    masks = rules.mask_of(False, (None, None), block_mask.mask)
    return masks, (block_mask.counts, block_mask.indices, list(block_mask.block_size))


def _check_block_mask(block_mask: Any, q: torch.Tensor, sizes: _Sizes) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask is {type(block_mask).__name__}; allowed: a BlockMask, from create_block_mask or "
            "BlockMask.from_blocks"
        )
    for name in ("counts", "indices"):
        _check_tensor(f"block_mask.{name}", getattr(block_mask, name), q, (torch.int32,), 4)
    if tuple(block_mask.seqlens) != (sizes.seqlen_q, sizes.seqlen_k):
        raise ValueError(
            f"block_mask is for seqlen_q and seqlen_k {tuple(block_mask.seqlens)}, q and k have "
            f"{(sizes.seqlen_q, sizes.seqlen_k)}: they must be equal"
        )
    q_blocks, (batch, heads, *rest) = -(-sizes.seqlen_q // block_mask.block_size[0]), block_mask.counts.shape
    if batch not in (1, sizes.batch) or heads not in (1, sizes.heads) or rest != [q_blocks, 2]:
        raise ValueError(
            f"block_mask.counts has shape {_shape(block_mask.counts)}; allowed: (1 or {sizes.batch}, "
            f"1 or {sizes.heads}, {q_blocks}, 2), for batch and heads of q"
        )
    if block_mask.indices.shape[:3] != block_mask.counts.shape[:3] or block_mask.indices.shape[3] < 1:
        raise ValueError(
            f"block_mask.indices has shape {_shape(block_mask.indices)}; allowed: "
            f"({batch}, {heads}, {q_blocks}, 1 or more)"
        )


def _check_qkv(q: Any, k: Any, v: Any, dims: tuple[str, ...]) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; allowed: torch.Tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {_listed(DTYPES)}")
        if tensor.ndim != len(dims):
            raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: ({', '.join(dims)})")
    for name, tensor in (("k", k), ("v", v)):
        _check_beside(name, tensor, q)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, q has {q.dtype}: they must be equal")
    if q.device.type not in ("cuda", "cpu", "meta"):
        raise NotImplementedError(f"q is on {q.device}; allowed: CUDA devices, or the CPU with `emulated`")
    (*_, heads, head_dim), (*rows, heads_kv, head_dim_k), (*rows_v, heads_v, _) = q.shape, k.shape, v.shape
    if head_dim_k != head_dim:
        raise ValueError(f"k has head_dim {head_dim_k}, q has {head_dim}: they must be equal")
    if rows_v != rows or heads_v != heads_kv:
        raise ValueError(
            f"v has shape {_shape(v)}, k has {_shape(k)}: they must be equal but for the last dimension"
        )
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"q has {heads} heads, k has {heads_kv}: q's must be a multiple of k's")


def _check_tensor(name: str, tensor: Any, q: torch.Tensor, dtypes: tuple, rank: int | None) -> None:
    """A small tensor beside q: contiguous, of one of `dtypes`, of `rank` dimensions where given."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; allowed: torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {_listed(dtypes)}")
    _check_beside(name, tensor, q)
    if rank is not None and tensor.ndim != rank:
        raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: {rank} dimension(s)")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tuple(tensor.stride())}; allowed: a contiguous tensor")


def _check_beside(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}: they must be on one device")


def _check_tables(rule: Rule | str, q: torch.Tensor, sizes: _Sizes) -> None:
    """The tensors inside a rule: their dtypes, devices, and the shapes that the rule declares."""
    for field in () if isinstance(rule, str) else type(rule).__match_args__:
        value = getattr(rule, field)
        name = f"{type(rule).__name__}.{field}"
        if isinstance(value, torch.Tensor):
            _check_tensor(name, value, q, TABLE_DTYPES, None)
            allowed = type(rule).tables.get(field)
            if allowed and not any(_fits(value, dims, sizes) for dims in allowed):
                words = " or ".join(", ".join(f"{d} {getattr(sizes, d)}" for d in dims) for dims in allowed)
                raise ValueError(f"{name} has shape {_shape(value)}; allowed: {words}")
        for nested in value if isinstance(value, tuple) else (value,):
            if isinstance(nested, Rule):
                _check_tables(nested, q, sizes)


def _fits(table: torch.Tensor, dims: tuple[str, ...], sizes: _Sizes) -> bool:
    """A table may be longer than the sequences, as one made for the longest of several calls is."""
    if table.ndim != len(dims):
        return False
    for dim, found in zip(dims, table.shape, strict=True):
        wanted = getattr(sizes, dim)
        if found < wanted or (found != wanted and not dim.startswith("seqlen")):
            return False
    return True


def _sink(sink: Any, q: torch.Tensor, heads: int) -> torch.Tensor | None:
    """The sink's scores in float32, one per query head."""
    if sink is None:
        return None
    _check_tensor("learnable_sink", sink, q, SINK_DTYPES, 1)
    if sink.shape[0] != heads:
        raise ValueError(f"learnable_sink has {sink.shape[0]} numbers; allowed: {heads}, one per head of q")
    return sink.float()


def _check_out(out: Any, q: torch.Tensor, v: torch.Tensor) -> None:
    if out is None:
        return
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is {type(out).__name__}; allowed: torch.Tensor")
    if out.dtype != q.dtype:
        raise TypeError(f"out has dtype {out.dtype}, q has {q.dtype}: they must be equal")
    _check_beside("out", out, q)
    wanted = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != wanted:
        raise ValueError(f"out has shape {_shape(out)}; allowed: {wanted}")


def _check_no_grad(q, k, v, options: Options, tables: list[torch.Tensor]) -> None:
    if not torch.is_grad_enabled():
        return
    given = (q, k, v, options.learnable_sink, options.out, *tables)
    for index, tensor in enumerate(given):
        if tensor is not None and tensor.requires_grad:
            named = ("q", "k", "v", "learnable_sink", "out")
            name = named[index] if index < len(named) else "a rule's tensor"
            raise NotImplementedError(
                f"{name} requires a gradient, and there is no backward yet: call within torch.no_grad(), "
                "or detach it"
            )


def _check_alignment(name: str, tensor: torch.Tensor) -> None:
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


def _number(name: str, value: Any, low: float | None) -> float:
    """A finite float from `low` on; above 0 where `low` is None."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); allowed: a number")
    inside = value > 0 if low is None else value >= low
    if not (inside and value - value == 0):
        bound = "above 0" if low is None else f"from {low} on"
        raise ValueError(f"{name} is {value}; allowed: a finite number {bound}")
    return float(value)


def _num_splits(given: Any, deterministic: bool) -> int:
    """In how many parts to take the keys; 0 leaves it open.

    Deterministic calls take them whole: as many parts as fill the GPU depend on all that is in the call, and
    where parts begin under a mask, on the other queries of a tile.
    """
    if given is None:
        given = 0
    if isinstance(given, bool) or not isinstance(given, (int, torch.SymInt)):
        raise TypeError(f"num_splits is {given!r} ({type(given).__name__}); allowed: an int, or None")
    if not 0 <= given <= MOST_SPLITS:
        raise ValueError(f"num_splits is {given}; allowed: 1 to {MOST_SPLITS}, or 0 or None to leave it open")
    return 1 if deterministic and given == 0 else given


def _window(window: Any) -> tuple[int | None, int | None]:
    """(left, right) with None for unbounded."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window_size is {window!r}; allowed: (left, right), -1 or None for unbounded")
    for bound in window:
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, torch.SymInt))):
            raise TypeError(f"window_size is {window!r}; allowed: ints, or None for unbounded")
        if bound is not None and bound < -1:
            raise ValueError(f"window_size is {window!r}; allowed: 0 or more, -1 or None for unbounded")
    left, right = window
    return None if left == -1 else left, None if right == -1 else right


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))
