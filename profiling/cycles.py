"""What each unit of a GPU allows per KV tile: counts from the emulator, over rates from `rates.py`.

    python -m profiling cycles                          d64, d128, d192_128, d256, FP8, and gradients; every
                                                        GPU of rates.py
    python -m profiling cycles --case d128 --gpu H200
    python -m profiling cycles --write                  keep the rows in results/cycles.json and cycles.md

These are bounds, not timings: no latency, no dependency, no memory beyond shared memory, every unit busy all
the time. One cluster of CTAs runs on the emulator over some KV tiles and over twice as many; the difference
is the steady cost of a tile. Matrix FLOP, exponentials, shared memory and barriers are counted there; FP32
and integer issue slots are those of the hot loops' machine code, because the compiler fuses what PTX has
apart. What runs only where a warp's vote says so counts as often as votes said so on the emulator. Warps
outside these loops (copies, rescaling by warps of their own) take slots that are not counted, but for those
that transpose V. Of gradients, a tile is one of queries: a CTA of the main kernel keeps its keys and walks
the queries. Under a causal mask it is one that the mask leaves whole.

    ceiling   the slowest unit alone: everything overlaps perfectly
    in turn   the tensor cores wait for the rest of the tile, and that for them: nothing overlaps
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

import cute_flash
from cute_flash import emulator, executable
from cute_flash.arch.block_scaled import BlockScaledOperands
from cute_flash.arch.problem import Operands
from cute_flash.arch.quantized import QuantizedOperands
from cute_flash.dispatch import Answer
from cute_flash.emulator.execution.launch import Driver
from cute_flash.objectfile import ObjectFileError

from . import flash_attn_4, gradients, sass
from .rates import GPUS, PARTITIONS, WARP, Gpu
from .static import CASES, Case, in_words
from .watch import KINDS, PARTS, Totals, Watch, by_kind

FORWARD = tuple(f"{dims}{rules}" for rules in ("", "_causal") for dims in ("d64", "d128", "d192_128", "d256"))
PLAIN = {name: case for name, case in CASES.items() if case.rules == "plain" and not case.forms}
BACKWARD = tuple(name for name, case in PLAIN.items() if case.backward and not case.is_quantized)
CAUSAL_BACKWARD = ("d64_causal_backward", "d128_causal_backward")
FP8 = tuple(name for name, case in PLAIN.items() if case.is_quantized and not case.backward)
FP8_BACKWARD = tuple(name for name, case in PLAIN.items() if case.is_quantized and case.backward)
SCALED = tuple(name for name, case in CASES.items() if case.forms)
DEFAULT = (*FORWARD, *FP8, *SCALED, *BACKWARD, *CAUSAL_BACKWARD, *FP8_BACKWARD)
# Gradients are counted on one GPU of each tree, under a mask only on Blackwell's.
GRADIENTS_ON = ("A100", "H200", "B200")
ALONE = ", no pairs"  # what a peer's name ends in where its CTAs might work in pairs, and do not
# The emulator runs so many KV tiles, and twice as many. Few: after many turns it lets other warps go first,
# and lanes of a warp that then run apart count twice.
TILES = 4
CTAS = 8  # at most, all at once

# Opcodes that the FP32 unit and its neighbour for compares and integers take, by the part before the dot.
FMA = {"FADD": 1, "FMUL": 1, "FFMA": 1, "IMAD": 1, "HFMA2": 1, "FADD2": 2, "FMUL2": 2, "FFMA2": 2}
ALU = {
    "FMNMX", "FMNMX3", "FSETP", "FSEL", "F2FP", "IADD3", "IADD", "VIADD", "LOP3", "SHF", "ISETP", "SEL",
    "LEA", "PRMT", "IMNMX", "VIMNMX", "PLOP3", "IABS",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one tile asks of the units of an SM. flops: of matrix products, by mma.sync or not.

    mufu, fma, alu: lanes; issue: warp instructions; shared: bytes through the L1 data path, which shared
    memory and spills take; reduced: bytes added to global memory as fp32 sums. narrowed: of the lanes of alu
    those that convert to 8 bits. bits: of what is multiplied.
    """

    flops: float
    mma_sync: bool
    mufu: float
    fma: float
    alu: float
    issue: float
    shared: float
    reduced: float = 0.0
    narrowed: float = 0.0
    bits: float = 16

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Clocks that each unit of one SM needs; "sums" where there are some and their rate is known."""
        sums = {"sums": self.reduced / gpu.sums} if self.reduced and gpu.sums else {}
        matrix = gpu.matrix * gpu.faster(self.bits)
        return {
            "matrix": self.flops / (matrix * (gpu.mma_sync if self.mma_sync else 1.0)),
            "mufu": self.mufu / gpu.mufu,
            "fma": self.fma / gpu.fma,
            "alu": (self.alu - self.narrowed) / gpu.alu + self.narrowed / gpu.narrowing,
            "issue": self.issue / PARTITIONS,
            "shared": self.shared / gpu.shared,
            **sums,
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

    flops: by the algorithm. From machine code: fma, alu: lanes; narrowed: those of alu that convert to 8
    bits; issue: warp instructions, transposing: those of them that transpose V; local: bytes spilt. bits: of
    what is multiplied.
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
    narrowed: float
    transposing: float
    bits: float

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
            reduced=self.totals.reduced,
            narrowed=self.narrowed,
            bits=self.bits,
        )


def ours(case: Case, answer: Answer, arch: str) -> Tile:
    """A tile of a kernel that serves a case. Raises NotImplementedError, or an EmulatorError."""
    if not answer:
        raise NotImplementedError(str(answer))
    config, make = answer.config, _maker(case)
    run = executable.executable(answer.kernel, answer.problem, config, answer.device, "emulator")

    def watched(rows: int, keys: int) -> Watch:
        operands = make(answer, case.dims, rows, keys)
        watch = Watch()
        with cute_flash.emulated(arch, observers=(watch,), ctas_per_wave=CTAS):
            run(*operands)
        if watch.launch.shared_memory != config.shared_memory(answer.problem):
            raise ValueError(f"launched with {watch.launch.shared_memory} bytes, not as {config} says")
        return watch

    cubin = executable.artifact(answer.kernel, answer.problem, config, answer.device).cubin
    loops = loops_of(cubin)
    if case.is_quantized:
        loops += sass.transposing(sass.disassembly(cubin))
    shape, steady = steady_of(case, (config.tile_m, config.tile_n), watched)
    return tile(answer.kernel.name, shape, case, steady, loops)


def _maker(case: Case) -> Callable[..., tuple]:
    """What makes the operands of our kernel."""
    if case.backward:
        return gradients.quantized_operands if case.is_quantized else gradients.operands
    if case.is_quantized:
        return _scaled_operands if case.forms else _quantized_operands
    return _operands


def steady_of(
    case: Case, cluster: tuple[int, int], watched: Callable[[int, int], Watch]
) -> tuple[tuple[int, int], Totals]:
    """Rows and keys of a CTA's tile, and what a tile costs that no mask cuts.

    cluster: rows and keys that the CTAs of a cluster work on together. watched: runs so many rows and keys.
    """
    rows, keys = cluster
    if case.backward and case.rules == "causal":
        return _steady_of_causal_gradients(rows, keys, watched)
    lengths = [(n * rows, keys) if case.backward else (rows, n * keys) for n in (TILES, 2 * TILES)]
    few, many = (watched(*length) for length in lengths)
    shape = (rows, keys // few.ctas) if case.backward else (rows // few.ctas, keys)
    return shape, many.totals().per_tile(few.totals(), TILES)


def _steady_of_causal_gradients(
    rows: int, keys: int, watched: Callable[[int, int], Watch]
) -> tuple[tuple[int, int], Totals]:
    """As many rows as keys, of one cluster, two and three: each has the tiles that the mask cuts once, and
    those below: none, one cluster's, and three clusters'."""
    runs = [watched(n * keys, n * keys) for n in (1, 2, 3)]
    one, two, three = (run.totals().times(run.ctas) for run in runs)
    ctas = runs[0].ctas
    return (rows, keys // ctas), three.per_tile(two, 1).per_tile(two.per_tile(one, 1), keys // rows * ctas)


def _operands(answer: Answer, dims: tuple[int, int], rows: int, keys: int) -> Operands:
    """Of our kernel. Random normal."""
    dim, dim_v = dims
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, dim), (keys, dim), (keys, dim_v), (rows, dim_v))
    q, k, v, out = (torch.randn(1, n, 1, d, generator=generator).bfloat16() for n, d in shapes)
    absent = dict.fromkeys(Operands._fields)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": torch.empty(1, 1, rows)}
    given |= {"softmax_scale": dim**-0.5, "multiprocessors": answer.device.multiprocessors}
    return Operands(**absent | given)


def _quantized_operands(answer: Answer, dims: tuple[int, int], rows: int, keys: int) -> QuantizedOperands:
    """Of our kernel in FP8: random normal, and scales of 1."""
    of_16, block = _operands(answer, dims, rows, keys), answer.problem.block
    bytes_of = {x: getattr(of_16, x).to(torch.float8_e4m3fn).view(torch.uint8) for x in "qkv"}
    lengths = {"q": rows, "k": keys, "v": keys}
    blocks = {x: () if block is None else (-(-length // block),) for x, length in lengths.items()}
    scales = {f"{x}_scale": torch.ones(1, 1, *blocks[x]) for x in "qkv"}
    absent = dict.fromkeys(QuantizedOperands._fields)
    return QuantizedOperands(**absent | of_16._asdict() | bytes_of | scales)


def _scaled_operands(answer: Answer, dims: tuple[int, int], rows: int, keys: int) -> BlockScaledOperands:
    """Of our block-scaled kernel: random normal, quantized."""
    problem, of_16 = answer.problem, _operands(answer, dims, rows, keys)
    forms = {"q": problem.form, "k": problem.form, "v": problem.v_form}
    found = {
        x: cute_flash.quantize(
            getattr(of_16, x), forms[x], hadamard=False,
            axis="seqlen" if x == "v" and problem.v_group else "head_dim",
        )
        for x in "qkv"
    }  # fmt: skip
    factors = {
        f"{x}_factors": None if x == "v" and not problem.v_group else found[x].scale.view(torch.uint8)
        for x in "qkv"
    }
    given = {x: found[x].data.view(torch.uint8) for x in "qkv"} | factors
    one = torch.ones(1, 1)
    scales = {f"{x}_scale": one if found[x].tensor_scale is None else found[x].tensor_scale for x in "qk"}
    scales["v_scale"] = one if problem.v_group else found["v"].scale
    absent = dict.fromkeys(BlockScaledOperands._fields)
    return BlockScaledOperands(**absent | of_16._asdict() | given | scales)


def peers(case: Case, target: str, alone: bool = False) -> Tile:
    """A tile of the peer's kernel. Raises flash_attn_4.Missing, or an EmulatorError.

    alone: of gradients, without pairs of CTAs.
    """
    module = case.peers
    peer = module.compiled(replace(case.peer(), alone=True) if alone else case.peer(), target)
    rows, keys = peer.kernel.tile
    program = emulator.Program(flash_attn_4.defined(peer.kernel.ptx))
    driver = Driver(program, flash_attn_4.LARGEST_SHARED_MEMORY)
    if case.backward:
        keys *= math.prod(module.launched(peer.kernel, rows, keys).grid)

    def watched(rows: int, keys: int) -> Watch:
        operands = module.tensors_of(peer.kernel.case, rows, keys)
        watch = Watch()
        # It reads rows of Q's tile that it never filled, and drops the results; a few of its kernels do what
        # PTX leaves undefined.
        options = emulator.Options(observers=(watch,), uninitialized="poison", permissive=True)
        flash_attn_4.call(peer.kernel, driver, driver.symbols, operands, options)
        return watch

    shape, steady = steady_of(case, (rows, keys), watched)
    return tile(peer_name(alone), shape, case, steady, loops_of(peer.cubin))


def peer_name(alone: bool = False) -> str:
    """The peer and its version. Raises flash_attn_4.Missing."""
    return f"{flash_attn_4.NAME} {flash_attn_4.version()}{ALONE * alone}"


def peers_of(case: Case, arch: str) -> tuple[bool, ...]:
    """The peer's kernels for a case: whether CTAs work alone where it has pairs of them, too. None of scaled
    ones and of gradients in FP8, which it does not have.
    """
    if case.forms or case.backward and case.is_quantized:
        return ()
    paired = case.backward and arch == "sm100" and case.dims == (128, 128)  # below none, beyond always
    return (False, True) if paired else (False,)


def loops_of(cubin: bytes) -> tuple[sass.Loop, ...]:
    """The hot loops of a kernel."""
    return sass.hot_loops(sass.disassembly(cubin))


def tile(
    kernel: str, shape: tuple[int, int], case: Case, steady: Totals, loops: tuple[sass.Loop, ...]
) -> Tile:
    """Emulator and machine code put together: each hot loop counts as often as one KV tile takes.

    Raises ValueError where the two disagree on exponentials per matrix FLOP: the loop is not the steady one.
    """
    kinds = sum((counts for _, counts in steady.roles.values()), Counter())
    passes = [(loop, _times(loop, loops, kinds)) for loop in loops]
    exponentials = sum(loop.counts["mufu"] * n for loop, n in passes)
    if not math.isclose(exponentials, kinds["mufu"], rel_tol=0.02):
        raise ValueError(
            f"{kernel}: the hot loops have {exponentials:.0f} exponentials per KV tile, the emulator counts "
            f"{kinds['mufu']:.0f}"
        )
    slots = Counter(fma=0, alu=0, issue=0, local=0, narrowed=0, transposing=0)  # in Tile's order
    for loop, n in passes:
        for opcode, weight in zip(loop.opcodes, loop.weights(agreed(loop, steady)), strict=True):
            name = opcode.partition(".")[0]
            slots["fma"] += WARP * n * weight * FMA.get(name, 0)
            slots["alu"] += WARP * n * weight * (name in ALU)
            slots["local"] += WARP * n * weight * sass.local_bytes(opcode)
            slots["issue"] += n * weight
            slots["transposing"] += n * weight * (_kind(loop) == "shared")
            slots["narrowed"] += WARP * n * weight * narrows(opcode)
    return Tile(kernel, *shape, steady, flops_of(case, shape), *slots.values(), case.bits)


def agreed(loop: sass.Loop, steady: Totals) -> list[float]:
    """In which share of a hot loop's passes each of its votes said yes, in the order of their lines in PTX.

    They are votes of the warps that do most of what the loop is there for.
    """
    if not loop.voted:
        return []
    kind = {"mma": "matrix"}.get(_kind(loop), _kind(loop))
    often = [by_kind(opcodes)[kind] for opcodes in steady.opcodes]
    votes = sum((v for v, n in zip(steady.votes, often, strict=True) if 2 * n > max(often)), Counter())
    lines = sorted({line for (line, _), count in votes.items() if count})
    return [votes[line, True] / (votes[line, True] + votes[line, False]) for line in lines]


def narrows(opcode: str) -> bool:
    """Whether it converts to numbers of 8 bits."""
    name, *parts = opcode.split(".")
    return name == "F2FP" and bool({"E4M3", "E5M2"} & set(parts))


def flops_of(case: Case, shape: tuple[int, int]) -> int:
    """Of a tile's products by the algorithm: two, of gradients five."""
    (dim, dim_v), times = case.dims, (3, 2) if case.backward else (1, 1)
    return 2 * math.prod(shape) * (times[0] * dim + times[1] * dim_v)


