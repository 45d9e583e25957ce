"""From the user's arguments to one checked `Call`.

`dense` and `varlen` check what shapes, dtypes and devices tell, also while torch.compile traces; scalars.py
checks numbers, cached.py calls on a cache, contents.py what only real tensors tell. No other file rejects
user input. Every rejection names the argument, what was given and what is allowed: TypeError for a wrong type
or dtype, ValueError for a wrong size or number, NotImplementedError for what no kernel does.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch.autograd import forward_ad

from . import rules, scalars
from .arch.rule import Rule
from .block_mask import BlockMask

DTYPES = (torch.float16, torch.bfloat16)
SINK_DTYPES = (torch.float32, *DTYPES)
TABLE_DTYPES = (torch.int32, torch.int64, torch.uint8, torch.int8, torch.float32, *DTYPES)
DROPOUT_STEPS = 65536  # dropout compares 16 random bits


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
    joint: torch.Tensor | None = None  # what k and v, or q, k and v, are parts of


class Packing(NamedTuple):
    """Where sequences lie that are not dense rows of q, k and v.

    Packed ones: cu_seqlens of both. cached: k and v are a cache, (cache_rows, seqlen, heads, dim) or, with a
    block_table, (num_pages, page_size, heads, dim); q is packed where there is a cu_seqlens_q, else dense.
    sequence_splits, sequence_order, scheduled_for: of a `SchedulerMetadata`.
    """

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    cached: bool = False
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    sequence_splits: torch.Tensor | None = None
    sequence_order: torch.Tensor | None = None
    scheduled_for: str = ""


class Call(NamedTuple):
    """A checked call: the arguments of the operators, in their order, without `out`.

    The operators' schema is made from the annotations (schema.py). A Scalar may be one of torch.compile's
    symbols, so that another number does not compile again; a float is a constant there.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    joint: torch.Tensor | None  # what has the gradient of its parts (`parts_of`), where one is required
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    cached: bool  # k and v are a cache: `Packing`
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    sequence_splits: torch.Tensor | None
    sequence_order: torch.Tensor | None
    scheduled_for: str
    sink: torch.Tensor | None
    rng_state: torch.Tensor | None
    softmax_scale: Annotated[float, "Scalar"]
    dropout_p: float
    rules: str
    rule_tensors: list[torch.Tensor]
    rule_ints: list[int]
    rule_floats: Annotated[list[float], "Scalar[]"]
    block_counts: torch.Tensor | None
    block_indices: torch.Tensor | None
    key_block_counts: torch.Tensor | None  # the same lists by blocks of keys, where a gradient is required
    key_block_indices: torch.Tensor | None
    key_block_turns: torch.Tensor | None  # and in which order, where gradients are deterministic
    block_size: Annotated[list[int], "int[]"]
    lse: bool
    num_splits: int
    deterministic: bool  # of gradients; the forward pass always is


