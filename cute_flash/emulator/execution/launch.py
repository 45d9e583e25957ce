"""The driver boundary: a compiled kernel's own host code runs unmodified, and its launches land here.

Host code calls about ten functions of the CUDA runtime. `Driver.symbols` holds addresses of stand-ins
for them; the stand-in for the launch reads grid, block, shared memory and parameters from C memory,
as a driver would, and hands them to the emulator. `View` presents host memory as memory of a GPU.
An exception raised below a C frame cannot pass through it: it is kept and raised again behind it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterable
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import Any

from ..base.errors import EmulatorError
from ..base.options import Launch, Options
from ..core.memory import GlobalMemory
from ..units import tensor_map
from . import cubin
from .execute import run
from .program import Entry, Program

_OK, _INVALID_VALUE, _UNKNOWN = 0, 1, 999  # cudaError_t

# cudaDeviceAttr, cudaFuncAttribute and cudaLaunchAttributeID as far as host code uses them
_MAX_SHARED_MEMORY_OPTIN = 97
_STATIC_SHARED_MEMORY, _MAX_DYNAMIC_SHARED_MEMORY, _NON_PORTABLE_CLUSTER = 1, 8, 14
_COOPERATIVE, _CLUSTER, _PROGRAMMATIC_SERIALIZATION = 2, 4, 6
_DEFAULT_SHARED_MEMORY = 48 * 1024
_MAX_GRID = (2**31 - 1, 65535, 65535)
_MAX_THREADS = 1024


class _Attribute(ctypes.Structure):
    """cudaLaunchAttribute."""

    _fields_ = [("id", c_uint32), ("padding", c_uint32), ("value", c_uint32 * 16)]


class _Config(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = [
        ("grid", c_uint32 * 3), ("block", c_uint32 * 3), ("shared_memory", c_uint64), ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)), ("num_attributes", c_uint32),
    ]


class Driver:
    """What one compiled kernel's host code takes for the CUDA runtime.

    program: the PTX of the kernels that the host code launches. shared_memory: bytes per block that
    a kernel may opt in to. `symbols` maps each function's name to its address; the addresses are valid
    as long as this object lives.
    """

    def __init__(self, program: Program, shared_memory: int) -> None:
        self._program = program
        self._shared_memory = shared_memory
        self._entries: list[str] = []
        self._limits: list[int] = []
        self._images: list[int] = []
        self._now = threading.local()
        self._callbacks = {name: make(self) for name, make in _STANDINS.items()}
        self.symbols = {
            name: ctypes.cast(callback, c_void_p).value or 0 for name, callback in self._callbacks.items()
        }

    def call(self, function: Callable, tensors: Iterable[View], args: tuple, options: Options) -> list[Any]:
        """Call host code on `args`; the kernels it launches may touch the memory of `tensors` only.

        Returns the report of each launch. Raises what the emulator raised, with its own type.
        """
        memory = GlobalMemory()
        for tensor in tensors:
            memory.add(tensor.address, tensor.nbytes, tensor.name)
        self._now.memory, self._now.options = memory, options
        self._now.reports, self._now.error = [], None
        try:
            function(*args)
        except Exception:
            if self._now.error is None:
                raise
        if self._now.error is not None:
            raise self._now.error
        return self._now.reports

    def library_load_data(self, library, image, *_) -> int:
        library[0] = image
        return _OK

    def library_get_kernel(self, kernel, library, name) -> int:
        entry = name.decode()
        if entry not in self._program.entries:
            raise EmulatorError(f"no entry {entry} in the PTX; it has {', '.join(self._program.entries)}")
        self._entries.append(entry)
        self._limits.append(_DEFAULT_SHARED_MEMORY)
        self._images.append(library)
        kernel[0] = len(self._entries)
        return _OK

    def device_get_attribute(self, value, attribute, _device) -> int:
        if attribute != _MAX_SHARED_MEMORY_OPTIN:
            raise EmulatorError(f"host code asks for device attribute {attribute}, which is not modelled")
        value[0] = self._shared_memory
        return _OK

    def kernel_get_attribute(self, value, attribute, kernel, _device) -> int:
        if attribute != _STATIC_SHARED_MEMORY:
            raise EmulatorError(f"host code asks for kernel attribute {attribute}, which is not modelled")
        value[0] = self._program.code(self._entries[kernel - 1]).shared_static
        return _OK

    def func_set_attribute(self, kernel, attribute, value) -> int:
        if attribute == _MAX_DYNAMIC_SHARED_MEMORY:
            self._limits[kernel - 1] = value
        elif attribute != _NON_PORTABLE_CLUSTER:
            raise EmulatorError(f"host code sets kernel attribute {attribute}, which is not modelled")
        return _OK

    def kernel_set_attribute(self, kernel, attribute, value, _device) -> int:
        return self.func_set_attribute(kernel, attribute, value)

    def get_device(self, device) -> int:
        device[0] = 0
        return _OK

    def set_device(self, device) -> int:
        return _OK if device == 0 else _INVALID_VALUE

    def init_once(self, state, init, load, _set_error) -> int:
        if not state[0]:
            library = c_void_p(0)
            code = init(ctypes.byref(library)) or load(ctypes.byref(library), 0)
            if code:
                return -1
            state[0] = library.value
        return _OK

    def tensor_map_encode_tiled(self, words, data_type, rank, address, *layout) -> int:
        """cuTensorMapEncodeTiled of the driver; the promotion to L2 has no effect on results."""
        sizes, strides, box, steps, interleave, swizzle, _, fill = layout
        if interleave or fill or any(step != 1 for step in steps[:rank]):
            text = f"interleave {interleave}, element strides {steps[:rank]}, fill {fill}"
            raise EmulatorError(f"host code encodes a tensor map with {text}, which is not modelled")
        shape = tuple(sizes[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank])
        try:
            ctypes.memmove(words, tensor_map.encode(data_type, address or 0, *shape, swizzle), 128)
        except ValueError:
            return _INVALID_VALUE
        return _OK

    def assert_success(self, code) -> None:
        """What host code calls with the result of a driver's function that must not fail."""
        if code:
            raise EmulatorError(f"a function of the emulated driver that must not fail returned {code}")

    def set_error(self, set_parts, code) -> None:
        parts = (c_char_p * 1)(f"CUDA error {code} from the emulated driver".encode())
        set_parts(b"RuntimeError", parts, 1)

    def _registers(self, number: int) -> int | None:
        """Registers per thread of a kernel that moves them; others do not need to know."""
        entry = self._entries[number]
        instructions = self._program.module.entries[entry].instructions
        moves = any(instruction.opcode.startswith("setmaxnreg") for instruction in instructions)
        return cubin.registers(cubin.image(self._images[number]), entry) if moves else None

    def launch(self, config, kernel, args) -> int:
        config, entry = config.contents, self._entries[kernel - 1]
        cluster = _cluster(config)
        grid, block = tuple(config.grid), tuple(config.block)
        _check_limits(entry, grid, block, config.shared_memory, self._limits[kernel - 1])
        launch = Launch(
            entry=entry, grid=grid, block=block, cluster=cluster, shared_memory=config.shared_memory,
            params=_parameters(self._program.entries[entry], args), registers=self._registers(kernel - 1),
        )
        report = run(self._program, launch, self._now.memory, self._now.options)
        self._now.reports.append(report)
        return _OK


