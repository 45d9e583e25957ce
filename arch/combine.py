"""Split-KV's second half: partial results, one for each part of the keys, become attention's result.

Softmax over all keys is a weighted mean of softmaxes over parts of them, the weights being exp(lse) of
each part (Dao et al. 2023, "Flash-Decoding"; Milakov and Gimelshein 2018). Every tree may use it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from .kernel import Kernel, Step, Steps, Tuning
from .problem import BesideAttention, Problem, Spec, Support

WARPS = 4


@dataclass(frozen=True)
class CombineProblem(BesideAttention):
    """What merging depends on; names as in `Problem`, dtype that of the result.

    The sink, which no part has seen, joins here. part_dtype: of the parts' results. log2: log-sum-exps are to
    base 2.
    """

    operation: ClassVar[str] = "combine"
    dtype: str
    head_dim_v: int
    varlen: bool = False
    seqused_q: bool = False
    sink: bool = False
    lse: bool = True
    part_dtype: str = "float32"
    log2: bool = False

    @staticmethod
    def of(problem: Problem) -> CombineProblem:
        """What remains to be done after a split problem, to answer `problem`."""
        return CombineProblem(
            dtype=problem.out_precision.name,
            head_dim_v=problem.head_dim_v,
            varlen=problem.varlen,
            seqused_q=problem.seqused_q,
            sink=problem.sink,
            lse=problem.lse,
        )

    def specs(self) -> CombineOperands:
        """A Spec for every operand, None where there is none."""
        rows = ("total_q",) if self.varlen else ("batch", "seqlen_q")
        lse_rows = ("num_heads_q", "total_q") if self.varlen else ("batch", "num_heads_q", "seqlen_q")
        out_dims = (*rows, "num_heads_q", "head_dim_v")

        def optional(
            present: bool, dtype: str, dims: tuple[str, ...], meaning: str, values: str = "any"
        ) -> Spec | None:
            strides = "contiguous" if dims else "scalar"
            return Spec(dtype, dims, strides, meaning, values=values) if present else None

        lengths = "lengths cu_seqlens_q" if self.varlen else "lengths seqlen_q"

        meaning = "log-sum-exp, to base 2" if self.log2 else "natural log-sum-exp"
        lse = Spec("float32", lse_rows, "contiguous", meaning, written=True)
        return CombineOperands(
            partial_out=Spec(self.part_dtype, ("splits", *out_dims), "strided", "output of each split"),
            partial_lse=Spec("float32", ("splits", *lse_rows), "contiguous", "log-sum-exp of each split"),
            out=Spec(self.dtype, out_dims, "strided", "output", written=True),
            lse=lse if self.lse else None,
            cu_seqlens_q=optional(
                self.varlen, "int32", ("batch_plus_1",), "first row of each sequence", "starts total_q"
            ),
            seqused_q=optional(self.seqused_q, "int32", ("batch",), "rows in use, per sequence", lengths),
            sink=optional(self.sink, "float32", ("num_heads_q",), "score of the sink, per query head"),
            max_seqlen_q=optional(
                self.varlen, "int32", (), "longest sequence: sizes the grid", "longest cu_seqlens_q"
            ),
        )

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        rows = {"total_q": 50, "batch_plus_1": 3} if self.varlen else {"seqlen_q": 50}
        return {"splits": 3, "num_heads_q": 2, "batch": 2, **rows}

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        return {"head_dim_v": self.head_dim_v}


class CombineOperands(NamedTuple):
    """Everything the combine kernel is launched with, in launch order; None where there is none."""

    partial_out: Any
    partial_lse: Any
    out: Any
    lse: Any
    cu_seqlens_q: Any
    seqused_q: Any
    sink: Any
    max_seqlen_q: Any


@dataclass(frozen=True)
class Config:
    """warps: of a CTA; each takes one row of one head at a time."""

    warps: int = WARPS

    def shared_memory(self, problem: CombineProblem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


COMBINE = Kernel(
    name="common.combine",
    operation="combine",
    support=Support(
        capabilities=((8, 0), (12, 1)),
        dtypes=("float16", "bfloat16", "float32"),
        head_dims=range(8, 577, 8),
        features=frozenset(),
    ),
    tuning=Tuning(
        config=lambda problem, device, sizes: Config(),
        blocks=lambda config, sizes, _: sizes.seqlen_q * sizes.heads_q * sizes.batch // WARPS + sizes.batch,
    ),
    launches=".common.combine:CombineKernel",
)


def part_of(problem: Problem) -> Problem:
    """The problem of one part of the keys. The sink joins when parts are merged, by their log-sum-exp."""
    return replace(problem, split_kv=True, sink=False, lse=True)


def split(part: Step, merging: Step, splits: int) -> Steps:
    """Attention over each of the parts, into scratch, then the parts' merging."""
    renamed = (("out", "partial_out"), ("lse", "partial_lse"))
    scratch: dict[str, float | None] = {"partial_out": None, "partial_lse": None}
    return Steps((part._replace(renamed=renamed), merging), scratch, {"splits": splits})