def parts_of(joint: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """k and v, or q, k and v, by name: the parts of one tensor (..., parts, heads, head_dim), as views."""
    parts = () if joint is None else joint.unbind(-3)
    return dict(zip("qkv"[3 - len(parts) :], parts, strict=True))


class Sizes(NamedTuple):
    """What tables of rules are held to."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_k: int


def joint(name: str, tensor: Any, rows: tuple[str, ...]) -> torch.Tensor:
    """Check a tensor of as many parts as its name has letters, its first dimensions being `rows`."""
    (tensor,) = as_autocast_has_it(tensor)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; allowed: torch.Tensor")
    if tensor.ndim != len(rows) + 3 or tensor.shape[-3] != len(name):
        dims = ", ".join((*rows, str(len(name)), "heads", "head_dim"))
        raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: ({dims})")
    return tensor


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options) -> Call:
    """Check a call on dense batches."""
    return dense_of(*as_autocast_has_it(q, k, v), options, DTYPES)


def dense_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, dtypes: tuple) -> Call:
    """The same for q, k and v of one of `dtypes`."""
    dims = ("batch", "seqlen", "heads", "head_dim")
    check_qkv(q, k, v, dims, dims, dtypes)
    batch, seqlen_q, heads, _ = q.shape
    batch_k, seqlen_k, _, _ = k.shape
    if batch_k != batch:
        raise ValueError(f"k has batch {batch_k}, q has {batch}: they must be equal")
    for name, rows in (("q", seqlen_q), ("k", seqlen_k)):
        scalars.length(f"{name}'s seqlen", rows)
    packing = Packing(
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k,
        seqused_q=None, seqused_k=None,
    )  # fmt: skip
    return checked(q, k, v, packing, options, Sizes(batch, heads, seqlen_q, seqlen_k))


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: Options) -> Call:
    """Check a call on packed sequences."""
    return varlen_of(*as_autocast_has_it(q, k, v), packing, options, DTYPES)


def varlen_of(q, k, v, packing: Packing, options: Options, dtypes: tuple[torch.dtype, ...]) -> Call:
    """The same for q, k and v of one of `dtypes`."""
    dims = ("total", "heads", "head_dim")
    check_qkv(q, k, v, dims, dims, dtypes)
    cu_q, cu_k, _, _, used_q, used_k = packing[:6]
    for name, tensor in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        check_starts(name, tensor, q)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_q.shape[0]} numbers and cu_seqlens_k {cu_k.shape[0]}: "
            "both must hold batch + 1"
        )
    batch = cu_q.shape[0] - 1
    for name, tensor in (("seqused_q", used_q), ("seqused_k", used_k)):
        if tensor is not None:
            check_tensor(name, tensor, q, (torch.int32,), 1)
            if tensor.shape[0] != batch:
                raise ValueError(f"{name} has {tensor.shape[0]} numbers, cu_seqlens has {batch} sequences")
    packing = with_longest(packing)
    sizes = Sizes(batch, q.shape[1], packing.max_seqlen_q, packing.max_seqlen_k)
    return checked(q, k, v, packing, options, sizes)


def with_longest(packing: Packing) -> Packing:
    """Checked lengths of the longest sequences."""
    return packing._replace(
        max_seqlen_q=scalars.length("max_seqlen_q", packing.max_seqlen_q),
        max_seqlen_k=scalars.length("max_seqlen_k", packing.max_seqlen_k),
    )


def check_starts(name: str, starts: torch.Tensor, q: torch.Tensor) -> None:
    check_tensor(name, starts, q, (torch.int32,), 1)
    if starts.shape[0] < 1:
        raise ValueError(f"{name} is empty: it must hold batch + 1 numbers, the first 0")


def draw_rng_state(device: torch.device) -> torch.Tensor:
    """Philox seed and offset, int64 (2,), for one call with dropout, from torch's default generator.

    A call draws its state exactly so: after the same `torch.manual_seed`, the same state and mask.
    """
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """Of the 65536 values of 16 random bits, how many mean keep."""
    return round((1.0 - dropout_p) * DROPOUT_STEPS)


def checked(q, k, v, packing: Packing, options: Options, sizes: Sizes) -> Call:
    dropout_p = _dropout_p(options.dropout_p)
    scale = options.softmax_scale
    scale = q.shape[-1] ** -0.5 if scale is None else scalars.positive("softmax_scale", scale)
    if options.alibi_slopes is not None:
        check_tensor("alibi_slopes", options.alibi_slopes, q, (torch.float32,), None)
        _check_table_is_constant("alibi_slopes", options.alibi_slopes)
    # Of the longest sequences; those of packed ones are not more than all together.
    longest = q.shape[-3], sizes.seqlen_k if packing.cached else k.shape[-3]
    masks, block_mask = _masks(options, q, sizes, *longest), options.block_mask
    scores = rules.score_of(scalars.softcap(options.softcap), options.alibi_slopes, options.score)
    encoded = rules.encode(masks, scores)
    if encoded.ints or encoded.floats:
        scalars.check_values((*masks, *scores), encoded.ints, encoded.floats)
    if encoded.tensors:
        for rule in (*masks, *scores):
            _check_tables(rule, q, sizes)
    check_out(options.out, q, v, q.dtype)
    _check_derivatives(q, k, v, options)
    sink = _sink(options.learnable_sink, q, sizes.heads)
    rng_state = draw_rng_state(q.device) if dropout_p > 0.0 else None
    backward = needs_gradient(q, k, v, options.learnable_sink)
    deterministic = backward and bool(options.deterministic)
    by_keys, turns = (None, None), None
    if backward and block_mask is not None:
        by_keys = _by_keys(block_mask, "transposed")
        turns = _by_keys(block_mask, "turns") if deterministic else None
    splits = scalars.num_splits(options.num_splits, options.deterministic)
    joint = options.joint if backward else None
    if joint is not None:
        q, k, v = ({"q": q, "k": k, "v": v} | parts_of(joint.detach())).values()
    return Call(
        q=q,
        k=k,
        v=v,
        joint=joint,
        **packing._asdict(),
        sink=sink,
        rng_state=rng_state,
        softmax_scale=scale,
        dropout_p=dropout_p,
        rules=encoded.code,
        rule_tensors=encoded.tensors,
        rule_ints=encoded.ints,
        rule_floats=encoded.floats,
        block_counts=None if block_mask is None else block_mask.counts,
        block_indices=None if block_mask is None else block_mask.indices,
        key_block_counts=by_keys[0],
        key_block_indices=by_keys[1],
        key_block_turns=turns,
        block_size=[] if block_mask is None else list(block_mask.block_size),
        lse=options.lse or backward,
        num_splits=splits,
        deterministic=deterministic,
    )


def _dropout_p(given: Any) -> float:
    """A probability that leaves at least one of the 65536 values of 16 random bits."""
    if scalars.not_negative("dropout_p", given) < 1 and keep_threshold(float(given)) > 0:
        return float(given)
    raise ValueError(f"dropout_p is {given}; allowed: 0 <= dropout_p <= 1 - 1/{DROPOUT_STEPS}")


def _masks(options: Options, q: torch.Tensor, sizes: Sizes, rows_q: int, rows_k: int) -> list[Rule]:
    """Masks that must all show a pair. rows_q, rows_k: at least those of the longest sequence."""
    window, block_mask = scalars.window(options.window_size, rows_q, rows_k), options.block_mask
    if block_mask is None:
        return rules.mask_of(bool(options.causal), window, options.mask)
    _check_block_mask(block_mask, q, sizes)
    present = (options.causal, window != (None, None), options.mask is not None)
    named = zip(("causal", "window_size", "mask"), present, strict=True)
    if beside := " and ".join(name for name, given in named if given):
        raise ValueError(
            f"{beside} is given beside block_mask, which does not evaluate it in full blocks; allowed: a "
            "block mask made of all rules together, create_block_mask(Causal() & ..., ...)"
        )
    return rules.mask_of(False, (None, None), block_mask.mask)


def _check_block_mask(block_mask: Any, q: torch.Tensor, sizes: Sizes) -> None:
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask is {type(block_mask).__name__}; allowed: a BlockMask, from create_block_mask or "
            "BlockMask.from_blocks"
        )
    for name in ("counts", "indices"):
        check_tensor(f"block_mask.{name}", getattr(block_mask, name), q, (torch.int32,), 4)
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


def _by_keys(block_mask: BlockMask, name: str) -> Any:
    """What the backward pass visits, or in which order."""
    if torch.compiler.is_compiling() and name not in block_mask.__dict__:
        raise NotImplementedError(
            f"block_mask was made without `{name}`, which a backward pass needs and torch.compile cannot "
            f"make; allowed: one whose `{name}` was read before. Where gradients are enabled it is made with "
            "its `transposed`"
        )
    return getattr(block_mask, name)


def as_autocast_has_it(*tensors: Any) -> tuple:
    """q, k and v in autocast's dtype, where it is on: all but float64, as for torch's own attention."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else None
    if device not in ("cuda", "cpu") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    )


