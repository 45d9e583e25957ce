"""Tile sizes of Hopper's backward kernel: a table, read top to bottom; the first row that serves is taken.

There are two ways to share out the work, the second for a CTA alone and for a pair. What a row rests on is
worked out and checked when it is made. For a thread of a warpgroup, which has `keys` of the CTA's keys and
64 x part_columns of dQ:

                        Config          WideConfig
    S, dP               tile_m / 2      keys / 2                registers each
    P, dS as operands   tile_m / 4      in shared memory        each
    dK                  columns / 2     columns * keys / 128    dV likewise, of columns_v
    dQ                  part_columns/2  slice_columns / 2       of part_columns / 2, in turn

and everything else, addresses and rules' values, lives in what is left of consumer_registers. Every query
tile that passes adds 4 * tile_m * columns bytes of dQ to global memory, for five products with tile_n keys:
tile_n is what lowers that, and a pair doubles it. Up to 128 columns two warpgroups of 64 keys leave room for
dK and dV; beyond, a warpgroup has as many keys, in steps of 8, as registers allow. No row was timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...backward import BackwardProblem
from ...common.regions import Region, Regions
from ...precision import Precision
from ...problem import Device, Problem
from ...tuning import GradientTable

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
    config: Tiling
    why: str


BACKWARD = (
    Row(
        head_dim=32, head_dim_v=32, pressure=LIGHT, config=Config(tile_m=128, columns=32, columns_v=32),
        why="the next row's, of whose columns half would be padding",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=LIGHT, config=Config(tile_m=128, columns=64, columns_v=64),
        why="FlashAttention-3's tile: S and dP take 128 registers, dK and dV 64",
    ),
    Row(
        head_dim=64, head_dim_v=64, pressure=HEAVIEST, config=Config(tile_m=64, columns=64, columns_v=64),
        why="128 rows and a score's slopes spill",
    ),
    Row(
        head_dim=96, head_dim_v=96, pressure=HEAVIEST,
        config=Config(tile_m=64, columns=96, columns_v=96, producer_registers=40, consumer_registers=232),
        why="FlashAttention-3's tile: S and dP take 64 registers, dK and dV 96; 128 rows would take 224. In "
        "turns, with 24 registers for the store role and 240, 8 bytes are spilled",
    ),
    Row(
        head_dim=128, head_dim_v=64, pressure=HEAVIEST, config=Config(tile_m=64, columns=128, columns_v=64),
        why="the same registers",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=LIGHT, config=Config(tile_m=64, columns=128, columns_v=128),
        why="FlashAttention-3's tile for masks: S and dP take 64 registers, dK and dV 128. For a pair's dQ, "
        "32 columns of a warpgroup, more of dS would be read than fewer bytes of dQ save",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVIEST,
        config=Config(tile_m=64, columns=128, columns_v=128, overlap=False),
        why="beside dP a mask by documents spills 16 bytes, a score and dropout 24 registers",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=LIGHT,
        config=PairConfig(
            columns=192, columns_v=128, keys=56, slice_columns=48, handed_columns=48, q_stages=2
        ),
        why="dK and dV take 140 registers, S and dP 56; for 128 keys all would take 224",
    ),
    Row(
        head_dim=192, head_dim_v=128, pressure=HEAVY,
        config=PairConfig(
            columns=192, columns_v=128, keys=56, slice_columns=48, handed_columns=48, q_stages=2,
            overlap=False,
        ),
        why="the same keys; beside dP a score spills 24 bytes",
    ),
    Row(
        head_dim=128, head_dim_v=256, pressure=HEAVY,
        config=WideConfig(columns=128, columns_v=256, keys=48, slice_columns=64, handed_columns=64),
        why="dK and dV take 144 registers, S and dP 48. For a pair's dQ, 32 columns of a warpgroup, more of "
        "dS would be read than fewer bytes of dQ save",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVY,
        config=PairConfig(
            columns=192, columns_v=192, keys=48, slice_columns=48, handed_columns=48, q_stages=2
        ),
        why="dK and dV take 144 registers, S and dP 48",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=LIGHT,
        config=PairConfig(columns=256, columns_v=256, keys=40, slice_columns=64, handed_columns=32),
        why="dK and dV take 160 registers, S and dP 40; beside the other's K and dS there is room for one "
        "tile of Q",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVY,
        config=PairConfig(
            columns=256, columns_v=256, keys=40, slice_columns=64, handed_columns=32, overlap=False
        ),
        why="the same keys; beside dP a score spills 24 bytes",
    ),
    Row(
        head_dim=128, head_dim_v=128, pressure=HEAVIEST,
        config=WideConfig(
            columns=128, columns_v=128, keys=32, slice_columns=64, handed_columns=64, grad_out_stages=2
        ),
        why="for blocks of 64 keys",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVIEST,
        config=PairConfig(
            columns=192, columns_v=192, keys=32, slice_columns=48, handed_columns=48, q_stages=2,
            grad_out_stages=2,
        ),
        why="for dropout, which draws numbers for 32 keys together, and for blocks of 128 keys",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVIEST,
        config=PairConfig(
            columns=256, columns_v=256, keys=32, slice_columns=64, handed_columns=32, q_stages=2
        ),
        why="likewise",
    ),
    Row(
        head_dim=192, head_dim_v=192, pressure=HEAVIEST,
        config=WideConfig(columns=192, columns_v=192, keys=32, slice_columns=96, handed_columns=96),
        why="for blocks of 64 keys",
    ),
    Row(
        head_dim=256, head_dim_v=256, pressure=HEAVIEST,
        config=WideConfig(columns=256, columns_v=256, keys=32, slice_columns=128, handed_columns=64),
        why="likewise",
    ),
)  # fmt: skip


def serves(row: Row, problem: BackwardProblem, device: Device) -> bool:
    """Whether a row is for these head dims, its warpgroups have keys as dropout draws them, and registers
    are enough.
    """
    asked, config = problem.forward, row.config
    reaches = asked.head_dim <= row.head_dim and asked.head_dim_v <= row.head_dim_v
    drawn = not asked.dropout or config.keys % DRAWN == 0
    return reaches and drawn and register_pressure(asked) <= row.pressure


TABLE = GradientTable(rows=BACKWARD, serves=serves, ctas=lambda config: config.ctas)
