"""How the gradients' kernel works: what its tuning (tuning.py) decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...backward import BackwardProblem
from ...common.regions import Region, Regions
from ...precision import Precision

ROWS = 64  # of a warpgroup's product: its keys, or its rows of dQ
THREADS = 128  # of a warpgroup
REGISTERS = 65536  # of a multiprocessor
SPARE_REGISTERS = 40  # per thread, for what is no accumulator and no operand: cubins show that no row spills
DRAWN = 32  # keys that dropout draws numbers for together: see common/dropout.py
ALIGNMENT = 1024  # bytes that barriers and the alignment of tiles may take besides


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the main kernel works on a problem: what both ways have.

    tile_m: rows of Q and dO at a time. columns, columns_v: of tiles of Q and K, and of dO and V.
    warpgroups: that multiply. overlap: dP's product runs beside the exponentials, else after them: its
    registers are free for what rules compute. producer_registers, consumer_registers: per thread.

    ValueError for more registers than there are.
    """

    tile_m: int
    columns: int
    columns_v: int
    warpgroups: int = 2
    overlap: bool = True
    producer_registers: int = 24
    consumer_registers: int = 240

    def __post_init__(self) -> None:
        taken = max(self.registers().values())
        if taken + self.spare_registers > self.consumer_registers:
            raise ValueError(
                f"{self}: {self.registers()} leave fewer than {self.spare_registers} registers"
            )
        together = self.producer_registers + self.warpgroups * self.consumer_registers
        if together > self.launch_registers * (self.warpgroups + 1):
            raise ValueError(f"{self}: {together} registers, a thread of each warpgroup, are not launched")

    @property
    def cta_keys(self) -> int:
        """Keys of a CTA."""
        return self.keys * self.warpgroups

    @property
    def tile_n(self) -> int:
        """Keys whose part of dQ is summed before it leaves: of a CTA, or of a pair."""
        return self.cta_keys * self.ctas

    @property
    def peer_columns(self) -> int:
        """Columns of dQ, and so of the other's K, that a CTA of a pair has."""
        return self.part_columns * self.warpgroups

    @property
    def threads(self) -> int:
        return THREADS * (self.warpgroups + 1)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor has for them, in steps of 8."""
        return REGISTERS // self.threads // 8 * 8

    def regions(self, precision: Precision) -> Regions:
        """Shared memory in bytes; a place of dK, dV and of dQ is one warpgroup's."""
        groups, tiles, keys = self.warpgroups, self.k_tiles, self.cta_keys // self.k_tiles
        k, v, q, out, ds, grad_k, grad_v = (
            precision.nbytes(rows * columns)
            for rows, columns in (
                (keys, self.columns), (keys, self.columns_v), (self.tile_m, self.columns),
                (self.tile_m, self.columns_v), (keys, self.tile_m), (self.cta_keys // tiles, self.columns),
                (self.cta_keys // tiles, self.columns_v),
            )
        )
        peer_k = k * self.peer_columns // self.columns
        of_peer = (
            Region(name="peer_k", size=peer_k, count=tiles, filled="load", read="dq"),
            Region(name="peer_ds", size=ds, count=tiles, filled="ds", read="dq"),
        )
        handed = 4 * ROWS * self.handed_columns
        shared_p = Region(name="p", size=ds, count=tiles * self.p_stages, filled="p", read="dv")
        return Regions(
            regions=(
                Region(name="k", size=k, count=tiles, filled="load", read="dq"),
                Region(name="v", size=v, count=tiles, filled="load", read="dp"),
                Region(name="q", size=q, count=self.q_stages, filled="load", read="dk"),
                Region(name="grad_out", size=out, count=self.grad_out_stages, filled="load", read="dv"),
                *((shared_p,) if self.p_stages else ()),
                *(of_peer if self.ctas > 1 else ()),
                Region(name="ds", size=ds, count=tiles * self.ds_stages, filled="ds", read="dq"),
                Region(name="grad_q", size=handed, count=groups, filled="dq", read="store"),
                Region(name="lse", size=4 * self.tile_m, count=self.q_stages, filled="load", read="s"),
                Region(
                    name="delta", size=4 * self.tile_m, count=self.grad_out_stages, filled="load", read="ds"
                ),
                Region(name="grad_k", size=grad_k, count=tiles, filled="end", read="end", over="k"),
                Region(name="grad_v", size=grad_v, count=tiles, filled="end", read="end", over="v"),
            ),
            steps=("load", "s", "p", "dp", "ds", "dv", "dq", "dk", "store", "end"),
            unit="bytes of shared memory",
        )

    def shared_memory(self, problem: BackwardProblem) -> int:
        """Bytes of dynamic shared memory."""
        return self.regions(problem.forward.precision).used + ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class Config(Tiling):
    """A warpgroup has 64 keys, which are the rows of its products: P^T and dS^T are operands in registers.

    stages: tiles of Q, and of dO, in shared memory. dS has two places, so that its barrier is the only one of
    a visit.

    ValueError also where dQ cannot be shared out.
    """

    stages: int = 2
    keys: ClassVar[int] = ROWS
    p_stages: ClassVar[int] = 0
    ds_stages: ClassVar[int] = 2
    ctas: ClassVar[int] = 1
    spare_registers: ClassVar[int] = SPARE_REGISTERS

    def __post_init__(self) -> None:
        rows = ROWS * self.warpgroups if self.rows_apart else ROWS
        if self.tile_m != rows or self.part_columns % 16:
            raise ValueError(f"{self}: {self.warpgroups} warpgroups cannot share out dQ")
        super().__post_init__()

    @property
    def k_tiles(self) -> int:
        """Tiles of K and V: one for each warpgroup."""
        return self.warpgroups

    @property
    def q_stages(self) -> int:
        return self.stages

    @property
    def grad_out_stages(self) -> int:
        return self.stages

    @property
    def rows_apart(self) -> bool:
        """Whether warpgroups share out the rows of dQ, otherwise its columns."""
        return self.tile_m > ROWS

    @property
    def part_columns(self) -> int:
        """Columns of dQ that a warpgroup has."""
        return self.columns if self.rows_apart else self.columns // self.warpgroups

    @property
    def handed_columns(self) -> int:
        """All of them at a time."""
        return self.part_columns

    def registers(self) -> dict[str, int]:
        """What products and their operands take of a thread's registers, in the steps that take most."""
        sums = (self.columns + self.columns_v) // 2
        return {
            "S and dP": sums + 2 * (self.tile_m // 2),
            "dV, dQ and dK": sums + 2 * (self.tile_m // 4) + self.part_columns // 2,
        }


@dataclass(frozen=True, kw_only=True)
class WideConfig(Tiling):
    """A warpgroup has `keys` keys, columns of its products, whose 64 rows are a tile's of Q, or columns of dK
    and dV: so P and dS are operands in shared memory.

    keys: a multiple of 8. slice_columns: of dQ in one product of a warpgroup. handed_columns: of dQ, handed
    to the store role at a time. q_stages, grad_out_stages: tiles of Q, and of dO, in shared memory.

    ValueError also for keys or columns that products or other steps do not divide.
    """

    tile_m: int = ROWS
    keys: int
    slice_columns: int
    handed_columns: int
    q_stages: int = 2
    grad_out_stages: int = 1
    k_tiles: ClassVar[int] = 1
    p_stages: ClassVar[int] = 1
    ds_stages: ClassVar[int] = 1
    rows_apart: ClassVar[bool] = False
    ctas: ClassVar[int] = 1
    spare_registers: ClassVar[int] = SPARE_REGISTERS

    def __post_init__(self) -> None:
        divided = (
            (self.keys, 8), (self.cta_keys, 16), (self.columns, ROWS), (self.columns_v, ROWS),
            (self.part_columns, self.slice_columns), (self.slice_columns, self.handed_columns),
        )  # fmt: skip
        for size, step in divided:
            if size % step:
                raise ValueError(f"{self}: {size} is no multiple of {step}")
        super().__post_init__()

    @property
    def part_columns(self) -> int:
        """Columns of dQ that a warpgroup has."""
        return self.columns // (self.warpgroups * self.ctas)

    def registers(self) -> dict[str, int]:
        """As `Config.registers`."""
        sums = (self.columns + self.columns_v) * self.keys // THREADS
        return {
            "S and dP": sums + 2 * (self.keys // 2),
            "dV, dQ and dK": sums + self.slice_columns // 2,
        }


@dataclass(frozen=True, kw_only=True)
class PairConfig(WideConfig):
    """The same for two CTAs, each with keys of its own and half of the columns of dQ.

    They exchange dS, and each has so many columns of the other's K besides: so 4 * tile_m * columns bytes of
    dQ leave for the keys of both. A visit ends with dQ, for which the other's dS has the time of dK to come.
    """

    q_stages: int = 1
    ctas: ClassVar[int] = 2
