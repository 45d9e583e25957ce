"""What each unit of a GPU allows per KV tile: counts from the emulator, over rates from `rates.py`.

    python -m profiling cycles                          d64, d128, d192_128, d256; every GPU of rates.py;
                                                        gradients on an A100
    python -m profiling cycles --case d128 --gpu H200
    python -m profiling cycles --write                  keep the rows in results/cycles.json and cycles.md

These are bounds, not timings: no latency, no dependency, no memory beyond shared memory, every unit busy all
the time. One cluster of CTAs runs on the emulator over some KV tiles and over twice as many; the difference
is the steady cost of a tile. Matrix FLOP, exponentials, shared memory and barriers are counted there; FP32
and integer issue slots are those of the hot loops' machine code, because the compiler fuses what PTX has
apart. Warps outside these loops (copies, rescaling by warps of their own) take slots that are not counted.
Of gradients, a tile is one of queries: a CTA of the main kernel keeps its keys and walks the queries.

    ceiling   the slowest unit alone: everything overlaps perfectly
    in turn   the tensor cores wait for the rest of the tile, and that for them: nothing overlaps
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

import cute_flash
from cute_flash import emulator, executable
from cute_flash.arch.problem import Operands
from cute_flash.dispatch import Answer
from cute_flash.emulator.checks.counters import BankConflicts
from cute_flash.emulator.execution.launch import Driver
from cute_flash.objectfile import ObjectFileError

from . import flash_attn_4, flash_attn_4_backward, gradients, sass
from .rates import GPUS, PARTITIONS, WARP, Gpu
from .static import CASES, Case, in_words

FORWARD = tuple(f"{dims}{rules}" for rules in ("", "_causal") for dims in ("d64", "d128", "d192_128", "d256"))
BACKWARD = tuple(name for name, case in CASES.items() if case.backward and case.rules == "plain")
DEFAULT = (*FORWARD, *BACKWARD)
# The emulator runs so many KV tiles, and twice as many. Few: after many turns it lets other warps go first,
# and lanes of a warp that then run apart count twice.
TILES = 4

# Kinds of PTX instructions that are counted per warp; the first match wins.
KINDS = {
    "matrix": re.compile(r"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b.*"),
    "mufu": re.compile(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos)\b.*"),
    "fp32": re.compile(r"(add|sub|mul|fma|max|min|selp|setp|abs|neg)\b.*\.f32(x2)?"),
    "conversion": re.compile(r"cvt\b.*(f32|f16|bf16).*"),
    "shuffle": re.compile(r"(shfl|vote|redux|match)\b.*"),
    "barrier": re.compile(r"(bar|barrier)(\.cta)?\.(sync|red|arrive)\b.*|mbarrier\.(try|test)_wait\b.*"),
    "shared": re.compile(r"(ld|st|atom|red)\.(\w+\.)*shared\b.*|(ld|st)matrix\b.*"),
    "reduction": re.compile(r"(red|atom)\.(\w+\.)*global\b.*"),
    "copy": re.compile(r"cp\.(async|reduce\.async)\.(ca|cg|bulk)\b.*"),
    "other": re.compile(r".*"),
}
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")

# Opcodes that the FP32 unit and its neighbour for compares and integers take, by the part before the dot.
FMA = {"FADD": 1, "FMUL": 1, "FFMA": 1, "IMAD": 1, "HFMA2": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}
ALU = {
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "F2FP", "IADD3", "IADD", "VIADD", "LOP3", "SHF", "ISETP", "SEL",
    "LEA", "PRMT", "IMNMX", "VIMNMX", "PLOP3", "IABS",
}  # fmt: skip


class Watch(BankConflicts):
    """Counts what CTAs do: instructions by warp, and shared memory, copies into it included.

    Tensor cores that read it themselves, and bulk copies, are counted without bank conflicts; what the warps
    of a warpgroup read together in a product counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared_bytes = 0
        self.opcodes: list[Counter] = []
        self._read_now: dict[tuple, list[np.ndarray]] = {}

    def begin(self, m: Any) -> None:
        if self.opcodes or math.prod(m.launch.grid) != m.ctas:
            raise ValueError(f"CTAs are watched that run at once; the grid is {m.launch.grid}")
        self.launch, self.ctas = m.launch, m.ctas
        self.opcodes = [Counter() for _ in range(m.warps)]

    def step(self, m: Any, g: Any) -> None:
        self._together()
        for instruction in m.code.steps[m.at].instructions:
            for warp in g.warp_at.tolist():
                self.opcodes[warp][instruction.opcode] += 1

    def copy_issue(self, m: Any, g: Any, copy: Any) -> None:
        self._count(m, g, copy.shared, copy.size)

    def async_read(self, m: Any, unit: Any, cta: int, address: np.ndarray, size: int) -> None:
        self._read_now.setdefault((cta, unit.name, unit.number, size), []).append(np.ravel(address))

    def async_write(self, m: Any, warp: Any, barrier: Any, span: Any) -> None:
        self._in_line(span.size)

    def _together(self) -> None:
        """Count what the last step's units read."""
        for (*_, size), addresses in self._read_now.items():
            self._in_line(size * len(np.unique(np.concatenate(addresses))))
        self._read_now.clear()

    def _in_line(self, size: float) -> None:
        """Bytes that pass 128 at a time."""
        self.shared_bytes += size
        needed, ideal = self.wavefronts.get(-1, (0, 0))
        self.wavefronts[-1] = (needed + size / 128, ideal + size / 128)

    def _count(self, m: Any, g: Any, address: np.ndarray, size: int) -> None:
        self.shared_bytes += size * len(address)
        super()._count(m, g, address, size)

    def totals(self) -> Totals:
        """What was seen so far, per CTA."""
        self._together()
        needed = sum(needed for needed, _ in self.wavefronts.values())
        ideal = sum(ideal for _, ideal in self.wavefronts.values())
        n = self.ctas
        opcodes = tuple(Counter({name: count / n for name, count in w.items()}) for w in self.opcodes)
        return Totals(opcodes, needed / n, ideal / n, self.shared_bytes / n)


