"""What the emulator raises. Every message ends with the PTX line, and where they are known with CTA, warp and
lane, and with the line of the kernel's source.
"""

from __future__ import annotations

import linecache


class EmulatorError(RuntimeError):
    """Anything the emulator refuses. `line` is the PTX line number (None while it is unknown), `source` the
    line of the kernel's source, "path:number" ("" where it is unknown).
    """

    line: int | None = None
    source: str = ""

    def at(self, line: int, text: str, source: str = "") -> EmulatorError:
        """The same error with its place in the message; the first place named stays."""
        if self.line is None:
            self.line, self.source = line, source
            came = f"\n  from {source}{_quoted(source)}" if source else ""
            self.args = (f"{self.args[0]}\n  at PTX line {line}: {text}{came}",)
        return self


def _quoted(source: str) -> str:
    """A line of source as an end of a message; "" where the file is not there."""
    path, _, number = source.rpartition(":")
    text = linecache.getline(path, int(number)).strip()
    return f": {text}" if text else ""


class ParseError(EmulatorError):
    """The text is not PTX as this parser knows it."""


class UnmodelledInstruction(EmulatorError):
    """An opcode, modifier, operand form or state space without a model. Raised when a program is
    translated.
    """


class OutOfBounds(EmulatorError):
    """An access outside every allocation of its space."""


class Misaligned(EmulatorError):
    """An address that is not a multiple of the access size."""


class UninitializedRead(EmulatorError):
    """A read of shared or local memory that nothing has written."""


class UndefinedRegister(EmulatorError):
    """A use of a register that no instruction has written on this thread's path."""


class Deadlock(EmulatorError):
    """Every thread that is left waits for something that cannot happen."""


class BarrierError(EmulatorError):
    """A barrier used with a wrong count or by the wrong warps."""


class TensorMemoryError(EmulatorError):
    """Tensor memory allocated, freed or reached in a way that hardware does not define."""


class DataRace(EmulatorError):
    """Two conflicting accesses to shared or tensor memory with no order between them."""


class RegisterInFlight(EmulatorError):
    """A register of an asynchronous product or load touched before the wait, or used without a fence."""


class WarpgroupError(EmulatorError):
    """The four warps of a warpgroup do not do the same, or are not all there."""