def _standin(result: Any, arguments: tuple, method: Callable) -> Callable[[Driver], Any]:
    """A maker of C functions that call `method` of a driver and keep what it raises."""
    prototype = ctypes.CFUNCTYPE(result, *arguments)

    def make(driver: Driver) -> Any:
        def call(*args):
            try:
                return method(driver, *args)
            except BaseException as error:
                # The first error counts: what host code does after it may fail in consequence.
                driver._now.error = getattr(driver._now, "error", None) or error
                return None if result is None else _UNKNOWN

        return prototype(call)

    return make


_INIT = ctypes.CFUNCTYPE(c_int, c_void_p)
_LOAD = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)
_SET_PARTS = ctypes.CFUNCTYPE(None, c_char_p, POINTER(c_char_p), c_int32)

# The handle of a kernel is its number from 1; that of a library the address of its image.
_STANDINS = {
    "_cudaLibraryLoadData": _standin(
        c_int, (POINTER(c_void_p), c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int),
        Driver.library_load_data,
    ),
    "_cudaLibraryGetKernel": _standin(
        c_int, (POINTER(c_void_p), c_void_p, c_char_p), Driver.library_get_kernel
    ),
    "_cudaGetDevice": _standin(c_int, (POINTER(c_int),), Driver.get_device),
    "_cudaSetDevice": _standin(c_int, (c_int,), Driver.set_device),
    "_cudaDeviceGetAttribute": _standin(
        c_int, (POINTER(c_int), c_int, c_int), Driver.device_get_attribute
    ),
    "_cuKernelGetAttribute": _standin(
        c_int, (POINTER(c_int), c_int, c_void_p, c_int), Driver.kernel_get_attribute
    ),
    "_cudaFuncSetAttribute": _standin(c_int, (c_void_p, c_int, c_int), Driver.func_set_attribute),
    "_cudaKernelSetAttributeForDevice": _standin(
        c_int, (c_void_p, c_int, c_int, c_int), Driver.kernel_set_attribute
    ),
    "_cudaLaunchKernelEx": _standin(
        c_int, (POINTER(_Config), c_void_p, POINTER(c_void_p)), Driver.launch
    ),
    "_cuTensorMapEncodeTiled": _standin(
        c_int,
        (c_void_p, c_int, c_uint32, c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint32),
         POINTER(c_uint32), c_int, c_int, c_int, c_int),
        Driver.tensor_map_encode_tiled,
    ),
    "cuda_dialect_assert_success": _standin(None, (c_int,), Driver.assert_success),
    "cuda_dialect_init_library_once": _standin(
        c_int, (POINTER(c_void_p), _INIT, _LOAD, c_void_p), Driver.init_once
    ),
    "cuda_dialect_unload_library_once": _standin(None, (c_void_p,), lambda driver, state: None),
    "CuteDSLRT_TVMFFISetRaisedCudaError": _standin(None, (_SET_PARTS, c_int32), Driver.set_error),
}


