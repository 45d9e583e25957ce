"""flash-attn-4's forward kernels, compiled for any target without a GPU, to be measured beside ours.

    peer = compiled(Case("d64", (1024,), (1024,)), "sm_90a")    its machine code, PTX, and launch
    python -m profiling.flash_attn_4 DIRECTORY                  the fresh process that `compiled` starts

What is compiled and how its launch is described is tests/peers/flash_attn_4.py's; here it is given other
targets, and figures for a GPU that is not there. Results are kept beside the project's own kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tvm_ffi

from cute_flash import cache, objectfile
from cute_flash.dispatch import EMULATED
from cute_flash.emulator.execution.launch import Driver, View
from tests.peers import flash_attn_4
from tests.peers.flash_attn_4 import Case, Kernel

from . import sass

NAME = "flash-attn-4"
_SHARED_MEMORY = {device.target: device.shared_memory for device in EMULATED.values()}
LARGEST_SHARED_MEMORY = max(_SHARED_MEMORY.values())

_REGISTER = re.compile(r"%r\d+\b")
_PACKED = re.compile(r"prmt\.b32\s+%r\d+, (%r\d+), (%r\d+), 0x3340U;")


class Missing(Exception):
    """The peer cannot be had; the message says why, in a few words."""


@dataclass(frozen=True)
class Shape:
    """A launch as host code asks for it. shared_memory: dynamic bytes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


@dataclass(frozen=True)
class Peer:
    """A compiled kernel of the peer."""

    kernel: Kernel
    cubin: bytes
    shape: Shape


@functools.cache
def version() -> str:
    """Version of the installed package. Raises Missing where there is none."""
    try:
        if importlib.util.find_spec("flash_attn.cute") is not None:
            return metadata.version(NAME)
    except (ModuleNotFoundError, metadata.PackageNotFoundError):
        pass
    raise Missing("not installed")


@functools.cache
def compiled(case: Case, target: str) -> Peer:
    """The kernel that its interface chooses for `case` on `target`. Raises Missing where it has none."""
    prepare([case], target)
    stem = directory_of(target) / _kept(case).name
    if (refusal := stem.with_suffix(".refused")).exists():
        raise Missing(f"does not compile for {target}: {refusal.read_text()}")
    kernel = Kernel.load(case, stem)
    shape = launch_shape(kernel, tensors(case))
    if shape.shared_memory > (has := _SHARED_MEMORY.get(target, LARGEST_SHARED_MEMORY)):
        raise Missing(f"asks for {shape.shared_memory} bytes of shared memory, {target} has {has}")
    return Peer(kernel, sass.embedded_cubin(kernel.object_file.read_bytes()), shape)


def prepare(cases: Iterable[Case], target: str) -> None:
    """Compile what is not there yet, all in one process. Raises Missing where that process dies."""
    directory = directory_of(target)
    directory.mkdir(parents=True, exist_ok=True)
    found = {path.stem for pattern in ("*.json", "*.refused") for path in directory.glob(pattern)}
    todo = [asdict(kept) for kept in map(_kept, cases) if kept.name not in found]
    if not todo:
        return
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(directory)], input=json.dumps(todo),
        env=flash_attn_4.environment(target, directory), text=True, capture_output=True,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise Missing(f"its compiler died for {target}: {lines[-1] if lines else done.returncode}")


def directory_of(target: str, *more: str) -> Path:
    """Where compiled kernels are kept; named after all that decides what they are, the case apart.

    more: files that do besides the forward kernels'.
    """
    sources = [Path(file).read_text() for file in (__file__, flash_attn_4.__file__, *more)]
    digest = hashlib.sha256(repr((version(), cache.versions(), sources)).encode()).hexdigest()
    kept = cache.cache_directory() or Path(tempfile.gettempdir())
    return kept / f"flash_attn_4-{version()}-{digest[:12]}" / target


def _kept(case: Case) -> Case:
    """The case under the name that its files have."""
    return replace(case, name=f"{case.name}-{hashlib.sha256(repr(case).encode()).hexdigest()[:8]}")


def launch_shape(kernel: Kernel, operands: dict[str, torch.Tensor]) -> Shape:
    """Grid, block and dynamic shared memory of the kernel's one launch, read from its host code."""
    shapes: list[Shape] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint32), ctypes.c_void_p, ctypes.c_void_p)
    def record(config, _kernel, _arguments) -> int:
        # cudaLaunchConfig_t: grid and block, three 32-bit words each, then 64 bits of shared memory
        words = config[:8]
        shapes.append(Shape(tuple(words[:3]), tuple(words[3:6]), words[6] | words[7] << 32))
        return 0

    entries = set(re.findall(r"\.entry\s+([\w$]+)", kernel.ptx))
    program = SimpleNamespace(entries=entries, code=lambda name: SimpleNamespace(shared_static=0))
    driver = Driver(program, LARGEST_SHARED_MEMORY)
    silent = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(lambda text: 0)
    own = {"_cudaLaunchKernelEx": record, "printf": silent}
    symbols = driver.symbols | {name: objectfile.address_of(function) for name, function in own.items()}
    call(kernel, driver, symbols, operands, SimpleNamespace())
    if len(shapes) != 1:
        raise Missing(f"one launch expected, found {len(shapes)}")
    return shapes[0]


def defined(ptx: str) -> str:
    """The PTX with zeros in registers that one prmt reads and nothing writes.

    Address arithmetic packs two bytes and two of no meaning for a dp2a, which looks at the first two. The
    emulator knows registers only whole.
    """
    times = Counter(_REGISTER.findall(ptx))

    def filled(line: re.Match) -> str:
        zeros = (f"mov.b32 {name}, 0;" for name in line.groups() if times[name] == 1)
        return " ".join([*zeros, line[0]])

    return _PACKED.sub(filled, ptx)


def tensors_of(case: Case, seqlen_q: int, seqlen_k: int) -> dict[str, torch.Tensor]:
    """Operands of a case with other lengths."""
    return tensors(replace(case, seqlens_q=(seqlen_q,), seqlens_k=(seqlen_k,)))


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """Operands of a case, the inputs normal."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (shape, dtype) in case.shapes().items():
        if name in ("q", "k", "v", "dout"):
            made[name] = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        else:
            made[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
    return made


def call(
    kernel: Kernel,
    driver: Driver,
    symbols: Mapping[str, int],
    operands: dict[str, torch.Tensor],
    options: Any,
) -> list[Any]:
    """Run the peer's host code on `operands`; the reports of its launches on the emulator.

    symbols: the driver's, or others in their place.
    """
    function = objectfile.load(kernel.object_file.read_bytes(), "func", symbols)
    views = {name: View(tensor, name) for name, tensor in operands.items()}
    passed = {name: tvm_ffi.from_dlpack(view) for name, view in views.items()}
    arguments = flash_attn_4.resolved(kernel.arguments, passed, operands["q"].shape[1])
    return driver.call(function, views.values(), arguments, options)


def _record() -> None:
    """Body of the fresh process: `DIRECTORY` on the command line, cases on standard input."""
    directory = Path(sys.argv[1])
    for case in map(Case.read, json.load(sys.stdin)):
        try:
            flash_attn_4.record([case], directory)
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            (directory / f"{case.name}.refused").write_text(words[:300])


if __name__ == "__main__":
    _record()
