"""The CUDA functions that a compiled kernel's host code calls, from the CUDA runtime that torch loaded.

Host code calls `cudaX` by the name `_cudaX`, with the same arguments. Three functions are not part of
the CUDA runtime and are provided here: one that loads the kernels at the first call, one that undoes
it, one that turns an error code into a Python exception.

What Python asks of CUDA goes through cuda.pathfinder and cuda.bindings. ctypes is left for what these do not
give: addresses that machine code can jump to, into the very runtime that torch uses (cuda.bindings.runtime is
a CUDA runtime of its own, linked in), and functions of ours that machine code can call.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from ctypes import POINTER, c_char_p, c_int, c_int32, c_void_p
from pathlib import Path
from typing import Any

from . import cuda_devices
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
_INVALID_VALUE, _NOT_INITIALIZED = 1, 3  # CUDA_ERROR_...

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

    def _load_once(self, state: Any, init: Any, load: Any, set_error: Any) -> int:
        """Load the kernels on every visible device; wrong only if that fails on all of them."""
        with self._lock:
            if state[0]:
                return 0
            library = c_void_p(0)
            codes = [init(ctypes.byref(library))]
            if not codes[0]:
                try:
                    devices = cuda_devices.count()
                except RuntimeError as error:
                    set_error(b"RuntimeError", str(error).encode())
                    return -1
                codes = [load(ctypes.byref(library), device) for device in range(devices)] or codes
            if all(codes):
                set_error(b"RuntimeError", cuda_devices.runtime_error(codes[-1]).encode())
                return -1
            state[0] = library.value
            return 0

    def _kernel_get_attribute(self, value: int, attribute: int, kernel: int, device: int) -> int:
        """cuKernelGetAttribute is the driver's, which is there only where a GPU is."""
        from cuda.bindings import driver

        try:
            asked = driver.CUfunction_attribute(attribute), driver.CUkernel(kernel), driver.CUdevice(device)
            code, found = driver.cuKernelGetAttribute(*asked)
        except ValueError:
            return _INVALID_VALUE
        except RuntimeError:
            return _NOT_INITIALIZED
        if not code.value:
            c_int.from_address(value).value = found
        return code.value

    def _set_raised_error(self, set_parts: Any, code: int) -> None:
        set_parts(b"RuntimeError", (c_char_p * 1)(cuda_devices.runtime_error(code).encode()), 1)


@functools.cache
def symbols() -> dict[str, int]:
    """`CudaRuntime.symbols` of the CUDA runtime that torch uses in this process."""
    return _runtime().symbols


@functools.cache
def _runtime() -> CudaRuntime:
    return CudaRuntime(ctypes.CDLL(library_of_torch()))


def library_of_torch() -> str:
    """The path, or the name, of the CUDA runtime that torch uses, loaded or to be loaded."""
    import torch
    from cuda import pathfinder

    if torch.version.cuda is None:
        raise RuntimeError("this torch is built without CUDA: its tensors cannot lie on a GPU")
    name = f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
    try:
        found = pathfinder.load_nvidia_dynamic_lib("cudart").abs_path
    except pathfinder.DynamicLibNotFoundError:
        return name
    # Beside a CUDA 13 in the same process or on the same system, torch's CUDA 12 is not what is found.
    return found if f"{Path(found).name}.".startswith(f"{name}.") else name