def _cluster(config: _Config) -> tuple[int, int, int]:
    cluster = (1, 1, 1)
    for attribute in config.attributes[:config.num_attributes]:
        if attribute.id == _CLUSTER:
            cluster = tuple(attribute.value[:3])
        elif attribute.id not in (_COOPERATIVE, _PROGRAMMATIC_SERIALIZATION):
            raise EmulatorError(f"launch attribute {attribute.id} is not modelled")
    return cluster


def _check_limits(entry: str, grid: tuple, block: tuple, shared_memory: int, allowed: int) -> None:
    """What a driver refuses to launch."""
    if not all(0 < size <= limit for size, limit in zip(grid, _MAX_GRID, strict=True)):
        raise EmulatorError(f"{entry}: grid {grid} is not within 1…{_MAX_GRID}")
    if not 0 < math.prod(block) <= _MAX_THREADS:
        threads = math.prod(block)
        raise EmulatorError(f"{entry}: block {block} has {threads} threads, allowed 1…{_MAX_THREADS}")
    if shared_memory > allowed:
        raise EmulatorError(
            f"{entry}: {shared_memory} bytes of dynamic shared memory asked, {allowed} allowed"
        )


def _parameters(entry: Entry, args: Any) -> bytes:
    """The parameter block; args[i] points at the i-th parameter."""
    block = bytearray(entry.param_bytes)
    for index, ((_, size, _), offset) in enumerate(zip(entry.params, entry.offsets, strict=True)):
        block[offset:offset + size] = ctypes.string_at(args[index], size)
    return bytes(block)


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
        ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16),
        ("shape", POINTER(c_int64)), ("strides", POINTER(c_int64)), ("byte_offset", c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", c_void_p), ("deleter", c_void_p)]


_CUDA = 2  # kDLCUDA
# DLPack's type code and bits, by the last word of the dtype's name
_DTYPES = {
    "float16": (2, 16), "bfloat16": (4, 16), "float32": (2, 32), "float64": (2, 64),
    "int8": (0, 8), "int16": (0, 16), "int32": (0, 32), "int64": (0, 64), "bool": (6, 8),
    "uint8": (1, 8), "uint16": (1, 16), "uint32": (1, 32), "uint64": (1, 64),
    "float8_e4m3fn": (10, 8), "float8_e5m2": (12, 8), "float8_e8m0fnu": (14, 8),
}


class View:
    """A tensor in host memory that says, by DLPack, that it lies on the first GPU.

    tensor: anything with torch's `data_ptr()`, `shape`, `stride()` and `dtype`; it must outlive what is
    made of the view. address, nbytes: what the tensor reaches, from its first element to its last.
    """

    def __init__(self, tensor: Any, name: str) -> None:
        self.name = name
        self.tensor = tensor
        self.address = tensor.data_ptr()
        dtype = str(tensor.dtype).rpartition(".")[2]
        if dtype not in _DTYPES:
            raise TypeError(f"{name}: dtype {dtype} is not one of {', '.join(_DTYPES)}")
        self._dtype = _DTYPES[dtype]
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.nbytes = 0 if 0 in tensor.shape else span * self._dtype[1] // 8

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        """A capsule whose memory is C's own: its deleter is `free`, which can run after Python, too."""
        rank, head = len(self.tensor.shape), ctypes.sizeof(_DLManagedTensor)
        address = _libc().malloc(head + 2 * rank * ctypes.sizeof(c_int64))
        sizes, strides = ((c_int64 * rank).from_address(address + head + i * 8 * rank) for i in range(2))
        sizes[:], strides[:] = self.tensor.shape, self.tensor.stride()
        managed = _DLManagedTensor.from_address(address)
        pointers = ctypes.cast(sizes, POINTER(c_int64)), ctypes.cast(strides, POINTER(c_int64))
        managed.tensor = _DLTensor(self.address, _CUDA, 0, rank, *self._dtype, 1, *pointers, 0)
        managed.context, managed.deleter = None, ctypes.cast(_libc().free, c_void_p)
        return _new_capsule()(address, b"dltensor", None)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = c_void_p, (ctypes.c_size_t,)
    return libc


@functools.cache
def _new_capsule() -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)
    return new
