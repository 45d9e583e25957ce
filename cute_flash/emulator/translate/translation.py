"""Instructions -> steps: Python functions of (machine, threads) with every operand already resolved.

An operation function in ops/ is registered with @operation("name") and called once per instruction with an
`Operation`: it consumes the modifiers that it models, asks for its operands' rows and returns the step.
Whatever it leaves unconsumed makes the instruction unmodelled. Immediates, special registers and symbols
are rows like any register.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..base.errors import ParseError, UnmodelledInstruction
from ..core.code import CONTROL, CONVERGED, Constant, Layout, Step
from ..core.special import MODELLED
from ..core.state import VIEWS
from ..ptx.operands import Address, Immediate, Not, Pair, Register, Sink, Special, Symbol, Vector, float_bits
from ..ptx.parse import EntryText, Instruction, Module

if TYPE_CHECKING:
    from ..core.machine import Machine
    from ..core.state import Threads
    from ..units.products import Form

PlainStep = Callable[["Machine", "Threads"], None]
OPERATIONS: dict[str, Callable[[Operation], Step | PlainStep]] = {}


def operation(*names: str) -> Callable:
    """Register an operation function for opcodes that start with one of `names`; the longest match wins."""

    def register(function: Callable) -> Callable:
        for name in names:
            if name in OPERATIONS:
                raise ValueError(f"two operations are registered for {name}")
            OPERATIONS[name] = function
        return function

    return register


@dataclass(frozen=True, eq=False)
class Effect:
    """What an instruction does to products. kind: "product", "fence", "commit" or "wait" (all but `keep`)."""

    kind: str
    d: tuple[Register, ...] = ()
    a: tuple[Register, ...] = ()
    form: Form | None = None
    keep: int = 0


class Translation:
    """What all instructions of one entry share while they are translated."""

    def __init__(self, module: Module, entry: EntryText):
        self.module = module
        self.entry = entry
        self.layout = Layout({width: len(registers) for width, registers in entry.registers.items()})
        self.scratch = {width: self.layout.new_row(width) for width in (1, 8, 16, 32, 64)}
        # Bytes of the narrowest access that may touch shared memory, and global memory.
        self.shared_granule = self.global_granule = 16
        self.cta_group: int | None = None  # that of the kernel's tcgen05 instructions, once there is one
        self.link: list[int] = []  # instruction number -> step number, filled when all steps exist

    def variable(self, name: str):
        for variables in (self.entry.variables, self.module.variables):
            if name in variables:
                return variables[name]
        return next((p for p in self.entry.params if p.name == name), None)

    def architecture(self) -> int:
        """The target's number: 80 for sm_80, 100 for sm_100a."""
        return architecture(self.module.target)


def architecture(target: str) -> int:
    """A target's number: 80 for sm_80, 100 for sm_100a."""
    return int("".join(c for c in target if c.isdigit()))


