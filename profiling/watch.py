"""What CTAs do, counted on the emulator: instructions of each warp, shared memory, sums in global memory."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cute_flash.emulator.checks.counters import BankConflicts
from cute_flash.emulator.ptx.parse import Instruction

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
# Who asks for shared memory: tensor cores that read operands there, warps by loads, stores and cp.async, and
# bulk copies and reductions into and out of it.
PARTS = ("operands", "warps", "copied in", "copied out")
_SHAPE = re.compile(r"\.m(\d+)n(\d+)k(\d+)")


class Watch(BankConflicts):
    """Counts what CTAs do: instructions by warp, sums in global memory, shared memory with copies into it.

    Tensor cores that read it themselves, and bulk copies, are counted without bank conflicts; what the warps
    of a warpgroup read together in a product counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared_bytes = self.reduced = self.uniform = 0
        self.opcodes: list[Counter] = []
        self.votes: list[Counter] = []
        self._read_now: dict[tuple, list[np.ndarray]] = {}
        self._copied = 0

    def begin(self, m: Any) -> None:
        if self.opcodes or math.prod(m.launch.grid) != m.ctas:
            raise ValueError(f"CTAs are watched that run at once; the grid is {m.launch.grid}")
        self.launch, self.ctas = m.launch, m.ctas
        self.opcodes = [Counter() for _ in range(m.warps)]
        self.votes = [Counter() for _ in range(m.warps)]

    def step(self, m: Any, g: Any) -> None:
        self._together()
        for instruction in m.code.steps[m.at].instructions:
            for warp in g.warp_at.tolist():
                self.opcodes[warp][instruction.opcode] += 1
            if instruction.opcode == "vote.sync.any.pred":
                self._vote(m, g, instruction)

    def _vote(self, m: Any, g: Any, instruction: Instruction) -> None:
        holds = np.zeros(g.mask.shape, bool)
        holds[g.mask] = np.ravel(m.rows["pred"][instruction.operands[1].row][g.index])
        said = holds.any(axis=2)[g.warp_at, g.cta_at]
        for warp, yes in zip(g.warp_at.tolist(), said.tolist(), strict=True):
            self.votes[warp][instruction.line, yes] += 1

    def shared_read(self, m: Any, g: Any, address: np.ndarray, size: int) -> None:
        super().shared_read(m, g, address, size)
        if size == 16 and len(address) == 32 * len(np.unique(g.slot)):
            by_warp = address[np.lexsort((g.lane, g.slot))].reshape(-1, 32)
            self.uniform += int((by_warp == by_warp[:, :1]).all(axis=1).sum())

    def copy_issue(self, m: Any, g: Any, copy: Any) -> None:
        self._count(m, g, copy.shared, copy.size)

    def async_read(self, m: Any, unit: Any, cta: int, address: np.ndarray, size: int) -> None:
        self._read_now.setdefault((cta, unit.name, unit.number, size), []).append(np.ravel(address))

    def async_write(self, m: Any, warp: Any, barrier: Any, span: Any) -> None:
        self._in_line("copied in", span.size)
        self._copied = span.size

    def bulk_read(self, m: Any, warp: Any, barrier: Any, rows: Any) -> None:
        # A copy that reads no global memory has what it brings to another CTA from this one's shared memory.
        if not len(rows.address):
            self._in_line("copied out", self._copied)

    def global_write(self, m: Any, g: Any, address: np.ndarray, values: np.ndarray, order: Any) -> None:
        self.reduced += values.nbytes * order.sums

    def bulk_write(self, m: Any, unit: Any, rows: Any, order: Any) -> None:
        self.reduced += rows.nbytes * len(rows.address) * order.sums

    def _together(self) -> None:
        """Count what the last step's units read."""
        for (_, name, _, size), addresses in self._read_now.items():
            part = "operands" if name in ("products", "tensor") else "copied out"
            self._in_line(part, size * len(np.unique(np.concatenate(addresses))))
        self._read_now.clear()

    def _in_line(self, part: str, size: float) -> None:
        """Bytes that pass 128 at a time, for one of PARTS."""
        self.shared_bytes += size
        needed, ideal = self.wavefronts.get(part, (0, 0))
        self.wavefronts[part] = (needed + size / 128, ideal + size / 128)

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
        parts: Counter = Counter()
        for where, (count, _) in self.wavefronts.items():
            parts[where if where in PARTS else "warps"] += count / n
        counts = (needed, ideal, self.shared_bytes, self.reduced)
        votes = tuple(Counter({vote: count / n for vote, count in w.items()}) for w in self.votes)
        return Totals(opcodes, *(count / n for count in counts), parts, self.uniform / n, votes)


@dataclass(frozen=True)
class Totals:
    """Of one CTA. opcodes: per warp, how often each was executed. wavefronts: 128-byte accesses of shared
    memory; ideal: had there been no bank conflicts; parts: those of each of PARTS. shared_bytes: read,
    written, and copied in. reduced: bytes of fp32 sums in global memory. uniform: loads of 16 bytes that all
    lanes of a warp have from one place. votes: per warp, how often the vote in a line of PTX said yes or no.
    """

    opcodes: tuple[Counter, ...]
    wavefronts: float
    ideal: float
    shared_bytes: float
    reduced: float = 0.0
    parts: Counter = field(default_factory=Counter)
    uniform: float = 0.0
    votes: tuple[Counter, ...] = ()

    def per_tile(self, less: Totals, tiles: float) -> Totals:
        """The steady cost of a tile, where `less` ran `tiles` fewer."""

        def per(more: Counter, before: Counter) -> Counter:
            return Counter({name: (more[name] - before[name]) / tiles for name in more})

        names = ("wavefronts", "ideal", "shared_bytes", "reduced", "uniform")
        return Totals(
            opcodes=tuple(map(per, self.opcodes, less.opcodes)),
            parts=per(self.parts, less.parts),
            votes=tuple(map(per, self.votes, less.votes)),
            **{name: (getattr(self, name) - getattr(less, name)) / tiles for name in names},
        )

    def times(self, count: float) -> Totals:
        """Of so many CTAs, or tiles."""
        none = (Counter(),) * len(self.opcodes)
        nothing = Totals(none, 0.0, 0.0, 0.0, votes=none)
        return self.per_tile(nothing, 1 / count)

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

    0 for tcgen05.mma, whose shape is in a descriptor. Raises ValueError where another's is not in its name.
    """
    shape = _SHAPE.search(opcode)
    if shape is None:
        if opcode.startswith("tcgen05"):
            return 0.0
        raise ValueError(f"{opcode} does not tell its shape")
    return 2 * math.prod(map(int, shape.groups())) / (4 if opcode.startswith("wgmma") else 1)
