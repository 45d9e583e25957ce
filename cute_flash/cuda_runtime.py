"""The CUDA functions that a compiled kernel's host code calls, from the CUDA runtime that torch loaded.

Host code calls `cudaX` by the name `_cudaX`, with the same arguments. Three functions are not part of
the CUDA runtime and are provided here: one that loads the kernels at the first call, one that undoes
it, one that turns an error code into a Python exception.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from ctypes import POINTER, c_char_p, c_int, c_int32, c_void_p
from pathlib import Path
from typing import Any

from .objectfile import MachineCode, address_of

# The host code's name -> the runtime's. All of them exist since CUDA 12.8.
_FUNCTIONS = {
    "_cudaLibraryLoadData": "cudaLibraryLoadData",
    "_cudaLibraryGetKernel": "cudaLibraryGetKernel",
    "_cudaLaunchKernelEx": "cudaLaunchKernelExC",
    "_cudaGetDevice": "cudaGetDevice",
    "_cudaSetDevice": "cudaSetDevice",
    "_cudaDeviceGetAttribute": "cudaDeviceGetAttribute",
    "_cudaFuncSetAttribute": "cudaFuncSetAttribute",
    "_cudaKernelSetAttributeForDevice": "cudaKernelSetAttributeForDevice",
}
_NOT_INITIALIZED = 3  # cudaErrorInitializationError

_INIT = ctypes.CFUNCTYPE(c_int, c_void_p)
_LOAD = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)
_SET_ERROR = ctypes.CFUNCTYPE(c_int, c_char_p, c_char_p)
_SET_PARTS = ctypes.CFUNCTYPE(c_int, c_char_p, POINTER(c_char_p), c_int32)

# int once(void **state, ...): return 0 where *state is set, else go on at the address that follows.
# Host code asks at every launch; entering Python each time would cost more than the launch.
_ONCE = bytes.fromhex(
    "48833f00"  # cmp qword ptr [rdi], 0
    "7403"  # je +3
    "31c0"  # xor eax, eax
    "c3"  # ret
    "48b8"  # movabs rax, <address>
)
_JUMP = bytes.fromhex("ffe0")  # jmp rax


class CudaRuntime:
    """`symbols`: the address of everything that host code needs; valid as long as this object lives."""

    def __init__(self, library: Any) -> None:
        """library: the CUDA runtime, libcudart.so.12 or .13, as ctypes loads it."""
        self._runtime = library
        missing = [name for name in _FUNCTIONS.values() if not hasattr(self._runtime, name)]
        if missing:
            raise RuntimeError(
                f"{library._name} has no {', '.join(missing)}: torch must be built with CUDA 12.8 or newer"
            )
        for name in ("cudaGetErrorName", "cudaGetErrorString"):
            getattr(self._runtime, name).restype = c_char_p
        self._lock = threading.Lock()
        self._callbacks = {
            "_cuKernelGetAttribute": ctypes.CFUNCTYPE(c_int, c_void_p, c_int, c_void_p, c_int)(
                self._kernel_get_attribute
            ),
            "cuda_dialect_unload_library_once": ctypes.CFUNCTYPE(None, c_void_p)(lambda state: None),
            "CuteDSLRT_TVMFFISetRaisedCudaError": ctypes.CFUNCTYPE(None, _SET_PARTS, c_int32)(
                self._set_raised_error
            ),
        }
        self._first = ctypes.CFUNCTYPE(c_int, POINTER(c_void_p), _INIT, _LOAD, _SET_ERROR)(self._load_once)
        self._once = MachineCode(_ONCE + address_of(self._first).to_bytes(8, "little") + _JUMP)
        self.symbols = {name: address_of(getattr(self._runtime, own)) for name, own in _FUNCTIONS.items()}
        self.symbols |= {name: address_of(callback) for name, callback in self._callbacks.items()}
        self.symbols["cuda_dialect_init_library_once"] = self._once.address

    def describe(self, code: int) -> str:
        """An error code as a sentence."""
        name, text = self._runtime.cudaGetErrorName(code), self._runtime.cudaGetErrorString(code)
        return f"CUDA error {code} ({name.decode()}): {text.decode()}"

    def _load_once(self, state: Any, init: Any, load: Any, set_error: Any) -> int:
        """Load the kernels on every visible device; wrong only if that fails on all of them."""
        with self._lock:
            if state[0]:
                return 0
            library, count = c_void_p(0), c_int(0)
            codes = [init(ctypes.byref(library))]
            if not codes[0]:
                codes = [self._runtime.cudaGetDeviceCount(ctypes.byref(count))]
            if not codes[0] and count.value:
                codes = [load(ctypes.byref(library), device) for device in range(count.value)]
            if all(codes):
                set_error(b"RuntimeError", self.describe(codes[-1]).encode())
                return -1
            state[0] = library.value
            return 0

    def _kernel_get_attribute(self, value: int, attribute: int, kernel: int, device: int) -> int:
        """cuKernelGetAttribute is the driver's, which is there only where a GPU is."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return _NOT_INITIALIZED
        return driver.cuKernelGetAttribute(c_void_p(value), attribute, c_void_p(kernel), device)

    def _set_raised_error(self, set_parts: Any, code: int) -> None:
        set_parts(b"RuntimeError", (c_char_p * 1)(self.describe(code).encode()), 1)


@functools.cache
def symbols() -> dict[str, int]:
    """`CudaRuntime.symbols` of the CUDA runtime that torch uses in this process."""
    return _runtime().symbols


@functools.cache
def _runtime() -> CudaRuntime:
    return CudaRuntime(ctypes.CDLL(_loaded_library() or _library_of_torch()))


def _loaded_library() -> str | None:
    """Path of the libcudart that this process has loaded, if any."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if Path(path).name.startswith("libcudart.so"):
            return f"/{path}"
    return None


def _library_of_torch() -> str:
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA: its tensors cannot lie on a GPU")
    return f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
