"""Copies by columns of what gradients in 8 bits sum over rows, for tensor cores that take neighbours alone.

Hopper's products of 8 bits want what they sum over contiguous in both operands (PTX ISA, wgmma). S and dP
sum over columns of a head, and take Q, K, V and dO as they lie. dV, dK and dQ sum over rows, of dO, Q and K:

    q, grad_out, k   (rows, columns)  ->  q_columns, grad_out_columns, k_columns   (columns, scratch rows)

once a call, O(seqlen) work beside O(seqlen**2). Rows are those of scratch (`backward.first_scratch_row`), so
that a tile is a box of whole scratch rows wherever sequences begin; rows and columns beyond those in use are
zeros, as what lies there may be no numbers.

Of every 16 rows of scratch the order is the main kernel's, the same for both of a product's operands:

    q, grad_out   place 4t + 2j + e is row 8j + 2t + e: P^T and dS^T, accumulators of a thread t of four with
                  rows 2t and 2t + 1 of eight, are then operands in registers where they are
    k             place 2i + j is key i + 8j: of dS^T a thread has keys i and i + 8, which meet in 16 bits
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from .backward import SCRATCH_TILE, scratch_columns, scratch_rows
from .kernel import Kernel, Step, Steps, Tuning
from .precision import Precision
from .problem import BesideAttention, Problem, Spec, Support
from .quantized import FORMATS
from .quantized_backward import QuantizedBackwardOperands, QuantizedBackwardProblem

COPIED = ("q", "k", "grad_out")
GROUP = 16  # rows whose order is a copy's own
ROW_ORDER = tuple(8 * j + 2 * t + e for t in range(4) for j in range(2) for e in range(2))
KEY_ORDER = tuple(i + 8 * j for i in range(8) for j in range(2))
WARP_ROWS, WARP_COLUMNS = 64, 32  # that a warp copies


@dataclass(frozen=True)
class TransposeProblem(BesideAttention):
    """What a copy depends on. of: what is copied, one of COPIED; names as in `Problem`.

    used: the used length of every sequence is given.
    """

    operation: ClassVar[str] = "preprocess"
    dtype: str
    of: str
    head_dim: int
    varlen: bool = False
    used: bool = False

    @property
    def precision(self) -> Precision:
        """Of what is copied."""
        return FORMATS[self.dtype].element

    @property
    def side(self) -> str:
        """Whose rows it has: "q" or "k"."""
        return "k" if self.of == "k" else "q"

    @property
    def order(self) -> tuple[int, ...]:
        """For every place of GROUP, which row is there."""
        return KEY_ORDER if self.of == "k" else ROW_ORDER

    @property
    def _dim(self) -> str:
        return dim_of(self.of)

    def specs(self) -> TransposeOperands:
        """A Spec for every operand, None where there is none. Elements are passed as bytes."""
        side, used = self.side, {f"seqused_{self.side}": self.used}
        # Of 16 bits, as a problem by itself has a result; all that is taken from it are dimensions.
        asked = Problem("float16", self.head_dim, self.head_dim, varlen=self.varlen, **used).specs()
        rows = getattr(asked, side)
        longest = Spec(
            "int32", (), "scalar", f"longest sequence of {side}", values=f"longest cu_seqlens_{side}"
        )
        return TransposeOperands(
            rows=rows._replace(dtype="uint8", dims=(*rows.dims[:-1], self._dim)),
            columns=columns(self.of, written=True),
            cu_seqlens=getattr(asked, f"cu_seqlens_{side}"),
            seqused=getattr(asked, f"seqused_{side}"),
            max_seqlen=longest if self.varlen else None,
        )

    def known_sizes(self) -> dict[str, int]:
        """The dimensions, as Specs name them, that compiled code knows."""
        return {self._dim: self.head_dim, f"{self._dim}_padded": scratch_columns(self.head_dim)}

    def example_sizes(self) -> dict[str, int]:
        """As `Problem.example_sizes`."""
        side, heads = self.side, "num_heads_kv" if self.side == "k" else "num_heads_q"
        rows = {f"total_{side}": 150, "batch_plus_1": 3} if self.varlen else {f"seqlen_{side}": 150}
        scratch = scratch_rows(150 if self.varlen else 300, 2)
        return {heads: 2, "batch": 2, f"scratch_rows_{side}": scratch, **rows}


class TransposeOperands(NamedTuple):
    """Everything a copy is launched with, in launch order; None where there is none."""

    rows: Any
    columns: Any
    cu_seqlens: Any
    seqused: Any
    max_seqlen: Any


@dataclass(frozen=True)
class TransposeConfig:
    """threads: of a CTA, which takes SCRATCH_TILE rows of a head."""

    threads: int

    @staticmethod
    def of(problem: TransposeProblem) -> TransposeConfig:
        """A warp for WARP_ROWS x WARP_COLUMNS."""
        patches = SCRATCH_TILE // WARP_ROWS * (scratch_columns(problem.head_dim) // WARP_COLUMNS)
        return TransposeConfig(32 * patches)

    def shared_memory(self, problem: TransposeProblem) -> int:
        """Bytes of dynamic shared memory: none."""
        return 0


class ColumnsBackwardProblem(QuantizedBackwardProblem):
    """As `QuantizedBackwardProblem`, for a main kernel that takes copies by columns besides."""

    def specs(self) -> ColumnsBackwardOperands:
        """A Spec for every operand, None where there is none."""
        copies = {f"{name}_columns": columns(name) for name in COPIED}
        return ColumnsBackwardOperands(*super().specs(), **copies)


class Columns(NamedTuple):
    """Copies of COPIED."""

    q_columns: Any
    k_columns: Any
    grad_out_columns: Any


# Everything a main kernel with copies is launched with, in launch order; None where there is none.
ColumnsBackwardOperands = NamedTuple(  # noqa: UP014 - made of the fields of two others
    "ColumnsBackwardOperands",
    [(name, Any) for of in (QuantizedBackwardOperands, Columns) for name in of._fields],
)


def dim_of(name: str) -> str:
    """What Specs call the columns of q, k or dO."""
    return "head_dim_v" if name == "grad_out" else "head_dim"


def columns(of: str, written: bool = False) -> Spec:
    """A copy of q, k or dO."""
    heads, side = ("num_heads_kv", "k") if of == "k" else ("num_heads_q", "q")
    dims = (heads, f"{dim_of(of)}_padded", f"scratch_rows_{side}")
    return Spec("uint8", dims, "strided", f"{of} by columns, rows in an order of the kernel's", written)


TRANSPOSE = Kernel(
    name="common.transpose",
    operation="preprocess",
    support=Support(
        capabilities=((9, 0), (9, 0)),
        dtypes=tuple(FORMATS),
        head_dims=range(16, 129, 16),
        features=frozenset(),
    ),
    tuning=Tuning(
        config=lambda problem, device, sizes: TransposeConfig.of(problem),
        blocks=lambda config, sizes, _: (
            -(-max(sizes.seqlen_q, sizes.seqlen_k) // SCRATCH_TILE) * sizes.heads_q * sizes.batch
        ),
    ),
    launches=".common.transposed:TransposeKernel",
)


def with_columns(found: Steps) -> Steps:
    """The launches of a call's gradients in 8 bits, with copies before the main kernel, which takes them."""
    before, main, *after = found.steps
    copies = tuple(copy_of(main.problem, name) for name in COPIED)
    main = main._replace(problem=ColumnsBackwardProblem(**vars(main.problem)))
    scratch = dict(found.scratch) | {f"{name}_columns": None for name in COPIED}
    return replace(found, steps=(before, *copies, main, *after), scratch=scratch)


def copy_of(problem: QuantizedBackwardProblem, name: str) -> Step:
    """The launch that copies q, k or dO."""
    asked, side = problem.forward, "k" if name == "k" else "q"
    job = TransposeProblem(
        dtype=asked.dtype,
        of=name,
        head_dim=getattr(asked, dim_of(name)),
        varlen=asked.varlen,
        used=getattr(asked, f"seqused_{side}"),
    )
    renamed = {
        "rows": name,
        "columns": f"{name}_columns",
        "cu_seqlens": f"cu_seqlens_{side}",
        "seqused": f"seqused_{side}",
        "max_seqlen": f"max_seqlen_{side}",
    }
    return Step(TRANSPOSE, job, TransposeConfig.of(job), tuple(renamed.items()))
