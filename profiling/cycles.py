"""What each unit of a GPU allows per KV tile: counts from the emulator, over rates from `rates.py`.

    python -m profiling cycles                          d64, d128, d256 on A100, H100/H200, B200, GB300
    python -m profiling cycles --case d128 --gpu H200

These are bounds, not timings: no latency, no dependency, no memory beyond shared memory, every unit busy all
the time. One CTA runs on the emulator over some KV tiles and over twice as many; the difference is the steady
cost of a tile. Matrix FLOP, exponentials, shared memory and barriers are counted there; FP32 and integer
issue slots are those of the hot loop's machine code, because the compiler fuses what PTX has apart.

    ceiling   the slowest unit alone: everything overlaps perfectly
    in turn   the tensor cores wait for the rest of the tile, and that for them: nothing overlaps
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cute_flash
from cute_flash import emulator, executable
from cute_flash.arch.problem import Operands
from cute_flash.dispatch import EMULATED
from cute_flash.emulator.launch import Driver
from cute_flash.emulator.observe import BankConflicts

from . import flash_attn_4, record, sass
from .rates import GPUS, PARTITIONS, WARP, Gpu
from .static import CASES, Case

RESULTS = Path(__file__).resolve().parent / "results"
TILES = 8  # the emulator runs so many KV tiles, and twice as many

# Kinds of PTX instructions that are counted per warp; the first match wins.
KINDS = {
    "matrix": re.compile(r"(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b.*"),
    "mufu": re.compile(r"(ex2|lg2|rcp|rsqrt|sqrt|tanh|sin|cos)\b.*"),
    "fp32": re.compile(r"(add|sub|mul|fma|max|min|selp|setp|abs|neg)\b.*\.f32(x2)?"),
    "conversion": re.compile(r"cvt\b.*(f32|f16|bf16).*"),
    "shuffle": re.compile(r"(shfl|vote|redux|match)\b.*"),
    "barrier": re.compile(r"(bar|barrier)(\.cta)?\.(sync|red|arrive)\b.*|mbarrier\.(try|test)_wait\b.*"),
    "shared": re.compile(r"(ld|st|atom|red)\.(\w+\.)*shared\b.*|(ld|st)matrix\b.*"),
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
    """Counts what one CTA does: instructions by warp, and shared memory, copies into it included."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_bytes = 0
        self.opcodes: list[Counter] = []

    def begin(self, m: Any) -> None:
        if math.prod(m.launch.grid) != 1:
            raise ValueError(f"one CTA is watched; the grid is {m.launch.grid}")
        self.launch = m.launch
        self.opcodes = [Counter() for _ in range(m.warps)]

    def step(self, m: Any, g: Any) -> None:
        for instruction in m.code.steps[m.at].instructions:
            for warp in g.warp_at.tolist():
                self.opcodes[warp][instruction.opcode] += 1

    def copy_issue(self, m: Any, g: Any, copy: Any) -> None:
        self._count(m, g, copy.shared, copy.size)

    def _count(self, m: Any, g: Any, address: np.ndarray, size: int) -> None:
        self.shared_bytes += size * len(address)
        super()._count(m, g, address, size)

    def totals(self) -> Totals:
        """What was seen so far."""
        needed = sum(needed for needed, _ in self.wavefronts.values())
        ideal = sum(ideal for _, ideal in self.wavefronts.values())
        return Totals(tuple(self.opcodes), needed, ideal, self.shared_bytes)


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
    """Counts by KINDS, and "flops" of the matrix instructions."""
    found: Counter = Counter()
    for opcode, count in opcodes.items():
        kind = next(kind for kind, pattern in KINDS.items() if pattern.fullmatch(opcode))
        found[kind] += count
        if kind == "matrix":
            found["flops"] += count * matrix_flops(opcode)
    return found


def matrix_flops(opcode: str) -> float:
    """Floating-point operations of a PTX matrix instruction per warp that issues it; wgmma is issued by four.

    Raises ValueError for one whose shape is not in its name.
    """
    shape = _SHAPE.search(opcode)
    if shape is None:
        raise ValueError(f"{opcode} does not tell its shape")
    return 2 * math.prod(map(int, shape.groups())) / (4 if opcode.startswith("wgmma") else 1)


