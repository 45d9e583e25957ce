"""What is asked, of which device, and what a kernel answers: the words that host and trees share.

    Asked     what the problems of all operations have in common: attention's Problem is the first of them
    Problem   what a call of attention asks that changes compiled code   (frozen, hashable, printable)
    Device    what the answer depends on besides                    (frozen)
    Sizes     how large a call is: for tuning only, never in compiled code
    Config    how a kernel does it: each tree's config.py, chosen by its tuning.py    (frozen)
    Operands  the tensors and run-time numbers of one call
    Spec      what one operand is: dtype, dimensions, meaning
    Support   what a kernel declares; `reasons` compares it with a Problem
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from .expression import Expression
from .precision import PRECISIONS, Precision

# Every feature that a call may need, in the order of the README's table, with its words there.
FEATURES = {
    "dense": "dense batches",
    "varlen": "packed sequences (`cu_seqlens`)",
    "seqused": "used lengths (`seqused_q`, `seqused_k`)",
    "gqa": "MQA / GQA",
    "split_dims": "different QK and V head dims",
    "mask": "masks: causal, window, prefix, document, your own",
    "block_mask": "block-sparse (`block_mask`)",
    "score": "scores: softcap, ALiBi, your own",
    "dropout": "dropout (Philox)",
    "sink": "learnable sinks",
    "lse": "log-sum-exp out",
    "split_kv": "split-KV (`num_splits`)",
    "kv_cache": "KV cache (`cache_seqlens`, `cache_batch_idx`, `cache_leftpad`)",
    "paged_kv": "paged KV (`block_table`)",
    "latent_kv": "V as K's first columns (MLA)",
    "schedule": "splits and order decided on the device (`scheduler_metadata`)",
    "scale_blocks": "FP8 with scales of blocks of 128 rows",
    "scale_blocks_64": "FP8 with scales of blocks of 64 rows",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4 for Q K",
}
# TMA fills shared memory by whole pieces of so many rows, after which the swizzle repeats.
PAGE_STEP = 8
# What kernels do, in the same order: a type of problem for each. Not every device has kernels for all.
OPERATIONS = {
    "forward": "attention",
    "combine": "merging of split keys",
    "quantized": "attention in few bits",
    "widened": "attention to an FP8 KV cache",
    "append": "KV cache append and rotary",
    "quantize": "quantizing",
    "backward": "backward",
    "quantized_backward": "backward in few bits",
    "preprocess": "what comes before a backward kernel",
    "postprocess": "what comes after a backward kernel",
}


@dataclass(frozen=True)
class Device:
    """A GPU as kernels see it: capability (major, minor) and opt-in shared memory per block in bytes.

    multiprocessors: how many there are to fill; 1 gives tuning no reason to cut work into smaller parts.
    """

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int = 1

    @property
    def target(self) -> str:
        """What the compiler calls it: "sm_80", "sm_90a", "sm_100a", ..."""
        major, minor = self.capability
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


class Sizes(NamedTuple):
    """How large a call is; seqlen_q and seqlen_k are those of the longest sequences."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int


class Asked(Protocol):
    """What the problems of all operations have in common.

    Each is a frozen dataclass whose fields are all that compiled code depends on: its `repr` is part of the
    compile key. operation: a key of OPERATIONS. dtype: "float16" or "bfloat16".
    """

    operation: ClassVar[str]

    @property
    def dtype(self) -> str:
        """Of the tensors that the user gives."""
        ...

    def features(self) -> tuple[str, ...]:
        """The features that this problem needs, keys of FEATURES."""
        ...

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it, whatever its features: what excludes each other."""
        ...

    def specs(self) -> Any:
        """What a kernel is launched with, in order: a named tuple of Specs, tuples of Specs, and None."""
        ...

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows; head dims among them."""
        ...

    def example_sizes(self) -> dict[str, int]:
        """Sizes of the other dimensions, for trying a kernel out."""
        ...