@dataclass(frozen=True)
class Totals:
    """Of one CTA. opcodes: per warp, how often each was executed. wavefronts: 128-byte accesses of shared
    memory; ideal: had there been no bank conflicts. shared_bytes: read, written, and copied in."""

    opcodes: tuple[Counter, ...]
    wavefronts: float
    ideal: float
    shared_bytes: float

    def per_tile(self, less: Totals, tiles: int) -> Totals:
        """The steady cost of a tile, where `less` ran `tiles` fewer."""
        pairs = zip(self.opcodes, less.opcodes, strict=True)
        opcodes = tuple(
            Counter({name: (count - before[name]) / tiles for name, count in more.items()})
            for more, before in pairs
        )
        return Totals(
            opcodes,
            (self.wavefronts - less.wavefronts) / tiles,
            (self.ideal - less.ideal) / tiles,
            (self.shared_bytes - less.shared_bytes) / tiles,
        )

    @property
    def roles(self) -> dict[str, tuple[int, Counter]]:
        """Warps that do the same kinds of work: "warps 0-3" -> (how many, counts by kind of all of them)."""
        groups: dict[frozenset[str], list[int]] = {}
        kinds = [by_kind(opcodes) for opcodes in self.opcodes]
        for warp, counts in enumerate(kinds):
            marks = frozenset(k for k in ("matrix", "mufu", "copy") if counts[k])
            groups.setdefault(marks, []).append(warp)
        return {
            f"warps {warps[0]}-{warps[-1]}": (len(warps), sum((kinds[w] for w in warps), Counter()))
            for warps in groups.values()
        }


def by_kind(opcodes: Counter) -> Counter:
    """Counts by KINDS, "flops" of the matrix instructions, and bytes "reduced" in global memory."""
    found: Counter = Counter()
    for opcode, count in opcodes.items():
        kind = next(kind for kind, pattern in KINDS.items() if pattern.fullmatch(opcode))
        found[kind] += count
        if kind == "matrix":
            found["flops"] += count * matrix_flops(opcode)
        if kind == "reduction":
            found["reduced"] += count * gradients.bytes_added(opcode)
    return found