@dataclass(frozen=True)
class Tile:
    """One KV tile of one CTA of a kernel.

    From machine code: fma, alu: lanes; issue: warp instructions; local: bytes of spills.
    """

    kernel: str
    tile_m: int
    tile_n: int
    totals: Totals
    fma: float
    alu: float
    issue: float
    local: float

    @property
    def kinds(self) -> Counter:
        """PTX instructions by kind, and matrix FLOP, of all warps."""
        return sum((counts for _, counts in self.totals.roles.values()), Counter())

    @property
    def uses_mma_sync(self) -> bool:
        return any(opcode.startswith("mma.sync") for opcodes in self.totals.opcodes for opcode in opcodes)

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Clocks that each unit of one SM needs for it.

        shared: the L1 data path, which shared memory and spills go through.
        """
        kinds = self.kinds
        matrix = gpu.matrix * (gpu.mma_sync if self.uses_mma_sync else 1.0)
        return {
            "matrix": kinds["flops"] / matrix,
            "mufu": kinds["mufu"] * WARP / gpu.mufu,
            "fma": self.fma / gpu.fma,
            "alu": self.alu / gpu.alu,
            "issue": self.issue / PARTITIONS,
            "shared": (self.totals.wavefronts * 128 + self.local) / gpu.shared,
        }

    def ceilings(self, gpu: Gpu) -> tuple[str, float, float]:
        """The unit that binds, and TFLOP/s: its own, and where tensor cores and the rest take turns."""
        cycles = self.cycles(gpu)
        binds = max(cycles, key=lambda unit: cycles[unit])
        rest = max(clocks for unit, clocks in cycles.items() if unit != "matrix")
        tera = self.kinds["flops"] * gpu.sms * gpu.clock / 1e12
        return binds, tera / cycles[binds], tera / (cycles["matrix"] + rest)


def ours(case: Case, arch: str) -> Tile:
    """A tile of the kernel that serves a case. Raises NotImplementedError, or an EmulatorError."""
    answer = case.problem(arch)
    if not answer:
        raise NotImplementedError(str(answer))
    config, (dim, dim_v) = answer.config, case.dims
    run = executable.executable(answer.kernel, answer.problem, config, answer.device, "emulator")

    def totals(tiles: int) -> Totals:
        generator = torch.Generator().manual_seed(0)
        keys = tiles * config.tile_n
        shapes = ((config.tile_m, dim), (keys, dim), (keys, dim_v), (config.tile_m, dim_v))
        q, k, v, out = (torch.randn(1, n, 1, d, generator=generator).bfloat16() for n, d in shapes)
        absent = dict.fromkeys(Operands._fields)
        given = {"q": q, "k": k, "v": v, "out": out, "lse": torch.empty(1, 1, config.tile_m)}
        operands = Operands(**absent | given | {"softmax_scale": dim**-0.5})
        watch = Watch()
        with cute_flash.emulated(arch, observers=(watch,)):
            run(*operands)
        if watch.launch.shared_memory != config.shared_memory(answer.problem):
            raise ValueError(f"launched with {watch.launch.shared_memory} bytes, not as {config} says")
        return watch.totals()

    cubin = executable.artifact(answer.kernel, answer.problem, config, answer.device).cubin
    steady = totals(2 * TILES).per_tile(totals(TILES), TILES)
    return tile(answer.kernel.name, (config.tile_m, config.tile_n), steady, sass.hot_loops(cubin))


def peers(case: Case, arch: str) -> Tile:
    """A tile of the peer's kernel. Raises flash_attn_4.Missing, or an EmulatorError."""
    peer = flash_attn_4.compiled(case.peer(), EMULATED[arch].target)
    tile_m = peer.kernel.case.seqlens_q[0] // math.prod(peer.shape.grid)
    loop = sass.hot_loops(peer.cubin)[0]
    warps = peer.shape.threads // WARP
    tile_n = loop.flops * warps // (2 * tile_m * sum(case.dims))
    if not tile_n:
        raise flash_attn_4.Missing("its tile cannot be told from its machine code")
    driver = Driver(emulator.Program(peer.kernel.ptx), EMULATED[arch].shared_memory)

    def totals(tiles: int) -> Totals:
        shape = replace(peer.kernel.case, seqlens_q=(tile_m,), seqlens_k=(tiles * tile_n,))
        watch = Watch()
        options = emulator.Options(observers=(watch,))
        flash_attn_4.call(peer.kernel, driver, driver.symbols, flash_attn_4.tensors(shape), options)
        return watch.totals()

    name = f"{flash_attn_4.NAME} {flash_attn_4.version()}"
    steady = totals(2 * TILES).per_tile(totals(TILES), TILES)
    return tile(name, (tile_m, tile_n), steady, sass.hot_loops(peer.cubin))


def tile(kernel: str, shape: tuple[int, int], steady: Totals, loops: tuple[sass.Loop, ...]) -> Tile:
    """Emulator and machine code put together: the hot loop is scaled by its matrix FLOP to one KV tile.

    Raises ValueError where the two disagree on the exponentials per matrix FLOP: the loop is not the steady
    one.
    """
    count, kinds = next((n, c) for n, c in steady.roles.values() if c["matrix"])
    loop = loops[0]
    scale = kinds["flops"] / loop.flops
    exponentials = loop.counts["mufu"] * scale
    if not math.isclose(exponentials, kinds["mufu"], rel_tol=0.02):
        raise ValueError(
            f"{kernel}: the hot loop has {exponentials:.0f} exponentials per KV tile of {count} warps, "
            f"the emulator counts {kinds['mufu']:.0f}"
        )
    names = [opcode.partition(".")[0] for opcode in loop.opcodes]
    lanes = WARP * scale
    return Tile(
        kernel,
        *shape,
        steady,
        fma=lanes * sum(FMA.get(name, 0) for name in names),
        alu=lanes * sum(name in ALU for name in names),
        issue=scale * loop.size,
        local=lanes * sum(map(sass.local_bytes, loop.opcodes)),
    )


