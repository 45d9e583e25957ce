"""Any kernel that the CuTe DSL compiled, called here with arrays in host memory.

    compiled = cute.compile(launch, *fakes, options="--gpu-arch sm_90a --enable-tvm-ffi --keep-ptx")
    kernel = emulator.cute_kernel(compiled, arch="sm_90a")
    print(kernel.examine(x, out))         # many orders of events, and a verdict
    (report,) = kernel(x, out)            # once; `out` holds the result

Its own host code runs, unmodified, and launches what it launches on a GPU.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ...objectfile import load
from ..base.options import Options, Report
from ..execution.launch import Driver, View
from ..execution.program import Program
from .portfolio import PORTFOLIO, Held, Verdict, examine

# Bytes of shared memory per block that a kernel may opt in to, by the number of its target.
SHARED_MEMORY = {
    80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 107: 232448,
    110: 232448, 120: 101376, 121: 101376,
}  # fmt: skip
FUNCTION = "kernel"


def cute_kernel(compiled: Any, arch: str | None = None) -> CuteKernel:
    """What `cute.compile` returned, as something that can be called without a GPU.

    compiled: made with the options --enable-tvm-ffi, so that its host code can be had, and --keep-ptx; with
    --generate-line-info (or CUTE_DSL_LINEINFO=1 in the environment) errors name the lines of its source.
    arch: what it must have been compiled for, as "sm90" or "sm_90a"; None accepts any. Raises ValueError
    where it was compiled otherwise, UnmodelledInstruction or ParseError for instructions without a model.
    """
    text = getattr(compiled, "__ptx__", None)
    if not text:
        raise ValueError(f"{type(compiled).__name__} has no PTX; compile with options='… --keep-ptx'")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.o"
        try:
            compiled.export_to_c(str(path), FUNCTION, export_only_tvm_ffi_symbols=True)
        except TypeError as error:
            raise ValueError(f"its host code is not for TVM-FFI ({error}); compile with "
                             "options='… --enable-tvm-ffi'") from error
        return CuteKernel(Program(text), path.read_bytes(), FUNCTION, arch, _names(compiled))


def _names(compiled: Any) -> tuple[str, ...]:
    """The operands' names, as far as the compiler tells."""
    signature = getattr(getattr(compiled, "execution_args", None), "signature", None)
    return tuple(signature.parameters) if signature else ()


class CuteKernel:
    """A compiled kernel: its PTX, and the host code that launches it.

    host: a relocatable ELF object that defines `__tvm_ffi_FUNCTION`. names: of the operands, for messages.
    """

    def __init__(
        self, program: Program, host: bytes, function: str, arch: str | None = None, names: Iterable[str] = ()
    ):
        number = int("".join(re.findall(r"\d", program.target)))
        if arch is not None and re.sub(r"\D", "", arch) != str(number):
            raise ValueError(f"arch is {arch!r}, but the kernel was compiled for {program.target}")
        if number not in SHARED_MEMORY:
            known = ", ".join(f"sm_{known}" for known in SHARED_MEMORY)
            raise ValueError(f"the kernel was compiled for {program.target}; known are {known}")
        self.program = program
        self._names = tuple(names)
        self._driver = Driver(program, SHARED_MEMORY[number])
        self._function = load(host, function, self._driver.symbols)

    def __call__(self, *operands: Any, how: str = "races", **options: Any) -> list[Report]:
        """Run once; the reports of its launches.

        operands: what the compiled function takes, in its order: CPU tensors of torch, arrays of numpy,
        numbers, None, tuples of these. how: options in words, see `Options.read`. options: of `Options`.
        Raises an EmulatorError that names the PTX line, and the source line where the PTX tells.
        """
        return self._run(self._bound(operands), Options.read(how, **options))

    def examine(
        self, *operands: Any, runs: Iterable[str] = PORTFOLIO, tolerance: float = 0.0,
        say: Callable[[str], None] | None = None,
    ) -> Verdict:  # fmt: skip
        """Run in many orders of events, from the same operands; what was found.

        runs: each one's options in words. tolerance: by how much, relative to the larger, results of two runs
        may differ before that counts as a find; for kernels that add in any order. say: told of each run.
        Leaves in the operands what the last run wrote.
        """
        bound = self._bound(operands)
        held = [Held(view) for view in bound[1]]
        return examine(lambda options: self._run(bound, options), held, runs, tolerance, say)

    def _run(self, bound: tuple[tuple, list[View]], options: Options) -> list[Report]:
        arguments, views = bound
        return self._driver.call(self._function, views, arguments, options)

    def _bound(self, operands: tuple) -> tuple[tuple, list[View]]:
        """The operands as host code takes them, and a view of each array."""
        from tvm_ffi import from_dlpack

        views: list[View] = []

        def argument(operand: Any, name: str) -> Any:
            if isinstance(operand, (tuple, list)):
                return tuple(argument(member, f"{name}[{i}]") for i, member in enumerate(operand))
            if isinstance(operand, np.ndarray):
                operand = HostArray(operand, name)
            if not hasattr(operand, "data_ptr"):
                return operand  # a number, None
            place = str(getattr(operand, "device", "cpu"))
            if place != "cpu":
                raise ValueError(f"{name} lies on {place}; the emulator runs on CPU tensors and numpy arrays")
            views.append(View(operand, name))
            return from_dlpack(views[-1])

        names = dict(enumerate(self._names))
        return tuple(argument(o, names.get(i, f"operand {i}")) for i, o in enumerate(operands)), views


class HostArray:
    """A numpy array with the words that `View` asks for. dtype: in place of the array's own, "bfloat16"."""

    def __init__(self, array: np.ndarray, name: str, dtype: str | None = None):
        if any(stride < 0 or stride % array.itemsize for stride in array.strides):
            allowed = f"multiples of its {array.itemsize} from 0"
            raise ValueError(f"{name} has strides of {array.strides} bytes; allowed: {allowed}")
        if not array.flags.writeable:
            raise ValueError(f"{name} is read-only; a kernel may write what it is given")
        self.array, self.shape, self.dtype = array, array.shape, dtype or array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)
