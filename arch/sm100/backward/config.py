"""How the gradients' kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass

from ...backward import BackwardProblem, scratch_columns
from ...common.regions import Region, Regions
from ...precision import Precision
from ...problem import Problem

ROWS = 128  # lanes of tensor memory, and so rows of an accumulator; or half as many
WARPGROUPS = 2  # that compute, half of the rows of Q each
THREADS = 128  # of a warpgroup
REGISTERS = 512  # of four threads, one of each warpgroup
NUMBERS = 2  # places of LSE and D
CHUNK = 32  # columns or rows that are in registers at a time
OF_PAIRS = ("q_columns", "k_columns", "out_columns")  # half of the columns: what a pair's CTAs have besides
ROWS_OF = {"q_columns": "q", "out_columns": "grad_out"}  # where columns come that have no place of their own
KEYS = ("k", "v", "k_columns")  # what comes once, of keys
ALIGNMENT = 1024  # bytes that barriers and the alignment of tiles may take


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the main kernel works on a problem.

    tile_m: rows of Q and dO at a time. tile_n: keys that visit the same of them: of a CTA, or of both of a
    pair. Of a CTA both are 64 or 128. ctas: 1, or 2 for a pair that multiplies together: see `pair`.
    q_stages, out_stages: tiles of Q, and of dO, in shared memory. chunk: columns of dQ, and of sums of dK and
    dV, that leave at a time; of dQ of 64 rows twice as many. sums: places of such columns of dQ, on their
    way. p_apart: P has columns of tensor memory of its own, otherwise S's. at_once: the store role takes all
    columns of dQ that there are into registers, otherwise `chunk`. store_registers, compute_registers,
    other_registers: per thread.

    shared_weights: P and dS are multiplied out of shared memory, not out of tensor memory.

    ValueError for registers that are not launched.
    """

    shared_weights = False


    tile_m: int = ROWS
    tile_n: int = ROWS
    q_stages: int = 2
    out_stages: int = 2
    chunk: int = 32
    sums: int = 2
    ctas: int = 1
    p_apart: bool = False
    at_once: bool = False
    store_registers: int
    compute_registers: int
    other_registers: int

    def __post_init__(self) -> None:
        together = self.store_registers + WARPGROUPS * self.compute_registers + self.other_registers
        if together > REGISTERS:
            raise ValueError(f"{self}: {together} registers, a thread of each warpgroup, are not launched")

    @property
    def paired(self) -> bool:
        return self.ctas > 1

    def ds_precision(self, problem: Problem) -> Precision:
        """Of dS where it is multiplied."""
        return problem.precision

    @property
    def moved(self) -> tuple[str, ...]:
        """What is loaded through channels, and comes to places of its own."""
        return ("k", "v", "q", "grad_out", *(OF_PAIRS if self.paired else ()))

    def channel(self, name: str) -> str:
        """What something comes through: a channel of its own, or that of the place it comes to."""
        return ROWS_OF[name] if name in ROWS_OF and name not in self.moved else name

    @property
    def s_emptied(self) -> bool:
        """Whether who reads S tells when: something else than P comes there."""
        return self.p_apart or self.paired

    @property
    def cta_keys(self) -> int:
        """Keys of a CTA."""
        return self.tile_n // self.ctas

    @property
    def ds_keys(self) -> int:
        """Keys of dS in shared memory: a pair's, and once more a CTA's own."""
        return self.tile_n + self.cta_keys * (self.ctas - 1)

    @property
    def cta_rows(self) -> int:
        """Rows of dQ of a CTA, which are a tile of its sums."""
        return self.tile_m // self.ctas

    @property
    def threads(self) -> int:
        """The store role's, those that compute, and those of mma and load."""
        return THREADS * (WARPGROUPS + 2)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`."""
        return REGISTERS // (WARPGROUPS + 2)

    def of_pairs(self, sizes: dict[str, int]) -> tuple[Region, ...]:
        """What a pair's CTAs have besides. sizes: in bytes."""
        return (
            Region(name="k_columns", size=sizes["k"], filled="load", read="dq"),
            Region(name="q_columns", size=sizes["q"], filled="load", read="dk"),
            Region(name="out_columns", size=sizes["grad_out"], filled="load", read="dv"),
            Region(name="peer_ds", size=sizes["ds"] // 2, filled="ds", read="dq"),
        )

    def regions(self, problem: Problem) -> Regions:
        """Shared memory in bytes."""
        columns, nbytes = columns_of(problem), problem.precision.nbytes
        k, v = (nbytes(self.cta_keys * count) for count in columns)
        q, grad_out = (nbytes(self.cta_rows * count) for count in columns)
        ds, numbers = nbytes(self.tile_m * self.cta_keys), 4 * self.tile_m
        sums, shared_sums = 4 * ROWS * self.chunk, 4 * self.cta_keys * self.chunk
        q_read, out_read = ("s", "dp") if self.paired else ("dk", "dv")
        of_pairs = self.of_pairs({"k": k, "q": q, "grad_out": grad_out, "ds": ds})
        return Regions(
            regions=(
                Region(name="k", size=k, filled="load", read="dq"),
                Region(name="v", size=v, filled="load", read="dp"),
                Region(name="q", size=q, count=self.q_stages, filled="load", read=q_read),
                Region(name="grad_out", size=grad_out, count=self.out_stages, filled="load", read=out_read),
                Region(name="ds", size=ds // 2, count=2, filled="ds", read="dq"),
                Region(name="sums", size=sums, count=self.sums, filled="store", read="store"),
                Region(name="lse", size=numbers, count=NUMBERS, filled="load", read="p"),
                Region(name="delta", size=numbers, count=NUMBERS, filled="load", read="ds"),
                Region(name="grad_k", size=k, filled="end", read="end", over="k"),
                Region(name="grad_v", size=v, filled="end", read="end", over="v"),
                Region(
                    name="shared_sums", size=shared_sums, count=WARPGROUPS, filled="end", read="end",
                    over="ds",
                ),
                *(of_pairs if self.paired else ()),
            ),
            steps=("load", "s", "dp", "p", "dv", "ds", "dk", "dq", "store", "end"),
            unit="bytes of shared memory",
        )  # fmt: skip

    def shared_memory(self, problem: BackwardProblem) -> int:
        """Bytes of dynamic shared memory."""
        return self.regions(problem.forward).used + ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class SerialConfig(Config):
    """A pair that has Q and dO in one form at a time, and S and dP in the same columns: see `serial`.

    dQ comes in two fillings: two thirds of it and the rest.
    """

    @property
    def moved(self) -> tuple[str, ...]:
        return ("k", "v", "q", "grad_out", "k_columns")

    def of_pairs(self, sizes: dict[str, int]) -> tuple[Region, ...]:
        """The columns of Q and dO come to the places of their rows."""
        return (
            Region(name="k_columns", size=sizes["k"], filled="load", read="dq"),
            Region(name="q_columns", size=sizes["q"], filled="s", read="dk", over="q"),
            Region(name="out_columns", size=sizes["grad_out"], filled="dp", read="dv", over="grad_out"),
            Region(name="peer_ds", size=sizes["ds"] // 2, filled="ds", read="dq"),
        )


@dataclass(frozen=True, kw_only=True)
class WideConfig(SerialConfig):
    """A pair that has 64 keys in each CTA, for wide heads: see `wide`."""

    shared_weights = True

    @property
    def ds_keys(self) -> int:
        return self.tile_n

    def of_pairs(self, sizes: dict[str, int]) -> tuple[Region, ...]:
        """P besides, and the CTA's own rows of dS once more."""
        return (
            *super().of_pairs(sizes),
            Region(name="p", size=sizes["ds"], filled="p", read="dv"),
            Region(name="own_ds", size=sizes["ds"] // 2, filled="ds", read="dq"),
        )


def columns_of(problem: Problem) -> tuple[int, int]:
    """Columns of tiles of Q and K, and of dO and V: those of their gradients' sums."""
    return scratch_columns(problem.head_dim), scratch_columns(problem.head_dim_v)
