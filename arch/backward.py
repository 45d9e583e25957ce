"""The backward pass, as all trees have it: three launches a call (Dao 2023, algorithm 2).

    preprocess    D = rowsum(dO * O) - dLSE and LSE in exponents of two, row by row; dQ's accumulator cleared
    main          a CTA owns a tile of keys and walks the query tiles that see it: P and dS are recomputed,
                  dK and dV stay on chip, dQ leaves as fp32 sums
    postprocess   dQ's accumulator times the scale, in the input's dtype

With P = exp(S - LSE):  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - D),  dQ = scale dS K,  dK = scale dS^T Q.
A gradient that comes through the log-sum-exp joins D: d LSE_i / d S_ij = P_ij.

Special rows are decided in the preprocess, so that the main kernel has no branch for one:

    row without a key, no sink     LSE 0: what is hidden is -inf, so that P is 0
    row out of use, or no row      LSE +inf and D 0: P is 0

Scratch is in rows of its own, whole tiles for every sequence (`first_scratch_row`): main kernels read and add
to tiles without looking where a sequence ends. How a tile of dQ lies inside its rows * columns numbers is
the tree's own affair, between its main kernel and its postprocess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from .kernel import Kernel, Step, Steps, Tuning
from .problem import BesideAttention, Device, Problem, Spec, Support

# Features of calls that have no gradients.
FORWARD_ONLY = frozenset(("split_kv", "kv_cache", "paged_kv", "latent_kv", "schedule"))
SCRATCH_TILE = 128  # rows; a multiple of every kernel's query tile


def first_scratch_row(first_row, batch):
    """Where the scratch rows of sequence `batch` begin, which has row `first_row` of all as its first."""
    return (first_row + batch * SCRATCH_TILE) // SCRATCH_TILE * SCRATCH_TILE


def scratch_columns(head_dim: int) -> int:
    """Columns of an accumulator, and of its operands' tiles: whole pieces of 16 for two or four warps."""
    step = 32 if head_dim <= 128 else 64
    return -(-head_dim // step) * step


def scratch_rows(rows: int, batches: int) -> int:
    """Scratch rows of a call whose `batches` sequences have `rows` rows together."""
    return (rows // SCRATCH_TILE + batches) * SCRATCH_TILE


@dataclass(frozen=True)
class BackwardProblem:
    """What the gradients of a call depend on.

    forward: what was asked of the forward pass, keys unsplit. grad_lse: a gradient comes through the
    log-sum-exp. deterministic: sums are added in one order, whatever the order of events.
    """

    operation: ClassVar[str] = "backward"
    forward: Problem
    grad_lse: bool = False
    deterministic: bool = False

    @property
    def dtype(self) -> str:
        """Of q, k, v and their gradients."""
        return self.forward.dtype

    def features(self) -> tuple[str, ...]:
        """Those of the forward pass."""
        return self.forward.features()

    def conflicts(self) -> tuple[str, ...]:
        """Those of the forward pass."""
        return self.forward.conflicts()

    @property
    def block_size(self) -> tuple[int, int] | None:
        """Of the block mask."""
        return self.forward.block_size

    @property
    def summed(self) -> tuple[str, ...]:
        """Whose gradients leave the main kernel as sums: dK and dV do where query heads share them."""
        return ("q", "k", "v") if self.forward.gqa else ("q",)

    def before(self) -> PreprocessProblem:
        """What comes before the main kernel."""
        return PreprocessProblem.of(self)

    def after(self, of: str) -> PostprocessProblem:
        """What comes after it, of one of those that are summed."""
        asked = self.forward
        dim = asked.head_dim_v if of == "v" else asked.head_dim
        return PostprocessProblem(dtype=asked.dtype, of=of, head_dim=dim, varlen=asked.varlen)

    def main(self) -> BackwardProblem:
        """What is left of it for the main kernel: the sink is in the log-sum-exp, whose gradient is in D."""
        return replace(self, forward=replace(self.forward, sink=False, lse=True), grad_lse=False)

    def specs(self) -> BackwardOperands:
        """A Spec for every operand, None where there is none."""
        given, own = self.forward.specs(), BackwardOperands._fields
        inherited = {name: spec for name, spec in given._asdict().items() if name in own}
        for name, last in (("block_counts", "two"), ("block_indices", "listed_rows")):
            if inherited[name] is not None:
                dims = ("batch_or_1", "num_heads_q_or_1", "k_blocks", last)
                values = "count listed_rows" if name == "block_counts" else "numbered -1"
                inherited[name] = inherited[name]._replace(dims=dims, values=values)
        shared_heads, turns = "k" in self.summed, None
        if self.deterministic and inherited["block_indices"] is not None:
            meaning = "key blocks done before each listed one, from the first on"
            turns = inherited["block_indices"]._replace(meaning=meaning, values="numbered -2")
        return BackwardOperands(
            **inherited,
            grad_out=_like(given.out, "gradient of the output"),
            **_statistics(written=False),
            grad_q_sum=_sums("q", "head_dim", "dQ before its scale, tiles in an order of the kernel's"),
            grad_k=None if shared_heads else _like(given.k, "gradient of k", not self.forward.varlen),
            grad_v=None if shared_heads else _like(given.v, "gradient of v", not self.forward.varlen),
            grad_k_sum=_sums("k", "head_dim", "dK before its scale, likewise") if shared_heads else None,
            grad_v_sum=_sums("k", "head_dim_v", "dV, likewise") if shared_heads else None,
            turns_q=_turns("q") if self.deterministic else None,
            turns_k=_turns("k") if self.deterministic and shared_heads else None,
            max_seqlen_k=_longest("k") if self.forward.varlen else None,
            block_turns=turns,
        )

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        return {**self.forward.known_sizes(), **_padded(self.forward)}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        sizes = self.forward.example_sizes()
        if self.forward.block_size is not None:
            block_q, block_k = self.forward.block_size
            sizes["k_blocks"] = -(-sizes["seqlen_k"] // block_k)
            sizes["listed_rows"] = -(-sizes["seqlen_q"] // block_q)
        return _with_scratch(sizes, "q", "k")


class BackwardOperands(NamedTuple):
    """Everything a main kernel is launched with, in launch order; None where there is none."""

    q: Any
    k: Any
    v: Any
    grad_out: Any
    lse_log2: Any
    delta: Any
    grad_q_sum: Any
    grad_k: Any
    grad_v: Any
    grad_k_sum: Any
    grad_v_sum: Any
    turns_q: Any
    turns_k: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    rng_state: Any
    softmax_scale: Any
    keep_threshold: Any
    keep_scale: Any
    max_seqlen_k: Any
    block_counts: Any
    block_indices: Any
    block_turns: Any
    mask_values: Any
    score_values: Any


@dataclass(frozen=True)
class PreprocessProblem(BesideAttention):
    """What the preprocess depends on; names as in `Problem`.

    grad_lse, deterministic: as in `BackwardProblem`.
    """

    operation: ClassVar[str] = "preprocess"
    dtype: str
    head_dim: int
    head_dim_v: int
    varlen: bool = False
    seqused_q: bool = False
    sink: bool = False
    grad_lse: bool = False
    deterministic: bool = False

    @staticmethod
    def of(problem: BackwardProblem) -> PreprocessProblem:
        """What comes before the main kernel."""
        asked = problem.forward
        return PreprocessProblem(
            dtype=asked.dtype,
            head_dim=asked.head_dim,
            head_dim_v=asked.head_dim_v,
            varlen=asked.varlen,
            seqused_q=asked.seqused_q,
            sink=asked.sink,
            grad_lse=problem.grad_lse,
            deterministic=problem.deterministic,
        )

    def specs(self) -> PreprocessOperands:
        """A Spec for every operand, None where there is none."""
        asked = Problem(
            self.dtype, self.head_dim, self.head_dim_v,
            varlen=self.varlen, seqused_q=self.seqused_q, sink=self.sink,
        ).specs()
        by_row = asked.lse._replace(written=False)
        sink = by_row._replace(meaning="gradient of the sink, row by row", written=not self.varlen)
        return PreprocessOperands(
            out=_like(asked.out, "output of the forward pass"),
            grad_out=_like(asked.out, "gradient of the output"),
            lse=by_row,
            grad_lse=by_row._replace(meaning="gradient of the log-sum-exp") if self.grad_lse else None,
            **_statistics(written=True),
            grad_q_sum=_sums("q", "head_dim", "what dQ will be summed in, cleared", written=True),
            turns_q=_turns("q", written=True) if self.deterministic else None,
            grad_sink_rows=sink if self.sink else None,
            cu_seqlens_q=asked.cu_seqlens_q,
            seqused_q=asked.seqused_q,
            sink=asked.sink,
            max_seqlen_q=asked.max_seqlen_q,
        )

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        return {"head_dim_v": self.head_dim_v, **_padded(self)}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        rows = {"total_q": 150, "batch_plus_1": 3} if self.varlen else {"seqlen_q": 150}
        return _with_scratch({"num_heads_q": 2, "batch": 2, **rows}, "q")


@dataclass(frozen=True)
class PreprocessConfig:
    """warps: of a CTA."""

    warps: int = 8

    def shared_memory(self, problem: PreprocessProblem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


class PreprocessOperands(NamedTuple):
    """Everything the preprocess is launched with, in launch order; None where there is none."""

    out: Any
    grad_out: Any
    lse: Any
    grad_lse: Any
    lse_log2: Any
    delta: Any
    grad_q_sum: Any
    turns_q: Any
    grad_sink_rows: Any
    cu_seqlens_q: Any
    seqused_q: Any
    sink: Any
    max_seqlen_q: Any


@dataclass(frozen=True)
class PostprocessProblem(BesideAttention):
    """What a postprocess depends on. of: whose gradient it writes, "q", "k" or "v"; names as in `Problem`."""

    operation: ClassVar[str] = "postprocess"
    dtype: str
    of: str
    head_dim: int
    varlen: bool = False

    @property
    def side(self) -> str:
        """Whose rows it has: "q" or "k"."""
        return "q" if self.of == "q" else "k"

    @property
    def _dim(self) -> str:
        return "head_dim_v" if self.of == "v" else "head_dim"

    def specs(self) -> PostprocessOperands:
        """A Spec for every operand, None where there is none."""
        asked = Problem(self.dtype, self.head_dim, self.head_dim, varlen=self.varlen).specs()
        starts = asked.cu_seqlens_q if self.side == "q" else asked.cu_seqlens_k
        return PostprocessOperands(
            sums=_sums(self.side, self._dim, "gradient before its factor, tiles in the main kernel's order"),
            grad=_like(getattr(asked, self.of), "gradient", written=not self.varlen),
            cu_seqlens=starts,
            factor=Spec("float32", (), "scalar", "factor on the sums", values="is 0.125"),
            max_seqlen=_longest(self.side) if self.varlen else None,
        )

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        return {self._dim: self.head_dim, f"{self._dim}_padded": scratch_columns(self.head_dim)}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        rows = {f"total_{self.side}": 150, "batch_plus_1": 3} if self.varlen else {f"seqlen_{self.side}": 150}
        heads = "num_heads_q" if self.side == "q" else "num_heads_kv"
        return _with_scratch({heads: 2, "batch": 2, **rows}, self.side)


class PostprocessOperands(NamedTuple):
    """Everything a postprocess is launched with, in launch order; None where there is none."""

    sums: Any
    grad: Any
    cu_seqlens: Any
    factor: Any
    max_seqlen: Any


# After FlashAttention-2's dot_do_o (Dao 2023, algorithm 2, line 4).
PREPROCESS = Kernel(
    name="common.preprocess",
    operation="preprocess",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16"),
        head_dims=range(8, 257, 8),
        features=frozenset(),
    ),
    tuning=Tuning(
        config=lambda problem, device, sizes: PreprocessConfig(),
        blocks=lambda config, sizes, _: -(-sizes.seqlen_q // SCRATCH_TILE) * sizes.heads_q * sizes.batch,
    ),
    launches=".common.preprocess:PreprocessKernel",
)


def steps_around(
    own: Step, device: Device, postprocess: Kernel, configured: Callable[..., Any],
    preprocess: Kernel = PREPROCESS,
) -> Steps:
    """The launches of a call's gradients, of which `own` is a tree's main kernel for a BackwardProblem.

    postprocess: the tree's. configured(problem, config): its config after a main kernel with `config`.
    """
    problem, main, before = own.problem, own.problem.main(), own.problem.before()
    after = []
    for of in problem.summed:
        job = problem.after(of)
        renamed = {
            "sums": f"grad_{of}_sum",
            "grad": f"grad_{of}",
            "cu_seqlens": f"cu_seqlens_{job.side}",
            "factor": "value_scale" if of == "v" else "softmax_scale",
            "max_seqlen": f"max_seqlen_{job.side}",
        }
        after.append(Step(postprocess, job, configured(job, own.config), tuple(renamed.items())))
    scratch = {"lse_log2": None, "delta": None, "grad_q_sum": None}
    if "k" in problem.summed:
        scratch |= {"grad_k_sum": 0.0, "grad_v_sum": 0.0}
    if problem.deterministic:
        scratch |= {"turns_q": None, "turns_k": 0} if "k" in problem.summed else {"turns_q": None}
    first = Step(preprocess, before, preprocess.config(before, device))
    sizes = {f"scratch_rows_{side}": _scratch_rows_of(side) for side in "qk"}
    return Steps((first, own._replace(problem=main), *after), scratch, sizes)


def _scratch_rows_of(side: str) -> Callable[[Mapping[str, int]], int]:
    """The scratch rows of a call from its sizes, packed or dense."""

    def rows(sizes: Mapping[str, int]) -> int:
        if f"total_{side}" in sizes:
            return scratch_rows(sizes[f"total_{side}"], sizes["batch_plus_1"] - 1)
        return scratch_rows(sizes["batch"] * sizes[f"seqlen_{side}"], sizes["batch"])

    return rows


def _padded(problem: Problem | PreprocessProblem) -> dict[str, int]:
    """Columns of accumulators, as Specs name them."""
    return {f"{name}_padded": scratch_columns(getattr(problem, name)) for name in ("head_dim", "head_dim_v")}


def _like(spec: Spec, meaning: str, written: bool = False) -> Spec:
    return spec._replace(meaning=meaning, written=written)


def _statistics(written: bool) -> dict[str, Spec]:
    dims = ("num_heads_q", "scratch_rows_q")
    return {
        "lse_log2": Spec("float32", dims, "strided", "log-sum-exp as an exponent of two", written),
        "delta": Spec("float32", dims, "strided", "rowsum(dO * O) - dLSE", written),
    }


def _sums(side: str, dim: str, meaning: str, written: bool = False) -> Spec:
    """An accumulator. dim: the columns' name before they are padded."""
    heads = "num_heads_q" if side == "q" else "num_heads_kv"
    return Spec("float32", (heads, f"scratch_rows_{side}", f"{dim}_padded"), "strided", meaning, written)


def _turns(side: str, written: bool = False) -> Spec:
    """Numbers that warps take turns by (common/turns.py): those of a tile at its first rows."""
    heads = "num_heads_q" if side == "q" else "num_heads_kv"
    meaning = "how many of those who add to a tile are done, warp by warp"
    return Spec("int32", (heads, f"scratch_rows_{side}"), "strided", meaning, written, values="is 0")


def _longest(side: str) -> Spec:
    meaning = f"longest sequence of {side}: sizes the grid"
    return Spec("int32", (), "scalar", meaning, values=f"longest cu_seqlens_{side}")


def _with_scratch(sizes: dict[str, int], *sides: str) -> dict[str, int]:
    found = dict(sizes)
    for side in sides:
        rows = sizes.get(f"total_{side}")
        rows = sizes[f"seqlen_{side}"] * sizes["batch"] if rows is None else rows
        found[f"scratch_rows_{side}"] = scratch_rows(rows, sizes["batch"])
    return found
