"""Tile sizes of Hopper's backward kernel: a table, read top to bottom; the first row that serves is taken.

What a row rests on is worked out and checked when it is made. For a thread of a warpgroup, which has 64 keys:

    S, dP               tile_m / 2 registers each
    P, dS as operands   tile_m / 4 each
    dK, dV              columns / 2, columns_v / 2
    dQ                  32: 64 x 64 of it, whichever way it is shared out

and everything else, addresses and rules' values, lives in what is left of consumer_registers. Every query
tile that passes adds 4 * tile_m * columns bytes of dQ to global memory, for five products with tile_n keys:
tile_n is what lowers that, and two warpgroups of 64 keys are what registers allow for dK and dV. No row was
timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...backward import BackwardProblem
from ...common.regions import Region, Regions
from ...precision import Precision
from ...problem import Device, Problem

ROWS = 64  # of a warpgroup's product: its keys, or its rows of dQ
THREADS = 128  # of a warpgroup
DS_STAGES = 2  # places of dS: so that its barrier is the only one of a visit
REGISTERS = 65536  # of a multiprocessor
SPARE_REGISTERS = 40  # per thread, for what is no accumulator and no operand: cubins show that no row spills
ALIGNMENT = 1024  # bytes that barriers and the alignment of tiles may take besides


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the main kernel works on a problem.

    tile_m: rows of Q and dO at a time. columns, columns_v: of tiles of Q and K, and of dO and V.
    warpgroups: that multiply, 64 keys each. stages: tiles of Q, and of dO, in shared memory. overlap: dP's
    product runs beside the exponentials, else after them: its registers are free for what rules compute.
    producer_registers, consumer_registers: per thread.

    ValueError where dQ cannot be shared out, and for more registers than there are.
    """

    tile_m: int
    columns: int
    columns_v: int
    warpgroups: int = 2
    stages: int = 2
    overlap: bool = True
    producer_registers: int = 24
    consumer_registers: int = 240

    def __post_init__(self) -> None:
        if self.tile_m * self.columns != ROWS * ROWS * self.warpgroups:
            raise ValueError(f"{self}: {self.warpgroups} warpgroups cannot have {ROWS} x {ROWS} of dQ each")
        taken = max(self.registers().values())
        if taken + SPARE_REGISTERS > self.consumer_registers:
            raise ValueError(f"{self}: {self.registers()} leave fewer than {SPARE_REGISTERS} registers")
        together = self.producer_registers + self.warpgroups * self.consumer_registers
        if together > self.launch_registers * (self.warpgroups + 1):
            raise ValueError(f"{self}: {together} registers, a thread of each warpgroup, are not launched")

    @property
    def tile_n(self) -> int:
        """Keys of a CTA."""
        return ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        return THREADS * (self.warpgroups + 1)

    @property
    def launch_registers(self) -> int:
        """Registers per thread before `setmaxnreg`: what a multiprocessor has for them, in steps of 8."""
        return REGISTERS // self.threads // 8 * 8

    @property
    def rows_apart(self) -> bool:
        """Whether warpgroups share out the rows of dQ, otherwise its columns."""
        return self.tile_m > ROWS

    def registers(self) -> dict[str, int]:
        """What products and their operands take of a thread's registers, in the steps that take most."""
        sums = (self.columns + self.columns_v) // 2
        return {
            "S and dP": sums + 2 * (self.tile_m // 2),
            "dV, dQ and dK": sums + 2 * (self.tile_m // 4) + ROWS // 2,
        }

    def regions(self, precision: Precision) -> Regions:
        """Shared memory in bytes; a place of K, V, dK, dV and of dQ is one warpgroup's."""
        groups = self.warpgroups
        k, v, q, out, ds = (
            precision.nbytes(rows * columns)
            for rows, columns in (
                (ROWS, self.columns), (ROWS, self.columns_v), (self.tile_m, self.columns),
                (self.tile_m, self.columns_v), (ROWS, self.tile_m),
            )
        )
        return Regions(
            regions=(
                Region(name="k", size=k, count=groups, filled="load", read="dq"),
                Region(name="v", size=v, count=groups, filled="load", read="dp"),
                Region(name="q", size=q, count=self.stages, filled="load", read="dk"),
                Region(name="grad_out", size=out, count=self.stages, filled="load", read="dv"),
                Region(name="ds", size=ds, count=groups * DS_STAGES, filled="ds", read="dq"),
                Region(name="grad_q", size=4 * ROWS * ROWS, count=groups, filled="dq", read="store"),
                Region(name="lse", size=4 * self.tile_m, count=self.stages, filled="load", read="s"),
                Region(name="delta", size=4 * self.tile_m, count=self.stages, filled="load", read="ds"),
                Region(name="grad_k", size=k, count=groups, filled="end", read="end", over="k"),
                Region(name="grad_v", size=v, count=groups, filled="end", read="end", over="v"),
            ),
            steps=("load", "s", "dp", "ds", "dv", "dq", "dk", "store", "end"),
            unit="bytes of shared memory",
        )

    def shared_memory(self, problem: BackwardProblem) -> int:
        """Bytes of dynamic shared memory."""
        return self.regions(problem.forward.precision).used + ALIGNMENT


LIGHT, HEAVY, HEAVIEST = range(3)


def register_pressure(problem: Problem) -> int:
    """LIGHT: no arithmetic per score beyond the scale and a comparison or two. HEAVIEST: with dropout."""
    light_mask = problem.mask is None or problem.mask.is_light()
    if light_mask and not problem.score:
        return HEAVY if problem.dropout else LIGHT
    return HEAVIEST if problem.dropout else HEAVY


@dataclass(frozen=True, kw_only=True)
class Row:
    """A config for head dims up to `head_dim` of Q and K, `head_dim_v` of V.

    pressure: the highest `register_pressure` of a problem that leaves it registers enough.
    """

    head_dim: int
    head_dim_v: int
    pressure: int
    config: Config
    why: str


BACKWARD = (
    Row(
        head_dim=64, head_dim_v=64, pressure=LIGHT, config=Config(tile_m=128, columns=64, columns_v=64),
        why="FlashAttention-3's tile: S and dP take 128 registers, dK and dV 64",
    ),
    Row(
        head_dim=128, head_dim_v=64, pressure=HEAVIEST, config=Config(tile_m=64, columns=128, columns_v=64),
        why="128 rows would take 224 registers; also for 64 columns and a score's slopes, with which they "
        "spill: dQ and dK are padded to 128 columns then, 2 of 7 parts of the work",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVY, config=Config(tile_m=64, columns=128, columns_v=128),
        why="FlashAttention-3's tile for masks: S and dP take 64 registers, dK and dV 128",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVIEST,
        config=Config(tile_m=64, columns=128, columns_v=128, overlap=False),
        why="beside dP a score and dropout spill 24 registers",
    ),
)  # fmt: skip


def main_config(problem: BackwardProblem, device: Device) -> Config | None:
    """The first row that fits and divides the blocks of a block mask, or None."""
    fitting = fitting_configs(problem, device)
    return next((c for c in fitting if problem.forward.takes_tiles(c.tile_m, c.tile_n)), None)


def fitting_configs(problem: BackwardProblem, device: Device) -> Iterator[Config]:
    """Of rows that the device has room for, block mask aside."""
    asked, pressure = problem.forward, register_pressure(problem.forward)
    for row in BACKWARD:
        reaches = asked.head_dim <= row.head_dim and asked.head_dim_v <= row.head_dim_v
        if reaches and pressure <= row.pressure and row.config.shared_memory(problem) <= device.shared_memory:
            yield row.config
