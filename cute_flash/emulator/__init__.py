"""A PTX machine in Python and numpy: executes what the CuTe DSL compiles, strictly, on host memory.

    kernel = cute_kernel(compiled, arch="sm_90a")     what cute.compile returned, for any kernel
    print(kernel.examine(x, out))                     many orders of events, and a verdict

    program = Program(ptx_text)                       or PTX alone, launched by hand
    memory = GlobalMemory()
    memory.add(x.ctypes.data, x.nbytes, "x")
    params = x.ctypes.data.to_bytes(8, "little")
    report = run(program, Launch(entry, grid=(1, 1, 1), block=(32, 1, 1), params=params), memory)

See README.md beside this file.
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
from .front.kernel import CuteKernel, cute_kernel
from .front.portfolio import PORTFOLIO, Verdict, orders

__all__ = [
    "PORTFOLIO",
    "BarrierError",
    "CuteKernel",
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
    "Verdict",
    "WarpgroupError",
    "cute_kernel",
    "orders",
    "run",
]
