"""Machine code with its control bits: what the assembler tells the issue logic about each instruction.

    for line in decode(cubin): print(line.control.stall, line.opcode)

An instruction has 128 bits; nvdisasm prints them with -hex and does not explain these of the upper 64: 41-44
the stall count, 45 whether the same warp goes on (0: it yields), 46-48 and 49-51 the scoreboards that the
result and the reads of the sources release (7: none), 52-57 the scoreboards to wait for, 58-61 operands whose
registers stay in the reuse cache. Sources: Jia et al., "Dissecting the NVIDIA Volta GPU
Architecture via Microbenchmarking" (2018), section 2.1; Huerta et al., MICRO 2025.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from .. import sass

SCOREBOARDS = 6
_NONE = 7
_LOW = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/.*/\* 0x([0-9a-f]{16}) \*/\s*$")
_HIGH = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")


@dataclass(frozen=True)
class Control:
    """stall: clocks before the warp's next instruction. yields: another warp goes next, if one can.

    result, sources: the scoreboard that is released when the result is written, when the operands have been
    read; None where nobody waits. waits: scoreboards that must be free before it issues. reuse: a bit per
    operand that stays in the reuse cache.
    """

    stall: int
    yields: bool
    result: int | None
    sources: int | None
    waits: tuple[int, ...]
    reuse: int

    @classmethod
    def of(cls, high: int) -> Control:
        """From the upper 64 bits of an instruction."""
        result, sources, mask = high >> 46 & 7, high >> 49 & 7, high >> 52 & 63
        return cls(
            stall=high >> 41 & 15,
            yields=not high >> 45 & 1,
            result=None if result == _NONE else result,
            sources=None if sources == _NONE else sources,
            waits=tuple(i for i in range(SCOREBOARDS) if mask >> i & 1),
            reuse=high >> 58 & 15,
        )


@dataclass(frozen=True)
class Line:
    """One instruction. number: its place in the listing; the rest is sass.Instruction's, and Control."""

    number: int
    opcode: str
    guard: str
    operands: str
    targets: tuple[int, ...]
    after: tuple[int, ...]
    control: Control

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The opcode's words: ("MUFU", "EX2")."""
        return tuple(self.opcode.split("."))

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.parts[0]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {self.operands}".strip()


def decode(cubin: bytes) -> list[Line]:
    """The instructions of a cubin's one kernel."""
    return read(sass.disassembly(cubin, "-hex"))


def read(listing: str) -> list[Line]:
    """The instructions of what nvdisasm -c -hex prints. Raises ValueError where encodings are missing."""
    instructions = sass.parse(listing)
    words = [found[1] for line in listing.splitlines() if (found := _HIGH.match(line))]
    lows = sum(bool(_LOW.match(line)) for line in listing.splitlines())
    if not len(instructions) == len(words) == lows:
        raise ValueError(f"{len(instructions)} instructions with {lows} lower and {len(words)} upper halves")
    return [
        Line(
            i, it.opcode, it.guard, it.operands, it.targets, it.next(i), Control.of(int(word, 16))
        )
        for i, (it, word) in enumerate(zip(instructions, words, strict=True))
    ]