class Operation:
    """One instruction while it is translated: its modifiers and operands, consumed piece by piece."""

    def __init__(self, translation: Translation, instruction: Instruction):
        self.translation = translation
        self.instruction = instruction
        self.operands = list(instruction.operands)
        self.reads: list[Register] = []
        self.writes: list[Register] = []
        self.copies: list[Register] = []  # sources that are only moved: they may be undefined
        self.effect: Effect | None = None  # on asynchronous products
        self.used: set[int] = set()
        self.name, self.function, modifiers = _found(instruction.opcode)
        self.modifiers = list(modifiers)

    def unmodelled(self, what: str) -> UnmodelledInstruction:
        return UnmodelledInstruction(f"{self.name}: {what} is not modelled")

    # Modifiers.

    def flag(self, name: str) -> bool:
        """Consume the modifier `name` if it is there."""
        if name in self.modifiers:
            self.modifiers.remove(name)
            return True
        return False

    def one_of(self, *names: str, default: str | None = None) -> str:
        """Consume the one modifier out of `names`; without a default it must be there."""
        found = [name for name in self.modifiers if name in names]
        if len(found) > 1:
            raise self.unmodelled(f"the combination .{'.'.join(found)}")
        if found:
            self.modifiers.remove(found[0])
            return found[0]
        if default is None:
            raise self.unmodelled(f"the form without one of .{', .'.join(names)}")
        return default

    def without_effect(self, *names: str) -> None:
        """Consume modifiers that change no result here: cache, locality and ordering hints."""
        self.modifiers = [m for m in self.modifiers if m not in names]

    def type(self, *names: str) -> str:
        """Consume the first remaining modifier, which must be one of the types `names`."""
        if not self.modifiers or self.modifiers[0] not in names:
            have = f".{self.modifiers[0]}" if self.modifiers else "the form without a type"
            raise self.unmodelled(have)
        return self.modifiers.pop(0)

    # Operands.

    def operand(self, position: int) -> object:
        if position >= len(self.operands):
            raise ParseError(f"{self.instruction.opcode} needs more than {len(self.operands)} operands")
        self.used.add(position)
        return self.operands[position]

    def count(self) -> int:
        return len(self.operands)

    def source(self, position: int, view: str) -> int:
        """Row of a source operand that is read under `view`."""
        return self.source_of(self.operand(position), view)

    def source_of(self, operand: object, view: str) -> int:
        width = VIEWS[view][0]
        if isinstance(operand, Register):
            if operand.width != width:
                raise ParseError(f"{operand.name} has {operand.width} bits where {width} are needed")
            self.reads.append(operand)
            return operand.row
        return self.translation.layout.constant(width, self.constant_of(operand, view))

    def wide_source(self, position: int, view: str) -> tuple[int, str]:
        """(row, view) of a source that may be wider than its type (st, cvt): its low bits count."""
        return self.wide_source_of(self.operand(position), view)

    def wide_source_of(self, operand: object, view: str) -> tuple[int, str]:
        width = VIEWS[view][0]
        if isinstance(operand, Register) and operand.width > width:
            self.reads.append(operand)
            return operand.row, f"u{operand.width}"
        return self.source_of(operand, view), view

    def bank_row(self, operand: object, view: str) -> int:
        """Row inside the bank itself, for instructions that gather many rows at once."""
        if isinstance(operand, Register):
            return self.source_of(operand, view)
        width = VIEWS[view][0]
        return self.translation.layout.copy(width, self.constant_of(operand, view))

    def constant_of(self, operand: object, view: str) -> Constant:
        if isinstance(operand, Immediate):
            return Constant("bits", immediate_bits(operand, view))
        if isinstance(operand, Special):
            if operand.name not in MODELLED:
                raise self.unmodelled(operand.name)
            return Constant("special", operand.name)
        if isinstance(operand, Symbol):
            if self.translation.variable(operand.name) is None:
                raise ParseError(f"{operand.name} is not declared")
            return Constant("symbol", operand.name, operand.offset)
        raise ParseError(f"{type(operand).__name__.lower()} where a value is needed")

    def only_moves(self) -> None:
        """Say that the sources so far are moved, not used: an undefined one makes the result undefined."""
        guard = self.instruction.guard
        self.copies = [r for r in self.reads if r is not guard]
        self.reads = [guard] if guard is not None else []

    def predicate(self, position: int) -> tuple[int, bool]:
        """(row, negated) of a predicate source such as %p1 or !%p1."""
        operand = self.operand(position)
        if isinstance(operand, Not):
            return self.source_of(operand.operand, "pred"), True
        return self.source_of(operand, "pred"), False

    def dest(self, position: int, view: str) -> int:
        """Row of a destination operand that is written under `view`."""
        return self.dest_of(self.operand(position), view)

    def dest_of(self, operand: object, view: str) -> int:
        width = VIEWS[view][0]
        if isinstance(operand, Sink):
            return self.translation.scratch[width]
        if not isinstance(operand, Register):
            raise ParseError(f"{type(operand).__name__.lower()} where a destination register is needed")
        if operand.width != width:
            raise ParseError(f"{operand.name} has {operand.width} bits where {width} are needed")
        self.writes.append(operand)
        return operand.row

    def wide_dest_of(self, operand: object, view: str) -> tuple[int, int]:
        """(row, width) of a destination register that may be wider than the type (ld, cvt)."""
        width = VIEWS[view][0]
        if isinstance(operand, Register) and operand.width > width > 1:
            self.writes.append(operand)
            return operand.row, operand.width
        return self.dest_of(operand, view), width

    def pair(self, position: int) -> tuple[object, object | None]:
        """The two halves of a `d|p` destination; the second is None when it is absent."""
        operand = self.operand(position)
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    def vector(self, position: int) -> tuple:
        """The items of a {…} operand; a bare operand counts as one item."""
        operand = self.operand(position)
        return operand.items if isinstance(operand, Vector) else (operand,)

    def integer(self, position: int) -> int:
        """An operand that must be a literal integer."""
        operand = self.operand(position)
        if not isinstance(operand, Immediate) or not isinstance(operand.value, int):
            raise self.unmodelled("this operand that is not a literal")
        return operand.value

    def address(self, position: int) -> tuple[int, str, int]:
        """(row, view, offset) of an address operand [base + offset] without coordinates."""
        operand = self.operand(position)
        if not isinstance(operand, Address) or operand.coordinates:
            raise self.unmodelled("this kind of address")
        if isinstance(operand.base, Register) and operand.base.width == 32:
            return self.source_of(operand.base, "u32"), "u32", operand.offset
        if isinstance(operand.base, Symbol):
            symbol = Symbol(operand.base.name, operand.base.offset + operand.offset)
            return self.source_of(symbol, "u64"), "u64", 0
        return self.source_of(operand.base, "u64"), "u64", operand.offset

    # Results.

    def control(self, run: Callable) -> Step:
        return Step(run, CONTROL)

    def converged(self, run: Callable, members: int | None = None) -> Step:
        return Step(run, CONVERGED, members)

    def translate(self) -> Step:
        """Call the operation function and check that it left nothing unconsumed."""
        guard = self.instruction.guard
        if guard is not None:
            self.reads.append(guard)
        step = self.function(self)
        if self.modifiers:
            raise self.unmodelled(f"the modifier .{'.'.join(self.modifiers)}")
        unused = set(range(len(self.operands))) - self.used
        if unused:
            raise self.unmodelled(f"operand {min(unused) + 1}")
        return step if isinstance(step, Step) else Step(step)


@lru_cache(maxsize=4096)
def _found(opcode: str) -> tuple[str, Callable, tuple[str, ...]]:
    """The operation that models an opcode: its name, its function, and the modifiers that are left."""
    parts = opcode.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in OPERATIONS:
            return name, OPERATIONS[name], tuple(parts[length:])
    raise UnmodelledInstruction(f"the opcode {parts[0]} is not modelled")


def immediate_bits(operand: Immediate, view: str) -> int:
    """Bit pattern of a literal under a view.

    0f and 0d literals are converted to the view's float width when they are used as floats and are plain
    bits otherwise.
    """
    width = VIEWS[view][0]
    value = operand.value
    if view == "pred":
        return int(bool(value))
    if operand.bits and view in ("f32", "f64", "f16") and operand.bits != width:
        exact = struct.unpack(
            "<f" if operand.bits == 32 else "<d", value.to_bytes(operand.bits // 8, "little")
        )[0]
        return float_bits(exact, width)
    if isinstance(value, float):
        if view not in ("f16", "f32", "f64"):
            raise ParseError(f"the fraction {value} where an integer is needed")
        return float_bits(value, width)
    return value & (1 << width) - 1