class BesideAttention:
    """Base of problems that come before or after attention: whoever has a kernel for one serves all of it."""

    dtype: str

    @property
    def precision(self) -> Precision:
        """Of the tensors that the user gives, or gets."""
        return PRECISIONS[self.dtype]

    def features(self) -> tuple[str, ...]:
        """None that a kernel may lack."""
        return ()

    def conflicts(self) -> tuple[str, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class KvCache:
    """Keys and values that lie in a cache, whether q is packed or not: its rows of one sequence, or pages.

    page_size: keys in a page, (num_pages, page_size, heads, dim) with a page table; None: rows, (cache_rows,
    seqlen_k, heads, dim). batch_idx: which row of the cache a sequence has is given; else its own number.
    leftpad: the first key in use of every sequence is given; else it is the first of all.
    latent: v is the first head_dim_v columns of k, which are read once.
    A used length (`seqused_k`) counts from the cache's first key on, and what comes before the first in use.
    """

    page_size: int | None = None
    batch_idx: bool = False
    leftpad: bool = False
    latent: bool = False


@dataclass(frozen=True)
class Problem:
    """What a call asks that changes compiled code; sizes are not part of it.

    dtype: of q, k and v, "float16" or "bfloat16". head_dim, head_dim_v: multiples of 8.
    mask, score: what the rules compute, or None.
    varlen: q is packed as (total, heads, dim) with cu_seqlens_q; so are k and v, with cu_seqlens_k, unless
    they lie in a cache. cache: where they do; None: beside the queries, dense or packed as these are.
    seqused_q, seqused_k: the used length of every sequence is given.
    gqa: there are fewer KV heads than query heads.
    block_size: (block_q, block_k) of a block mask, rows of q and of k; None without one.
    split_kv: the keys are shared out among CTAs: out and lse are a partial result for each of them, in fp32.
    out_dtype: of the result; None: as q, k and v. scheduled: see scheduled.py.
    """

    operation: ClassVar[str] = "forward"
    scheduled: ClassVar[bool] = False
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: Expression | None = None
    score: Expression | None = None
    varlen: bool = False
    seqused_q: bool = False
    seqused_k: bool = False
    gqa: bool = False
    dropout: bool = False
    sink: bool = False
    lse: bool = True
    block_size: tuple[int, int] | None = None
    split_kv: bool = False
    out_dtype: str | None = None
    cache: KvCache | None = None

    @property
    def precision(self) -> Precision:
        """Of q, k and v."""
        return PRECISIONS[self.dtype]

    @property
    def v_precision(self) -> Precision:
        """Of v."""
        return self.precision

    @property
    def p_precision(self) -> Precision:
        """Of P where it is multiplied."""
        return self.precision

    @property
    def out_precision(self) -> Precision:
        """Of the result."""
        return PRECISIONS[self.out_dtype or self.dtype]

    @property
    def page_size(self) -> int | None:
        """Keys in a page; None where they do not lie in pages."""
        return self.cache.page_size if self.cache else None

    @property
    def packed_k(self) -> bool:
        """Whether cu_seqlens_k is given: where keys begin, or of pages without used lengths just how many."""
        return self.varlen and (self.cache is None or bool(self.page_size and not self.seqused_k))

    @property
    def ragged_k(self) -> bool:
        """Whether sequences of keys end inside k and v."""
        return self.seqused_k or self.packed_k

    @property
    def sees_evenly(self) -> bool:
        """Whether all rows see the same keys: more of them may then visit the same blocks at no cost."""
        return not (self.mask or self.block_size or self.varlen or self.seqused_k or self.cache)

    @property
    def equal_tiles(self) -> bool:
        """Whether all tiles of a call have as many blocks of keys, which CTAs that persist rely on."""
        return self.sees_evenly and not (self.seqused_q or self.split_kv)

    def features(self) -> tuple[str, ...]:
        """The features that this problem needs, keys of FEATURES."""
        needed = {
            "dense": not self.varlen,
            "varlen": self.varlen,
            "seqused": self.seqused_q or self.seqused_k,
            "gqa": self.gqa,
            "split_dims": self.head_dim != self.head_dim_v,
            "mask": self.mask is not None,
            "block_mask": self.block_size is not None,
            "score": self.score is not None,
            "dropout": self.dropout,
            "sink": self.sink,
            "lse": self.lse,
            "split_kv": self.split_kv,
            "kv_cache": self.cache is not None and self.page_size is None,
            "paged_kv": self.page_size is not None,
            "latent_kv": self.cache is not None and self.cache.latent,
        }
        return tuple(name for name, needs in needed.items() if needs)

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it, whatever its features."""
        found = []
        if self.block_size and (self.varlen or self.seqused_q or self.seqused_k):
            found.append("no block mask for packed sequences or used lengths: its blocks are of one length")
        if self.cache:
            found += self._conflicts_of_cache(self.cache)
        if self.out_dtype not in (None, *PRECISIONS):
            found.append(f"out_dtype {self.out_dtype} is not one of {', '.join(PRECISIONS)}")
        return tuple(found)

    def _conflicts_of_cache(self, cache: KvCache) -> Iterator[str]:
        if self.block_size:
            yield "no block mask for keys in a cache: its blocks are of one length"
        if cache.page_size is None:
            return
        if cache.page_size < 1:
            yield f"page_size {cache.page_size} is not 1 or more"
        if cache.batch_idx or cache.leftpad:
            yield "no batch_idx or leftpad beside pages, which a page table finds"
        if not (self.seqused_k or self.varlen):
            yield "no pages without the sequences' lengths"

    def takes_tiles(self, tile_m: int, tile_n: int) -> bool:
        """Whether tiles of these rows of Q and of K and V divide the blocks of the mask, if there is one."""
        block_q, block_k = self.block_size or (tile_m, tile_n)
        return block_q % tile_m == block_k % tile_n == 0

    def specs(self) -> Operands:
        """What a kernel for this problem is launched with."""
        return forward_specs(self)

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        pages = {"page_size": self.page_size} if self.page_size else {}
        return {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v, "two": 2, **pages}

    def example_sizes(self) -> dict[str, int]:
        """Sizes of the other dimensions, for trying a kernel out: small, and no multiples of tiles."""
        seqlen_q, seqlen_k, batch, heads = 150, 200, 1 + self.varlen, 1
        sizes = {"num_heads_q": heads * (1 + self.gqa), "num_heads_kv": heads}
        if self.varlen:
            sizes |= {"total_q": seqlen_q, "total_k": seqlen_k, "batch_plus_1": batch + 1, "batch": batch}
        else:
            sizes |= {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
        if self.cache:
            sizes |= {"cache_rows": batch, "seqlen_k": seqlen_k}
        if self.page_size:
            sizes |= dict.fromkeys(("num_pages", "max_pages"), -(-seqlen_k // self.page_size))
        if self.split_kv:
            sizes["splits"] = 2
        for rule, name in ((self.mask, "mask"), (self.score, "score")):
            # Indexed by rows, keys, heads or sequences, whichever: long enough for all of them.
            sizes |= {dim: seqlen_k for spec in _rule_specs(rule, name) or () for dim in spec.dims}
        if self.block_size is not None:
            block_q, block_k = self.block_size
            sizes |= {"batch_or_1": 1, "num_heads_q_or_1": 1, "q_blocks": -(-seqlen_q // block_q)}
            sizes["listed"] = -(-seqlen_k // block_k)
        return sizes


class Operands(NamedTuple):
    """Everything a forward kernel is launched with, in launch order; None where a problem has none."""

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    sink: Any
    rng_state: Any
    softmax_scale: Any
    keep_threshold: Any
    keep_scale: Any
    max_seqlen_q: Any
    block_counts: Any
    block_indices: Any
    mask_values: Any
    score_values: Any
    multiprocessors: Any
    batch_idx: Any
    leftpad: Any
    page_table: Any


class Spec(NamedTuple):
    """One operand: dims name its dimensions (equal names are equal sizes), () for a scalar.

    strides: "strided" = any multiples of 16 bytes with the last dimension contiguous, "contiguous",
    or "scalar". written: the kernel writes it, whole. values: what a made-up operand must hold to be valid:
    "any" numbers; "is N"; "starts D", rising from 0 to the size of dimension D; "lengths S" of the sequences
    whose starts operand S holds, or each the size of a dimension S; "longest S" of them; "count D", the size
    of D, then zeros; "numbered A", 0, 1, … along axis A.
    """

    dtype: str
    dims: tuple[str, ...]
    strides: str
    meaning: str
    written: bool = False
    values: str = "any"


def forward_specs(problem: Problem) -> Operands:
    """A Spec for every operand of `problem`, None where it has none; rules' values as tuples of Specs."""
    dtype, cache = problem.dtype, problem.cache
    q_dims = ("total_q",) if problem.varlen else ("batch", "seqlen_q")
    k_dims = ("total_k",) if problem.varlen else ("batch", "seqlen_k")
    lse_dims = (*q_dims[:-1], "num_heads_q", q_dims[-1])
    if cache:
        k_dims = ("num_pages", "page_size") if cache.page_size else ("cache_rows", "seqlen_k")
    out_dims = (*q_dims, "num_heads_q", "head_dim_v")
    out = Spec(problem.out_precision.name, out_dims, "strided", "output", written=True)
    lse = Spec("float32", lse_dims, "contiguous", "natural log-sum-exp", written=True)
    if problem.split_kv:
        out = out._replace(dtype="float32", dims=("splits", *out_dims), meaning="output of each split")
        lse = lse._replace(dims=("splits", *lse_dims), meaning="natural log-sum-exp of each split")

    listed, block_dims = problem.block_size is not None, ("batch_or_1", "num_heads_q_or_1", "q_blocks")

    def tensor(dims: tuple[str, ...], meaning: str) -> Spec:
        return Spec(dtype, dims, "strided", meaning)

    lengths_q = "lengths cu_seqlens_q" if problem.varlen else "lengths seqlen_q"
    lengths_k = "lengths cu_seqlens_k" if problem.packed_k else "lengths seqlen_k"
    return Operands(
        q=tensor((*q_dims, "num_heads_q", "head_dim"), "queries"),
        k=tensor((*k_dims, "num_heads_kv", "head_dim"), "keys"),
        v=tensor((*k_dims, "num_heads_kv", "head_dim_v"), "values"),
        out=out,
        lse=lse if problem.lse else None,
        cu_seqlens_q=_optional(
            problem.varlen, "int32", ("batch_plus_1",), "first row of each sequence in q", "starts total_q"
        ),
        cu_seqlens_k=_optional(
            problem.packed_k, "int32", ("batch_plus_1",), "first row of each sequence in k", "starts total_k"
        ),
        seqused_q=_optional(
            problem.seqused_q, "int32", ("batch",), "rows of q in use, per sequence", lengths_q
        ),
        seqused_k=_optional(
            problem.seqused_k, "int32", ("batch",), "rows of k, v in use, per sequence", lengths_k
        ),
        sink=_optional(problem.sink, "float32", ("num_heads_q",), "score of the sink, per query head"),
        rng_state=_optional(problem.dropout, "int64", ("two",), "Philox seed and offset"),
        softmax_scale=Spec("float32", (), "scalar", "factor on q·k", values=f"is {problem.head_dim**-0.5}"),
        keep_threshold=_optional(
            problem.dropout, "int32", (), "keep where the 16 random bits are below", "is 32768"
        ),
        keep_scale=_optional(problem.dropout, "float32", (), "65536 / keep_threshold", "is 2"),
        max_seqlen_q=_optional(
            problem.varlen, "int32", (), "longest sequence of q: sizes the grid", "longest cu_seqlens_q"
        ),
        block_counts=_optional(
            listed, "int32", (*block_dims, "two"), "partial and full blocks to visit", "count listed"
        ),
        block_indices=_optional(
            listed, "int32", (*block_dims, "listed"), "partial ones, then full", "numbered -1"
        ),
        mask_values=_rule_specs(problem.mask, "mask"),
        score_values=_rule_specs(problem.score, "score"),
        multiprocessors=Spec("int32", (), "scalar", "of the device: so many CTAs persist", values="is 2"),
        **_cache_specs(cache or KvCache()),
    )


def _optional(
    present: bool, dtype: str, dims: tuple[str, ...], meaning: str, values: str = "any"
) -> Spec | None:
    """A Spec of contiguous numbers that only some problems have."""
    strides = "contiguous" if dims else "scalar"
    return Spec(dtype, dims, strides, meaning, values=values) if present else None


def _cache_specs(cache: KvCache) -> dict[str, Spec | None]:
    """What finds a sequence's keys in a cache."""
    batch, paged = ("batch",), cache.page_size is not None
    row, first, pages = "row of the cache", "first key in use", "pages in order"
    return {
        "batch_idx": _optional(cache.batch_idx, "int32", batch, f"{row}, per sequence", "numbered 0"),
        "leftpad": _optional(cache.leftpad, "int32", batch, f"{first}, per sequence", "is 0"),
        "page_table": _optional(
            paged, "int32", (*batch, "max_pages"), f"{pages}, per sequence", "numbered 1"
        ),
    }


def _rule_specs(rule: Expression | None, name: str) -> tuple[Spec, ...] | None:
    """Specs of a rule's run-time values; None where there are none to pass."""
    specs = []
    for i, kind in enumerate(rule.leaves() if rule else ()):
        meaning = f"value {i} of the {name} rule"
        if kind in ("int", "int64"):
            specs.append(Spec("int32" if kind == "int" else "int64", (), "scalar", meaning))
        elif kind == "float":
            specs.append(Spec("float32", (), "scalar", meaning))
        else:
            _, dtype, rank = kind.split(":")
            dims = tuple(f"{name}{i}_dim{d}" for d in range(int(rank)))
            specs.append(Spec(dtype, dims, "contiguous", meaning))
    return tuple(specs) or None


@dataclass(frozen=True)
class Support:
    """What a kernel declares: capabilities (lowest, highest), dtypes, head dims, features.

    page_sizes: multiples of it. one_of: features of which a problem must have one; none: it need not.
    """

    capabilities: tuple[tuple[int, int], tuple[int, int]]
    dtypes: tuple[str, ...]
    head_dims: Iterable[int]
    features: frozenset[str]
    page_sizes: int = 1
    one_of: tuple[str, ...] = ()

    def serves(self, device: Device) -> bool:
        """Whether its capability is among those that are declared."""
        low, high = self.capabilities
        return low <= device.capability <= high

    def reasons(self, problem: Asked, device: Device) -> tuple[str, ...]:
        """Every reason why not; empty when the kernel serves `problem` on `device`."""
        found, sizes = [], problem.known_sizes()
        if not self.serves(device):
            low, high = self.capabilities
            found.append(f"needs compute capability {_dotted(low)} to {_dotted(high)}, "
                         f"the device has {_dotted(device.capability)}")
        if problem.dtype not in self.dtypes:
            found.append(f"dtype {problem.dtype} is not one of {', '.join(self.dtypes)}")
        for name in ("head_dim", "head_dim_v"):
            if name in sizes and sizes[name] not in self.head_dims:
                found.append(f"{name} {sizes[name]} is not in {_ranged(self.head_dims)}")
        if sizes.get("page_size", 0) % self.page_sizes:
            found.append(f"page_size {sizes['page_size']} is not a multiple of {self.page_sizes}")
        for feature in problem.features():
            if feature not in self.features:
                found.append(f"no {FEATURES[feature]}")
        if self.one_of and not set(self.one_of).intersection(problem.features()):
            found.append(f"only with {' or '.join(FEATURES[feature] for feature in self.one_of)}")
        return (*found, *problem.conflicts())


def no_tile(problem: Problem, device: Device, configs: Iterable[Any]) -> str:
    """Why none of a table's configs serves; `configs`: those that would without a block mask."""
    tiles = sorted({(config.tile_m, config.tile_n) for config in configs})
    if not tiles:
        return f"no tile fits {device.shared_memory} bytes of shared memory"
    (block_q, block_k), allowed = problem.block_size, ", ".join(f"({m}, {n})" for m, n in tiles)
    return f"block_size ({block_q}, {block_k}) is a multiple of no tile; allowed: multiples of {allowed}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _ranged(values: Iterable[int]) -> str:
    if isinstance(values, range):
        return f"{values.start}…{values[-1]} in steps of {values.step}"
    return ", ".join(str(v) for v in values)
