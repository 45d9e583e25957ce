"""A program: parsed, translated once into steps, and its variables given places."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from .. import ops
from ..base.errors import EmulatorError, UnmodelledInstruction
from ..core.code import CONTROL, CONVERGED, PLAIN, Code, Step
from ..ptx.contract import contracted
from ..ptx.parse import EntryText, Instruction, Variable, parse
from ..translate.analysis import Definedness, check_guard, is_branch, watch_registers
from ..translate.load_flight import LoadFlight
from ..translate.register_flight import RegisterFlight
from ..translate.translation import Operation, Translation

# Instructions that do nothing but write registers: if nobody uses the result, undefined sources do no harm.
ONLY_REGISTERS = tuple(m.__name__ for m in (ops.arith, ops.bits, ops.compare, ops.convert, ops.floating))
RESERVED_SHARED = 1024  # bytes at the start of shared memory that belong to the system from sm_90 on


@dataclass(frozen=True)
class Entry:
    """A kernel's interface. params: (name, size, alignment) in order; param_bytes: size of its parameter
    block.
    """

    params: tuple[tuple[str, int, int], ...]
    offsets: tuple[int, ...]
    param_bytes: int
    directives: dict[str, tuple[int, ...]]


class Program:
    """PTX text, ready to run.

    Raises ParseError or UnmodelledInstruction, with the PTX line, for anything in any entry that has no
    model.
    """

    def __init__(self, text: str):
        self.text = text
        with without_collection():
            self.module = parse(text)
        self.target = self.module.target
        self.storage: dict[str, np.ndarray] = {}
        self.entries = {name: _interface(entry) for name, entry in self.module.entries.items()}
        self._code: dict[tuple[str, bool], Code] = {}
        for name in self.entries:
            self.code(name)

    @functools.cached_property
    def contracted(self) -> Program:
        """The program with the products fused that ptxas fuses."""
        return Program(contracted(self.text))

    def code(self, name: str, permissive: bool = False) -> Code:
        """The executable form of an entry; KeyError names the entries there are."""
        if name not in self.entries:
            raise KeyError(f"no entry {name}; this program has {', '.join(self.entries)}")
        if (name, permissive) not in self._code:
            with without_collection():
                self._code[name, permissive] = _translate(self, self.module.entries[name], permissive)
        return self._code[name, permissive]


@contextmanager
def without_collection() -> Iterator[None]:
    """Let Python's garbage collector rest: it would look at all objects that there are, again and again.

    A translated kernel is some 100,000 objects that stay; a collection in a process with torch takes longer.
    """
    active = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if active:
            gc.enable()


def _interface(entry: EntryText) -> Entry:
    at, offsets = 0, []
    for parameter in entry.params:
        at = -(-at // parameter.align) * parameter.align
        offsets.append(at)
        at += parameter.size
    params = tuple((p.name, p.size, p.align) for p in entry.params)
    return Entry(params, tuple(offsets), at, entry.directives)


def _place(variables: list[Variable], at: int) -> tuple[dict[str, int], int]:
    places = {}
    for variable in variables:
        at = -(-at // variable.align) * variable.align
        places[variable.name] = at
        at += variable.size
    return places, at


def _translate(program: Program, entry: EntryText, permissive: bool) -> Code:
    module = program.module
    translation = Translation(module, entry)
    variables = [*module.variables.values(), *entry.variables.values()]
    reserved = RESERVED_SHARED if translation.architecture() >= 90 else 0
    static = [v for v in variables if v.space == "shared" and v.size]
    dynamic = [v for v in variables if v.space == "shared" and not v.size]
    symbols, end = _place(static, reserved)
    align = max((v.align for v in dynamic), default=16)
    end = -(-end // align) * align if dynamic else end
    symbols |= {v.name: end for v in dynamic}
    places, local_bytes = _place([v for v in variables if v.space == "local"], 0)
    symbols |= places
    offsets = program.entries[entry.name].offsets
    symbols |= {p.name: offset for p, offset in zip(entry.params, offsets, strict=True)}
    for variable in variables:
        if variable.space in ("global", "const"):
            symbols[variable.name] = _storage(program, variable)
    steps = _steps(translation, entry.instructions, permissive)
    code = Code(
        steps, translation.layout, symbols, reserved, end - reserved, local_bytes, translation.shared_granule,
        translation.global_granule, frozenset(v.name for v in (*static, *dynamic)), entry.directives,
    )  # fmt: skip
    code.tensor_memory = translation.cta_group is not None
    code.runs = [step.run for step in steps]
    code.next_control = _next(steps, CONTROL)
    code.next_converged = _next(steps, CONVERGED)
    return code


def _storage(program: Program, variable: Variable) -> int:
    if variable.name not in program.storage:
        raw = np.zeros(variable.size + 256, np.uint8)
        start = -raw.ctypes.data % 256
        held = raw[start : start + variable.size]
        held[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
        program.storage[variable.name] = held
    return program.storage[variable.name].ctypes.data


def _next(steps: list[Step], kind: str) -> list[int]:
    table, following = [0] * len(steps), len(steps)
    for at in range(len(steps) - 1, -1, -1):
        if steps[at].kind == kind:
            following = at
        table[at] = following
    return table


def _steps(translation: Translation, instructions: list[Instruction], permissive: bool) -> list[Step]:
    """Translate every instruction, add the checks of registers, guards and folded runs, and link branches
    to steps.

    permissive: check what reaches memory or control, not what only reaches registers.
    """
    operations, steps = [], []
    for instruction in instructions:
        try:
            operation = Operation(translation, instruction)
            steps.append(operation.translate())
        except EmulatorError as error:
            raise error.at(instruction.line, instruction.text, instruction.source) from None
        operations.append(operation)
        if permissive and operation.function.__module__ in ONLY_REGISTERS and not operation.copies:
            operation.only_moves()
    if not steps or steps[-1].kind != CONTROL:
        raise UnmodelledInstruction("an entry that does not end in a branch, ret or exit")
    definedness = Definedness(operations)
    flags = {register: translation.layout.new_row(1) for register in definedness.tracked}
    for operation, step, needs in zip(operations, steps, definedness.needs, strict=True):
        step.where, step.instructions = operation.instruction, (operation.instruction,)
        watch_registers(operation, step, flags, needs)
    RegisterFlight(operations, definedness.starts, permissive).instrument(steps, translation.layout)
    LoadFlight(operations, definedness.starts).instrument(steps)
    return _link(translation, operations, steps, (set(definedness.starts), flags))


def _link(
    translation: Translation, operations: list[Operation], steps: list[Step], known: tuple[set[int], dict]
) -> list[Step]:
    """Lay the steps out: runs of mma become one step, a guard becomes part of its step or a branch before it.

    known: where blocks start, and the written-rows of tracked registers.
    """
    starts, flags = known
    linked: list[Step] = []
    i = 0
    while i < len(steps):
        translation.link.append(len(linked))
        step, instruction = steps[i], operations[i].instruction
        end = _end_of_run(operations, steps, i, starts)
        if end - i > 1:
            translation.link.extend([len(linked)] * (end - i - 1))
            linked.append(ops.mma.fold(steps[i:end]))
            i = end
            continue
        if instruction.guard is not None and not is_branch(instruction):
            if step.kind == PLAIN:
                run = ops.control.guarded(step.run, instruction.guard.row, instruction.guard_negated)
                step.run = check_guard(operations[i], run, flags, control=False)
            else:
                run = ops.control.skip(translation, instruction, i + 1)
                run = check_guard(operations[i], run, flags, control=True)
                linked.append(Step(run, CONTROL, where=instruction))
        linked.append(step)
        i += 1
    translation.link.append(len(linked))
    return linked


def _end_of_run(operations: list[Operation], steps: list[Step], i: int, starts: set[int]) -> int:
    """Where the run of foldable mma steps that starts at i ends (i + 1 when there is none)."""
    end = i
    while end < len(steps) and steps[end].multiply is not None and (end == i or end not in starts):
        if operations[end].instruction.guard is not None:
            break
        end += 1
    return max(end, i + 1)