def measured(case: Case, gpu: str) -> dict[str, tuple[str, float]]:
    """Peer -> (row, TFLOP/s) of the newest report from such a GPU, at the longest sequence it has."""
    reports = []
    for path in RESULTS.glob("*.json"):
        data = record.read(path)
        if not data["dry_run"] and gpu in data["machine"]:
            reports.append((data["started"], data))
    if not reports:
        return {}
    found: dict[str, tuple[str, float]] = {}
    rows = max(reports, key=lambda report: report[0])[1]["stages"].get("speed", {}).get("rows", [])
    rows = [row for row in rows if row.get("kind") == "row" and row["state"] == "ok"]
    for row in sorted(rows, key=lambda row: row["shape"]["seqlen"]):
        shape = row["shape"]
        if (shape["head_dim"], shape["head_dim_v"], shape["causal"]) == (*case.dims, case.causal):
            timed = {name: peer for name, peer in row["peers"].items() if "tflops" in peer}
            found |= {name: (row["key"], peer["tflops"]) for name, peer in timed.items()}
    return found


def describe(tile: Tile) -> Iterator[str]:
    """The counts of one tile."""
    totals, loss = tile.totals, tile.totals.wavefronts / tile.totals.ideal
    yield f"  {tile.kernel}, {tile.tile_m} rows x {tile.tile_n} keys, per KV tile and CTA:"
    for role, (warps, counts) in totals.roles.items():
        parts = [f"{counts['flops'] / 1e6:.3f} MFLOP"]
        parts += [f"{name} {counts[name]:.0f}" for name in KINDS if name not in ("matrix", "other")]
        yield f"    {role} ({warps}), PTX warp instructions: {', '.join(parts)}, other {counts['other']:.0f}"
    unseen = "" if tile.uses_mma_sync else " (what the tensor cores read there themselves is not counted)"
    yield (
        f"    shared memory: {totals.shared_bytes / 1024:.1f} KiB in {totals.wavefronts:.0f} wavefronts, "
        f"{loss:.2f} x the least{unseen}; barrier round trips "
        f"{tile.kinds['barrier'] / len(totals.opcodes):.1f} per warp"
    )
    lanes = f"{tile.fma:.0f} FMA lanes, {tile.alu:.0f} ALU lanes"
    spills = f"{tile.local / 1024:.1f} KiB of spills"
    yield f"    machine code: {tile.issue:.0f} issue slots, {lanes}, {spills}"


def verdict(tile: Tile, name: str, seen: dict[str, tuple[str, float]]) -> str:
    """One GPU's line."""
    gpu = GPUS[name]
    key = flash_attn_4.NAME if tile.kernel.startswith(flash_attn_4.NAME) else "cute_flash"
    cycles = tile.cycles(gpu)
    binds, ceiling, in_turn = tile.ceilings(gpu)
    clocks = " ".join(f"{unit} {count:6.0f}" for unit, count in cycles.items())
    beside = f"; measured {seen[key][1]:.0f} ({seen[key][0]})" if key in seen else ""
    share = 100 * ceiling * 1e12 / gpu.peak
    return (
        f"    {name:6} clocks: {clocks}; {binds} binds: ceiling {ceiling:5.0f} TFLOP/s "
        f"({share:.0f} % of peak), in turn {in_turn:5.0f}{beside}"
    )


def lines(case: Case, arch: str, gpus: list[str], make: Callable[[Case, str], Tile]) -> Iterator[str]:
    """What is printed of one kernel: its counts, and a line per GPU.

    Raises NotImplementedError, flash_attn_4.Missing or an EmulatorError where it cannot be had.
    """
    found = make(case, arch)
    yield from describe(found)
    for gpu in gpus:
        yield verdict(found, gpu, measured(case, gpu))


def main(arguments: list[str]) -> int:
    """Print counts and bounds; 1 where a kernel of ours could not be run on the emulator."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling cycles", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [case.name for case in CASES.values() if not case.everything]
    parser.add_argument("--case", nargs="+", choices=names, default=["d64", "d128", "d256"], metavar="CASE")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS), metavar="GPU")
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    chosen = parser.parse_args(arguments)
    try:
        sass.tools()
    except FileNotFoundError as error:
        parser.error(str(error))
    print("Bounds, not timings: see --help. Inputs are random normal; bf16.")
    arches: dict[str, list[str]] = {}
    for gpu in chosen.gpu:
        arches.setdefault("sm{}{}".format(*GPUS[gpu].capability), []).append(gpu)
    makers = {"cute_flash": ours} if chosen.no_peer else {"cute_flash": ours, flash_attn_4.NAME: peers}
    failed = False
    for name, arch, who in itertools.product(chosen.case, arches, makers):
        print(f"{name} on {arch}, {who}:", flush=True)
        try:
            print("\n".join(lines(CASES[name], arch, arches[arch], makers[who])), flush=True)
        except (NotImplementedError, flash_attn_4.Missing, emulator.EmulatorError) as error:
            failed |= who == "cute_flash"
            print(f"  missing, {str(error).splitlines()[0]}")
    return 1 if failed else 0