def check_qkv(
    q: Any, k: Any, v: Any, dims_q: tuple[str, ...], dims_k: tuple[str, ...], dtypes: tuple = DTYPES,
    *, dtypes_kv: tuple | None = None,
) -> None:
    """dtypes: of q and with it of k and v, unless these have others, `dtypes_kv`, of which both have one."""
    kinds = (dtypes, *(dtypes_kv or dtypes,) * 2)
    for name, tensor, dims, allowed in zip("qkv", (q, k, v), (dims_q, dims_k, dims_k), kinds, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; allowed: torch.Tensor")
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed: {_listed(allowed)}")
        if tensor.ndim != len(dims):
            raise ValueError(f"{name} has shape {_shape(tensor)}; allowed: ({', '.join(dims)})")
    for name, tensor in (("k", k), ("v", v)):
        _check_beside(name, tensor, q)
        other, like = ("q", q) if dtypes_kv is None else ("k", k)
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, {other} has {like.dtype}: they must be equal")
    if q.device.type not in ("cuda", "cpu", "meta"):
        raise NotImplementedError(f"q is on {q.device}; allowed: CUDA devices, or the CPU with `emulated`")
    (*_, heads, head_dim), (*rows, heads_kv, head_dim_k), (*rows_v, heads_v, _) = q.shape, k.shape, v.shape
    for name, dim in (("q", head_dim), ("v", v.shape[-1])):
        if dim == 0:
            raise ValueError(f"{name} has head_dim 0; allowed: 8 to 576 by 8")
    if head_dim_k != head_dim:
        raise ValueError(f"k has head_dim {head_dim_k}, q has {head_dim}: they must be equal")
    if rows_v != rows or heads_v != heads_kv:
        raise ValueError(
            f"v has shape {_shape(v)}, k has {_shape(k)}: they must be equal but for the last dimension"
        )
    if heads_kv == 0 or heads % heads_kv != 0:
        raise ValueError(f"q has {heads} heads, k has {heads_kv}: q's must be a multiple of k's")


def check_tensor(name: str, tensor: Any, q: torch.Tensor, dtypes: tuple, rank: int | None) -> None:
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


def _check_tables(rule: Rule, q: torch.Tensor, sizes: Sizes) -> None:
    """The tensors inside a rule: their dtypes, devices, and the shapes that the rule declares."""
    for field in type(rule).__match_args__:
        value = getattr(rule, field)
        name = f"{type(rule).__name__}.{field}"
        if isinstance(value, torch.Tensor):
            check_tensor(name, value, q, TABLE_DTYPES, None)
            _check_table_is_constant(name, value)
            allowed = type(rule).tables.get(field)
            if allowed and not any(_fits(value, dims, sizes) for dims in allowed):
                words = " or ".join(", ".join(f"{d} {getattr(sizes, d)}" for d in dims) for dims in allowed)
                raise ValueError(f"{name} has shape {_shape(value)}; allowed: {words}")
        for nested in value if isinstance(value, tuple) else (value,):
            if isinstance(nested, Rule):
                _check_tables(nested, q, sizes)


def _fits(table: torch.Tensor, dims: tuple[str, ...], sizes: Sizes) -> bool:
    """A table may be longer than the sequences, as one made for the longest of several calls is."""
    if table.ndim != len(dims):
        return False
    for dim, found in zip(dims, table.shape, strict=True):
        wanted = getattr(sizes, dim)
        if not scalars.holds(found >= wanted if dim.startswith("seqlen") else found == wanted):
            return False
    return True


def _sink(sink: Any, q: torch.Tensor, heads: int) -> torch.Tensor | None:
    """The sink's scores in float32, one per query head."""
    if sink is None:
        return None
    check_tensor("learnable_sink", sink, q, SINK_DTYPES, 1)
    if sink.shape[0] != heads:
        raise ValueError(f"learnable_sink has {sink.shape[0]} numbers; allowed: {heads}, one per head of q")
    return sink.float()


def check_out(out: Any, q: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
    """Where the result of a call is written, if that is given. dtype: of the result."""
    if out is None:
        return
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is {type(out).__name__}; allowed: torch.Tensor")
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; allowed: {dtype}, the result's")
    _check_beside("out", out, q)
    wanted = (*q.shape[:-1], v.shape[-1])
    if tuple(out.shape) != wanted:
        raise ValueError(f"out has shape {_shape(out)}; allowed: {wanted}")


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will want a gradient of one of them."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def _check_derivatives(q, k, v, options: Options) -> None:
    """What is asked for is a gradient of q, k, v or the sink, and nothing else."""
    sink, out = options.learnable_sink, options.out
    for name, tensor in (("q", q), ("k", k), ("v", v), ("learnable_sink", sink), ("out", out)):
        if tensor is not None:
            _refuse_tangent(name, tensor, "allowed: gradients, by backward()")
    wanted = needs_gradient(q, k, v, sink)
    if out is not None and (wanted or needs_gradient(out)):
        raise NotImplementedError("out is given where a gradient is required; allowed: None or no_grad()")
    if wanted and not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
        raise NotImplementedError(
            "a gradient is required inside a transform of torch.func; allowed: backward() and "
            "torch.autograd.grad"
        )


def _check_table_is_constant(name: str, table: torch.Tensor) -> None:
    """Neither a gradient nor a tangent is asked for, which no tensor of a rule has, with any backward."""
    _refuse_tangent(name, table, "a rule's tensors have no derivative: detach it")
    if needs_gradient(table):
        raise NotImplementedError(
            f"{name} requires a gradient, and a rule's tensors get none: call within torch.no_grad(), or "
            "detach it"
        )


def _refuse_tangent(name: str, tensor: torch.Tensor, allowed: str) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(
            f"{name} has a tangent (forward-mode differentiation: jvp, jacfwd, make_dual); {allowed}"
        )


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))
