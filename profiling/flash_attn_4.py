"""flash-attn-4's forward kernels, compiled for any target without a GPU, to be measured beside ours.

    peer = compiled(Case("d64", (1024,), (1024,)), "sm_90a")    its machine code, PTX, and launch
    python -m profiling.flash_attn_4 DIRECTORY                  the fresh process that `compiled` starts

What is compiled and how its launch is described is tests/peers/flash_attn_4.py's; here it is given other
targets, and figures for a GPU that is not there. Results are kept beside the project's own kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tvm_ffi

from cute_flash import cache, objectfile
from cute_flash.emulator.launch import Driver, View
from tests.peers import flash_attn_4
from tests.peers.flash_attn_4 import Case, Kernel

from . import sass

NAME = "flash-attn-4"
_SMS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90a": 132, "sm_100a": 148, "sm_120a": 170}
_L2_BYTES = 50 << 20
_SHARED_MEMORY = 232448  # more than any target's kernels ask for: launches are described, not executed


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
    kept = cache.cache_directory() or Path(tempfile.gettempdir())
    directory = kept / f"flash_attn_4-{version()}" / target
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / f"{case.name}.json").exists():
        _compile(case, target, directory)
    stem = directory / case.name
    arguments = json.loads(stem.with_suffix(".json").read_text())
    kernel = Kernel(case, stem.with_suffix(".ptx").read_text(), stem.with_suffix(".o"), arguments)
    return Peer(kernel, sass.embedded_cubin(kernel.object_file.read_bytes()), launch_shape(kernel))


def _compile(case: Case, target: str, directory: Path) -> None:
    environment = os.environ | {
        "CUTE_DSL_ARCH": target,
        "CUTE_DSL_KEEP": "ptx",
        "CUTE_DSL_DUMP_DIR": str(directory),
        "FLASH_ATTENTION_ARCH": target,
        "FLASH_ATTENTION_NUM_SMS": str(_SMS[target]),
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(directory), str(_SMS[target])],
        input=json.dumps([asdict(case)]), env=environment, text=True, capture_output=True,
    )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise Missing(f"does not compile for {target}: {lines[-1] if lines else done.returncode}")


def launch_shape(kernel: Kernel) -> Shape:
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
    driver = Driver(program, _SHARED_MEMORY)
    symbols = {**driver.symbols, "_cudaLaunchKernelEx": objectfile.address_of(record)}
    call(kernel, driver, symbols, tensors(kernel.case), SimpleNamespace())
    if len(shapes) != 1:
        raise Missing(f"one launch expected, found {len(shapes)}")
    return shapes[0]


def tensors(case: Case) -> dict[str, torch.Tensor]:
    """Operands of a case, the inputs normal."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (shape, dtype) in case.shapes().items():
        if name in ("q", "k", "v"):
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

    def argument(described: Any) -> Any:
        if isinstance(described, list):
            return tuple(map(argument, described))
        return tvm_ffi.from_dlpack(views[described["tensor"]]) if isinstance(described, dict) else described

    return driver.call(function, views.values(), tuple(map(argument, kernel.arguments)), options)


def _record() -> None:
    """Body of the fresh process: `DIRECTORY SMS` on the command line, cases on standard input."""
    from cutlass.utils import HardwareInfo

    sms = int(sys.argv.pop())
    HardwareInfo.__init__ = lambda self, *args, **kwargs: None  # it would load the driver
    HardwareInfo.get_max_active_clusters = lambda self, size, *args, **kwargs: sms // size
    HardwareInfo.get_device_multiprocessor_count = lambda self: sms
    HardwareInfo.get_l2_cache_size_in_bytes = lambda self: _L2_BYTES
    runpy.run_path(flash_attn_4.__file__, run_name="__main__")


if __name__ == "__main__":
    _record()