def _times(loop: sass.Loop, loops: tuple[sass.Loop, ...], kinds: Counter) -> float:
    """How often warps pass through one of the hot loops per KV tile, by what of it the emulator counts, too.

    Where several have products, as many warps have each.
    """
    if loop.flops:
        return kinds["flops"] / sum(other.flops for other in loops)
    kind = _kind(loop)
    return kinds["matrix" if kind == "mma" else kind] / loop.counts[kind]


def _kind(loop: sass.Loop) -> str:
    """The class of instructions that a hot loop is there for: exponentials, products, or transposing V."""
    return next((kind for kind in ("mufu", "mma") if loop.counts[kind]), "shared")


@dataclass(frozen=True)
class Row:
    """One kernel on one target. roles: warps that do the same work -> instructions and matrix FLOP by kind.

    wavefronts: 128-byte accesses of shared memory per KV tile; ideal: had there been no bank conflicts;
    parts: of gradients' and FP8's, those of each of PARTS; uniform: of gradients', loads of 16 bytes that all
    lanes of a warp have from one place, each counted as four of them. transposing: issue slots for V.
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
    parts: dict[str, float] = field(default_factory=dict)
    uniform: float = 0.0
    transposing: float = 0.0

    @property
    def merged(self) -> Cost:
        """The cost if shared memory serves uniform loads by two accesses instead of four."""
        return replace(self.cost, shared=self.cost.shared - 2 * 128 * self.uniform)

    def ceilings(self, gpu: Gpu, cost: Cost | None = None) -> tuple[str, float, float]:
        """The cost's, of which only the algorithm's FLOP count: what a kernel pads is no work done."""
        binds, ceiling, in_turn = (cost or self.cost).ceilings(gpu)
        useful = flops_of(CASES[self.case], self.tile) / self.cost.flops
        return binds, ceiling * useful, in_turn * useful

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
    backward, bits = CASES[what.case].backward, CASES[what.case].bits
    parts = {name: round(totals.parts[name], 2) for name in PARTS} if backward or bits < 16 else {}
    return Row(
        what.case, what.target, found.kernel, config, (found.tile_m, found.tile_n), cost, roles,
        wavefronts=round(totals.wavefronts, 2),
        ideal=round(totals.ideal, 2),
        barriers=round(found.kinds["barrier"] / len(totals.opcodes), 2),
        local=round(found.local, 2),
        parts=parts,
        uniform=round(totals.uniform, 2) if backward else 0.0,
        transposing=round(found.transposing, 2),
    )


def counts(case: Case, target: str) -> bool:
    """Whether the tables have a case on GPUs of a target."""
    if not case.backward:
        return any(case.is_on(gpu.arch) for gpu in GPUS.values() if gpu.device.target == target)
    arches = [GPUS[name].arch for name in GRADIENTS_ON if GPUS[name].device.target == target]
    return any(case.is_on(arch) and (case.rules == "plain" or arch == "sm100") for arch in arches)


def survey(cases: Iterable[str], gpus: Iterable[str], peer: bool) -> Iterator[Row | NotYet]:
    """Every kernel of ours and the peer's, for each case and each target of these GPUs."""
    for target, gpu in {GPUS[name].device.target: GPUS[name] for name in gpus}.items():
        for case in (CASES[name] for name in cases if counts(CASES[name], target)):
            for answer in case.with_products(gpu.device):
                name = answer.kernel.name if answer else "cute_flash"
                config = in_words(answer.config) if answer else ""
                make = functools.partial(ours, case, answer, gpu.arch)
                yield counted(NotYet(case.name, target, name, ""), config, make)
            for alone in peers_of(case, gpu.arch) if peer else ():
                make = functools.partial(peers, case, target, alone)
                yield counted(NotYet(case.name, target, flash_attn_4.NAME + ALONE * alone, ""), "", make)


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
