"""A PTX machine in Python and numpy: executes what the CuTe DSL compiles, strictly, on host memory.

program = Program(ptx_text) memory = GlobalMemory(); memory.add(address, nbytes, "q") report = run(program,
Launch(entry, grid, block, shared_memory=n, params=block_bytes), memory, Options(races=True))
"""

from .base.errors import (
    BarrierError,
    DataRace,
    Deadlock,
    EmulatorError,
    Misaligned,
    OutOfBounds,
    ParseError,
    RegisterInFlight,
    TensorMemoryError,
    UndefinedRegister,
    UninitializedRead,
    UnmodelledInstruction,
    WarpgroupError,
)
from .base.options import Launch, Options, Report
from .core.memory import GlobalMemory
from .execution.execute import run
from .execution.program import Entry, Program

__all__ = [
    "BarrierError",
    "DataRace",
    "Deadlock",
    "EmulatorError",
    "Entry",
    "GlobalMemory",
    "Launch",
    "Misaligned",
    "Options",
    "OutOfBounds",
    "ParseError",
    "Program",
    "RegisterInFlight",
    "Report",
    "TensorMemoryError",
    "UndefinedRegister",
    "UninitializedRead",
    "UnmodelledInstruction",
    "WarpgroupError",
    "run",
]