def matrix_flops(opcode: str) -> float:
    """Floating-point operations of a PTX matrix instruction per warp that issues it; wgmma is issued by four.

    0 for tcgen05.mma, whose shape is in a descriptor. Raises ValueError where another's is not in its name.
    """
    shape = _SHAPE.search(opcode)
    if shape is None:
        if opcode.startswith("tcgen05"):
            return 0.0
        raise ValueError(f"{opcode} does not tell its shape")
    return 2 * math.prod(map(int, shape.groups())) / (4 if opcode.startswith("wgmma") else 1)


@dataclass(frozen=True)
class Cost:
    """What one tile asks of the units of an SM. flops: of matrix products, by mma.sync or not.

    mufu, fma, alu: lanes; issue: warp instructions; shared: bytes through the L1 data path, which shared
    memory and spills take; reduced: bytes added to global memory, of which no rate is known.
    """

    flops: float
    mma_sync: bool
    mufu: float
    fma: float
    alu: float
    issue: float
    shared: float
    reduced: float = 0.0

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Clocks that each unit of one SM needs for it."""
        return {
            "matrix": self.flops / (gpu.matrix * (gpu.mma_sync if self.mma_sync else 1.0)),
            "mufu": self.mufu / gpu.mufu,
            "fma": self.fma / gpu.fma,
            "alu": self.alu / gpu.alu,
            "issue": self.issue / PARTITIONS,
            "shared": self.shared / gpu.shared,
        }

    def ceilings(self, gpu: Gpu) -> tuple[str, float, float]:
        """The unit that binds, and TFLOP/s: its own, and where tensor cores and the rest take turns."""
        cycles = self.cycles(gpu)
        binds = max(cycles, key=lambda unit: cycles[unit])
        rest = max(clocks for unit, clocks in cycles.items() if unit != "matrix")
        tera = self.flops * gpu.sms * gpu.clock / 1e12
        return binds, tera / cycles[binds], tera / (cycles["matrix"] + rest)


@dataclass(frozen=True)
class Tile:
    """One tile of one CTA of a kernel: tile_m rows, tile_n keys.

    flops: by the algorithm. From machine code: fma, alu: lanes; issue: warp instructions; local: bytes of
    spills.
    """

    kernel: str
    tile_m: int
    tile_n: int
    totals: Totals
    flops: float
    fma: float
    alu: float
    issue: float
    local: float

    @property
    def kinds(self) -> Counter:
        """PTX instructions by kind, and matrix FLOP where they tell it, of all warps."""
        return sum((counts for _, counts in self.totals.roles.values()), Counter())

    @property
    def cost(self) -> Cost:
        """What it asks of an SM's units; matrix FLOP with the kernel's padding, where instructions tell."""
        kinds, opcodes = self.kinds, {name for warp in self.totals.opcodes for name in warp}
        return Cost(
            flops=kinds["flops"] or self.flops,
            mma_sync=any(name.startswith("mma.sync") for name in opcodes),
            mufu=kinds["mufu"] * WARP,
            fma=self.fma,
            alu=self.alu,
            issue=self.issue,
            shared=self.totals.wavefronts * 128 + self.local,
            reduced=kinds["reduced"],
        )


def ours(case: Case, answer: Answer, arch: str) -> Tile:
    """A tile of a kernel that serves a case. Raises NotImplementedError, or an EmulatorError."""
    if not answer:
        raise NotImplementedError(str(answer))
    config, make = answer.config, gradients.operands if case.backward else _operands
    run = executable.executable(answer.kernel, answer.problem, config, answer.device, "emulator")

    def watched(tiles: int) -> Watch:
        operands = make(answer, case.dims, tiles)
        watch = Watch()
        with cute_flash.emulated(arch, observers=(watch,)):
            run(*operands)
        if watch.launch.shared_memory != config.shared_memory(answer.problem):
            raise ValueError(f"launched with {watch.launch.shared_memory} bytes, not as {config} says")
        return watch

    cubin = executable.artifact(answer.kernel, answer.problem, config, answer.device).cubin
    few, many = watched(TILES), watched(2 * TILES)
    shape = (config.tile_m // few.ctas, config.tile_n)
    return tile(answer.kernel.name, shape, case, many.totals().per_tile(few.totals(), TILES), loops_of(cubin))


def _operands(answer: Answer, dims: tuple[int, int], tiles: int) -> Operands:
    """Of our kernel, for one tile of rows that sees `tiles` tiles of keys. Random normal."""
    config, (dim, dim_v) = answer.config, dims
    generator = torch.Generator().manual_seed(0)
    keys = tiles * config.tile_n
    shapes = ((config.tile_m, dim), (keys, dim), (keys, dim_v), (config.tile_m, dim_v))
    q, k, v, out = (torch.randn(1, n, 1, d, generator=generator).bfloat16() for n, d in shapes)
    absent = dict.fromkeys(Operands._fields)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": torch.empty(1, 1, config.tile_m)}
    given |= {"softmax_scale": dim**-0.5, "multiprocessors": answer.device.multiprocessors}
    return Operands(**absent | given)


def peers(case: Case, target: str) -> Tile:
    """A tile of the peer's kernel. Raises flash_attn_4.Missing, or an EmulatorError."""
    module = flash_attn_4_backward if case.backward else flash_attn_4
    peer = module.compiled(case.peer(), target)
    rows, tile_n = peer.kernel.tile
    driver = Driver(emulator.Program(peer.kernel.ptx), flash_attn_4.LARGEST_SHARED_MEMORY)

    def lengths(tiles: int) -> tuple[int, int]:
        return (tiles * rows, tile_n) if case.backward else (rows, tiles * tile_n)

    def watched(tiles: int) -> Watch:
        operands = module.tensors_of(peer.kernel.case, *lengths(tiles))
        watch = Watch()
        # It reads rows of Q's tile that it never filled, and drops the results.
        options = emulator.Options(observers=(watch,), uninitialized="poison")
        flash_attn_4.call(peer.kernel, driver, driver.symbols, operands, options)
        return watch

    few, many = watched(TILES), watched(2 * TILES)
    steady = many.totals().per_tile(few.totals(), TILES)
    return tile(peer_name(), (rows // few.ctas, tile_n), case, steady, loops_of(peer.cubin))


def peer_name() -> str:
    """The peer and its version. Raises flash_attn_4.Missing."""
    return f"{flash_attn_4.NAME} {flash_attn_4.version()}"


def loops_of(cubin: bytes) -> tuple[sass.Loop, ...]:
    """The hot loops of a kernel."""
    return sass.hot_loops(sass.disassembly(cubin))


def tile(
    kernel: str, shape: tuple[int, int], case: Case, steady: Totals, loops: tuple[sass.Loop, ...]
) -> Tile:
    """Emulator and machine code put together: each hot loop counts as often as one KV tile takes.

    Raises ValueError where the two disagree on the exponentials per matrix FLOP: the loop is not the steady
    one.
    """
    kinds = sum((counts for _, counts in steady.roles.values()), Counter())
    times = [_times(loop, kinds) for loop in loops]
    exponentials = sum(loop.counts["mufu"] * n for loop, n in zip(loops, times, strict=True))
    if not math.isclose(exponentials, kinds["mufu"], rel_tol=0.02):
        raise ValueError(
            f"{kernel}: the hot loops have {exponentials:.0f} exponentials per KV tile, the emulator counts "
            f"{kinds['mufu']:.0f}"
        )
    slots: Counter = Counter()
    for loop, n in zip(loops, times, strict=True):
        names = [opcode.partition(".")[0] for opcode in loop.opcodes]
        slots["fma"] += WARP * n * sum(FMA.get(name, 0) for name in names)
        slots["alu"] += WARP * n * sum(name in ALU for name in names)
        slots["local"] += WARP * n * sum(map(sass.local_bytes, loop.opcodes))
        slots["issue"] += n * loop.size
    (dim, dim_v), times = case.dims, (3, 2) if case.backward else (1, 1)
    flops = 2 * math.prod(shape) * (times[0] * dim + times[1] * dim_v)
    return Tile(kernel, *shape, steady, flops, slots["fma"], slots["alu"], slots["issue"], slots["local"])


def _times(loop: sass.Loop, kinds: Counter) -> float:
    """How often warps pass through a loop per KV tile, by what of it the emulator counts, too."""
    if loop.flops:
        return kinds["flops"] / loop.flops
    kind = "mufu" if loop.counts["mufu"] else "matrix"
    return kinds[kind] / loop.counts["mma" if kind == "matrix" else kind]


@dataclass(frozen=True)
class Row:
    """One kernel on one target. roles: warps that do the same work -> instructions and matrix FLOP by kind.

    wavefronts: 128-byte accesses of shared memory per KV tile; ideal: had there been no bank conflicts.
    """

    case: str
    target: str
    kernel: str
    config: str
    tile: tuple[int, int]
    cost: Cost
    roles: dict[str, dict[str, float]]
    wavefronts: float
    ideal: float
    barriers: float
    local: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> Row:
        """From what JSON makes of it."""
        return cls(**row | {"tile": tuple(row["tile"]), "cost": Cost(**row["cost"])})


@dataclass(frozen=True)
class NotYet:
    """A kernel that could not be counted, and why."""

    case: str
    target: str
    kernel: str
    reason: str


def row(what: NotYet, config: str, found: Tile) -> Row:
    """What is kept of a tile."""
    totals = found.totals
    roles = {
        role: {"warps": warps} | {name: round(counts[name], 2) for name in ("flops", *KINDS) if counts[name]}
        for role, (warps, counts) in totals.roles.items()
    }
    cost = Cost(**{k: v if isinstance(v, bool) else round(v, 2) for k, v in asdict(found.cost).items()})
    return Row(
        what.case, what.target, found.kernel, config, (found.tile_m, found.tile_n), cost, roles,
        wavefronts=round(totals.wavefronts, 2),
        ideal=round(totals.ideal, 2),
        barriers=round(found.kinds["barrier"] / len(totals.opcodes), 2),
        local=round(found.local, 2),
    )


def survey(cases: Iterable[str], gpus: Iterable[str], peer: bool) -> Iterator[Row | NotYet]:
    """Every kernel of ours and the peer's, for each case and each target of these GPUs."""
    for target, gpu in {GPUS[name].device.target: GPUS[name] for name in gpus}.items():
        for case in (CASES[name] for name in cases if CASES[name].is_on(gpu.arch)):
            for answer in case.with_products(gpu.device):
                name = answer.kernel.name if answer else "cute_flash"
                config = in_words(answer.config) if answer else ""
                make = functools.partial(ours, case, answer, gpu.arch)
                yield counted(NotYet(case.name, target, name, ""), config, make)
            if peer:
                make = functools.partial(peers, case, target)
                yield counted(NotYet(case.name, target, flash_attn_4.NAME, ""), "", make)


def counted(what: NotYet, config: str, make: Callable[[], Tile]) -> Row | NotYet:
    """The row of a kernel; or `what`, with the reason why it cannot be counted."""
    try:
        return row(what, config, make())
    except (emulator.UnmodelledInstruction, emulator.ParseError, ObjectFileError) as error:
        return replace(what, reason=f"not yet: the emulator cannot run it ({str(error).splitlines()[0]})")
    except emulator.EmulatorError as error:
        return replace(what, reason=f"stopped by the emulator: {str(error).splitlines()[0]}")
    except flash_attn_4.Missing as error:
        return replace(what, reason=f"missing, {error}")
    except NotImplementedError as error:
        return replace(what, reason=" ".join(str(error).split()))
