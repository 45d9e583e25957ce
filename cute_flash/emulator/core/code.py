"""An entry as a wave executes it: steps, and where registers, constants and variables lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..ptx.parse import Instruction

PLAIN, CONTROL, CONVERGED = "plain", "control", "converged"


@dataclass(slots=True)
class Step:
    """One executable step.

    kind PLAIN: run(machine, threads). CONTROL: run(machine, threads, here) returns [(step number, threads),
    …] to go on with. CONVERGED: plain, but the lanes named by `members` (a row of the b32 bank, None for
    all 32) must be present. where: the PTX instruction to name in messages. instructions: those it stands
    for, in order (none for a helper step). multiply: an mma's operands, so that a run of them can become
    one step.
    """

    run: Callable
    kind: str = PLAIN
    members: int | None = None
    where: Instruction | None = None
    instructions: tuple[Instruction, ...] = ()
    multiply: object = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A row whose value the launch knows: given bits, a special register or a variable's address."""

    kind: str  # "bits" | "special" | "symbol"
    value: int | str
    offset: int = 0


@dataclass(slots=True)
class Layout:
    """How registers and constants are laid out.

    counts: rows of the bank per width. constants: their numbers per width; number k is row -1 - k.
    copies: constants that need a row of the bank itself because an instruction gathers rows, by (width, row).
    """

    counts: dict[int, int] = field(default_factory=dict)
    constants: dict[int, dict[Constant, int]] = field(default_factory=dict)
    copies: dict[tuple[int, int], Constant] = field(default_factory=dict)

    def constant(self, width: int, constant: Constant) -> int:
        known = self.constants.setdefault(width, {})
        return -1 - known.setdefault(constant, len(known))

    def new_row(self, width: int) -> int:
        self.counts[width] = self.counts.get(width, 0) + 1
        return self.counts[width] - 1

    def copy(self, width: int, constant: Constant) -> int:
        for (have, row), known in self.copies.items():
            if have == width and known == constant:
                return row
        row = self.new_row(width)
        self.copies[width, row] = constant
        return row


@dataclass
class Code:
    """An entry as executable steps.

    runs[i] is steps[i].run. next_control[i]: first control step at or after i; next_converged the same for
    steps that need whole warps. symbols: address of each variable in its own space (generic for global).
    tensor_memory: whether the entry has tcgen05 instructions.
    """

    steps: list[Step]
    layout: Layout
    symbols: dict[str, int]
    shared_base: int
    shared_static: int
    local_bytes: int
    shared_granule: int
    global_granule: int
    shared_symbols: frozenset[str]
    directives: dict[str, tuple[int, ...]]
    runs: list = field(default_factory=list)
    next_control: list[int] = field(default_factory=list)
    next_converged: list[int] = field(default_factory=list)
    tensor_memory: bool = False
