"""Registers with one value for a whole run: written by one instruction, from literals.

NVVM's code is nearly in single-assignment form, so this finds what its constants were before they became
registers, such as the scale-d predicate of a product.
"""

from __future__ import annotations

from .operands import Immediate, Not, Pair, Register, Vector
from .parse import EntryText, Instruction


def known_predicate(entry: EntryText, operand: object) -> bool | None:
    """The value of a predicate operand, None where it is not known."""
    if isinstance(operand, Not):
        value = known_predicate(entry, operand.operand)
        return None if value is None else not value
    writer = _only_writer(entry, operand)
    if writer is None:
        return None
    name, *modifiers = writer.opcode.split(".")
    if name == "mov":
        value = known_integer(entry, writer.operands[1])
        return None if value is None else bool(value)
    if name != "setp" or modifiers[0] not in ("eq", "ne") or len(modifiers) != 2 or modifiers[1][0] == "f":
        return None
    values = [known_integer(entry, o) for o in writer.operands[1:]]
    if None in values or isinstance(writer.operands[0], Pair):
        return None
    return (values[0] == values[1]) == (modifiers[0] == "eq")


def known_integer(entry: EntryText, operand: object) -> int | None:
    """The value of an integer operand, None where it is not known."""
    if isinstance(operand, Immediate):
        return operand.value if isinstance(operand.value, int) else None
    writer = _only_writer(entry, operand)
    copied = writer is not None and writer.opcode.split(".")[0] == "mov"
    return known_integer(entry, writer.operands[1]) if copied else None


def _only_writer(entry: EntryText, register: object) -> Instruction | None:
    """The one instruction that writes a register; None where it is guarded or there are several."""
    if not isinstance(register, Register):
        return None
    if not entry.writers:
        for instruction in entry.instructions:
            for each in _first_operand(instruction):
                entry.writers.setdefault(each, []).append(instruction)
    writers = entry.writers.get(register, [])
    return writers[0] if len(writers) == 1 and writers[0].guard is None else None


def _first_operand(instruction: Instruction) -> list[Register]:
    """Registers in the first operand: the destinations, where the instruction has any."""
    first = instruction.operands[0] if instruction.operands else None
    items = first.items if isinstance(first, Vector) else (first,)
    parts = [p for item in items for p in ((item.first, item.second) if isinstance(item, Pair) else (item,))]
    return [part for part in parts if isinstance(part, Register)]
