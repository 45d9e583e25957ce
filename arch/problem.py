"""What is asked, of which device, and what a kernel answers: the words that host and trees share.

    Asked     what the problems of all operations have in common: attention's Problem is the first of them
    Problem   what a call of attention asks that changes compiled code   (frozen, hashable, printable)
    Device    what the answer depends on besides                    (frozen)
    Sizes     how large a call is: for tuning only, never in compiled code
    Config    how a kernel chose to do it: each tree's tuning.py    (frozen, defined there)
    Operands  the tensors and run-time numbers of one call
    Spec      what one operand is: dtype, dimensions, meaning
    Support   what a kernel declares; `reasons` compares it with a Problem
"""

from __future__ import annotations

from collections.abc import Iterable
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
    "paged_kv": "paged KV (`block_table`)",
}
# What kernels do, in the same order: a type of problem for each. Not every device has kernels for all.
OPERATIONS = {
    "forward": "attention",
    "combine": "merging of split keys",
    "decode": "KV cache append and decode",
    "backward": "backward",
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
class Problem:
    """What a call asks that changes compiled code; sizes are not part of it.

    dtype: of q, k and v, "float16" or "bfloat16". head_dim, head_dim_v: multiples of 8.
    mask, score: what the rules compute, or None.
    varlen: q, k, v are packed as (total, heads, dim) with cu_seqlens_q and cu_seqlens_k.
    seqused_q, seqused_k: the used length of every sequence is given.
    gqa: there are fewer KV heads than query heads.
    block_size: (block_q, block_k) of a block mask, rows of q and of k; None without one.
    split_kv: the keys are shared out among CTAs: out and lse are a partial result for each of them, in fp32.
    out_dtype: of the result; None: as q, k and v.
    """

    operation: ClassVar[str] = "forward"
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

    @property
    def precision(self) -> Precision:
        """Of q, k and v, and of P where it is multiplied."""
        return PRECISIONS[self.dtype]

    @property
    def out_precision(self) -> Precision:
        """Of the result."""
        return PRECISIONS[self.out_dtype or self.dtype]

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
        }
        return tuple(name for name, needs in needed.items() if needs)

    def conflicts(self) -> tuple[str, ...]:
        """Why no kernel can serve it, whatever its features."""
        found = []
        if self.block_size and (self.varlen or self.seqused_q or self.seqused_k):
            found.append("no block mask for packed sequences or used lengths: its blocks are of one length")
        if self.out_dtype not in (None, *PRECISIONS):
            found.append(f"out_dtype {self.out_dtype} is not one of {', '.join(PRECISIONS)}")
        return tuple(found)

    def takes_tiles(self, tile_m: int, tile_n: int) -> bool:
        """Whether tiles of these rows of Q and of K and V divide the blocks of the mask, if there is one."""
        block_q, block_k = self.block_size or (tile_m, tile_n)
        return block_q % tile_m == block_k % tile_n == 0

    def specs(self) -> Operands:
        """What a kernel for this problem is launched with."""
        return forward_specs(self)

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        return {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v, "two": 2}

    def example_sizes(self) -> dict[str, int]:
        """Sizes of the other dimensions, for trying a kernel out: small, and no multiples of tiles."""
        seqlen_q, seqlen_k, batch, heads = 150, 200, 1 + self.varlen, 1
        sizes = {"num_heads_q": heads * (1 + self.gqa), "num_heads_kv": heads}
        if self.varlen:
            sizes |= {"total_q": seqlen_q, "total_k": seqlen_k, "batch_plus_1": batch + 1, "batch": batch}
        else:
            sizes |= {"batch": batch, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
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
    dtype = problem.dtype
    if problem.varlen:
        q_dims, k_dims = ("total_q",), ("total_k",)
        lse_dims: tuple[str, ...] = ("num_heads_q", "total_q")
    else:
        q_dims, k_dims = ("batch", "seqlen_q"), ("batch", "seqlen_k")
        lse_dims = ("batch", "num_heads_q", "seqlen_q")
    out_dims = (*q_dims, "num_heads_q", "head_dim_v")
    out = Spec(problem.out_precision.name, out_dims, "strided", "output", written=True)
    lse = Spec("float32", lse_dims, "contiguous", "natural log-sum-exp", written=True)
    if problem.split_kv:
        out = out._replace(dtype="float32", dims=("splits", *out_dims), meaning="output of each split")
        lse = lse._replace(dims=("splits", *lse_dims), meaning="natural log-sum-exp of each split")

    listed, block_dims = problem.block_size is not None, ("batch_or_1", "num_heads_q_or_1", "q_blocks")

    def tensor(dims: tuple[str, ...], meaning: str) -> Spec:
        return Spec(dtype, dims, "strided", meaning)

    def optional(
        present: bool, dtype: str, dims: tuple[str, ...], meaning: str, values: str = "any"
    ) -> Spec | None:
        strides = "contiguous" if dims else "scalar"
        return Spec(dtype, dims, strides, meaning, values=values) if present else None

    lengths_q, lengths_k = (f"lengths {f'cu_seqlens_{x}' if problem.varlen else f'seqlen_{x}'}" for x in "qk")
    return Operands(
        q=tensor((*q_dims, "num_heads_q", "head_dim"), "queries"),
        k=tensor((*k_dims, "num_heads_kv", "head_dim"), "keys"),
        v=tensor((*k_dims, "num_heads_kv", "head_dim_v"), "values"),
        out=out,
        lse=lse if problem.lse else None,
        cu_seqlens_q=optional(
            problem.varlen, "int32", ("batch_plus_1",), "first row of each sequence in q", "starts total_q"
        ),
        cu_seqlens_k=optional(
            problem.varlen, "int32", ("batch_plus_1",), "first row of each sequence in k", "starts total_k"
        ),
        seqused_q=optional(
            problem.seqused_q, "int32", ("batch",), "rows of q in use, per sequence", lengths_q
        ),
        seqused_k=optional(
            problem.seqused_k, "int32", ("batch",), "rows of k, v in use, per sequence", lengths_k
        ),
        sink=optional(problem.sink, "float32", ("num_heads_q",), "score of the sink, per query head"),
        rng_state=optional(problem.dropout, "int64", ("two",), "Philox seed and offset"),
        softmax_scale=Spec("float32", (), "scalar", "factor on q·k", values=f"is {problem.head_dim**-0.5}"),
        keep_threshold=optional(
            problem.dropout, "int32", (), "keep where the 16 random bits are below", "is 32768"
        ),
        keep_scale=optional(problem.dropout, "float32", (), "65536 / keep_threshold", "is 2"),
        max_seqlen_q=optional(
            problem.varlen, "int32", (), "longest sequence of q: sizes the grid", "longest cu_seqlens_q"
        ),
        block_counts=optional(
            listed, "int32", (*block_dims, "two"), "partial and full blocks to visit", "count listed"
        ),
        block_indices=optional(
            listed, "int32", (*block_dims, "listed"), "partial ones, then full", "numbered -1"
        ),
        mask_values=_rule_specs(problem.mask, "mask"),
        score_values=_rule_specs(problem.score, "score"),
        multiprocessors=Spec("int32", (), "scalar", "of the device: so many CTAs persist", values="is 2"),
    )


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
    """What a kernel declares: capabilities (lowest, highest), dtypes, head dims, features."""

    capabilities: tuple[tuple[int, int], tuple[int, int]]
    dtypes: tuple[str, ...]
    head_dims: Iterable[int]
    features: frozenset[str]

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
        for feature in problem.features():
            if feature not in self.features:
                found.append(f"no {FEATURES[feature]}")
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
