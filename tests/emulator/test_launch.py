"""The driver boundary: what host code may ask, what a launch hands over, and how errors come back."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_uint32, c_void_p, cast

import pytest
import torch

from cute_flash import emulator, objectfile
from cute_flash.emulator.execution import launch
from cute_flash.emulator.execution.launch import Driver, View
from cute_flash.emulator.units.tensor_map import decode

SHARED_MEMORY = 100_000
PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry fill(.param .b32 value, .param .b64 base, .param .align 8 .b8 pair[12])
{
  .reg .b32 %r<5>;
  .reg .b64 %rd<4>;
  ld.param.b32 %r1, [value];
  ld.param.b64 %rd1, [base];
  ld.param.b32 %r2, [pair+8];
  mov.u32 %r3, %tid.x;
  add.s32 %r4, %r1, %r2;
  mul.wide.u32 %rd2, %r3, 4;
  add.s64 %rd3, %rd1, %rd2;
  st.global.b32 [%rd3], %r4;
  ret;
}
"""
THREADS = 32


class Host:
    """Host code written by hand: the C functions of a driver, called as compiled host code calls them."""

    def __init__(self, ptx: str = PTX):
        self.driver = Driver(emulator.Program(ptx), SHARED_MEMORY)
        self.kernel = c_void_p()

    def c(self, name: str, *types: type):
        return ctypes.CFUNCTYPE(c_int, *types)(self.driver.symbols[name])

    def load(self, entry: bytes = b"fill") -> int:
        library = c_void_p()
        types = (POINTER(c_void_p), c_void_p, c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int)
        code = self.c("_cudaLibraryLoadData", *types)(byref(library), 1, None, None, 0, None, None, 0)
        get = self.c("_cudaLibraryGetKernel", POINTER(c_void_p), c_void_p, c_char_p)
        return code or get(byref(self.kernel), library, entry)

    def launch(self, address, grid=(1, 1, 1), block=(THREADS, 1, 1), shared_memory=0, attributes=()) -> int:
        value, base, pair = ctypes.c_int32(40), ctypes.c_uint64(address), (c_uint32 * 3)(0, 0, 2)
        arguments = (c_void_p * 3)(*[cast(byref(x), c_void_p) for x in (value, base, pair)])
        given = (launch._Attribute * max(len(attributes), 1))()
        for slot, (number, values) in zip(given, attributes, strict=False):
            slot.id = number
            slot.value[: len(values)] = values
        sizes = (c_uint32 * 3)(*grid), (c_uint32 * 3)(*block)
        config = launch._Config(*sizes, shared_memory, None, given, len(attributes))
        function = self.c("_cudaLaunchKernelEx", POINTER(launch._Config), c_void_p, POINTER(c_void_p))
        return function(byref(config), self.kernel, arguments)


def run(host: Host, tensor: torch.Tensor, **how):
    """Launch on a tensor; what the driver reports."""

    def code(*_):
        assert host.load() == 0
        host.launch(tensor.data_ptr(), **how)

    return host.driver.call(code, [View(tensor, "x")], (), emulator.Options())


def test_parameters_grid_and_memory_arrive():
    x = torch.zeros(THREADS + 1, dtype=torch.int32)
    (report,) = run(Host(), x[:-1])
    assert x.tolist() == [42] * THREADS + [0]
    assert report.opcodes["st.global.b32"] == 1


def test_memory_beyond_the_tensors_is_out_of_bounds():
    x = torch.zeros(THREADS, dtype=torch.int32)
    with pytest.raises(emulator.OutOfBounds, match="st.global"):
        run(Host(), x[:-1])


@pytest.mark.parametrize(
    "how, text",
    [
        ({"grid": (1, 65536, 1)}, r"grid \(1, 65536, 1\) is not within"),
        ({"grid": (0, 1, 1)}, r"grid \(0, 1, 1\) is not within"),
        ({"block": (1025, 1, 1)}, "has 1025 threads"),
        ({"shared_memory": 48 * 1024 + 1}, "49153 bytes of dynamic shared memory asked, 49152 allowed"),
        ({"attributes": [(11, (1,))]}, "launch attribute 11 is not modelled"),
        ({"attributes": [(4, (2, 1, 1))]}, "cluster"),
    ],
)
def test_what_a_driver_refuses(how, text):
    with pytest.raises(emulator.EmulatorError, match=text):
        run(Host(), torch.zeros(THREADS, dtype=torch.int32), **how)


def test_attributes_that_change_nothing_are_accepted():
    x = torch.zeros(THREADS, dtype=torch.int32)
    run(Host(), x, attributes=[(6, (0,)), (2, (0,)), (4, (1, 1, 1))])
    assert x[0] == 42


def test_a_kernel_may_opt_in_to_more_shared_memory():
    host, x = Host(), torch.zeros(THREADS, dtype=torch.int32)

    def code(*_):
        host.load()
        allowed = c_int()
        host.c("_cudaDeviceGetAttribute", POINTER(c_int), c_int, c_int)(byref(allowed), 97, 0)
        host.c("_cudaKernelSetAttributeForDevice", c_void_p, c_int, c_int, c_int)(host.kernel, 8, allowed, 0)
        host.launch(x.data_ptr(), shared_memory=SHARED_MEMORY)

    host.driver.call(code, [View(x, "x")], (), emulator.Options())
    assert x[0] == 42


@pytest.mark.parametrize(
    "name, types, arguments",
    [
        ("_cudaDeviceGetAttribute", (POINTER(c_int), c_int, c_int), (None, 16, 0)),
        ("_cuKernelGetAttribute", (POINTER(c_int), c_int, c_void_p, c_int), (None, 4, 1, 0)),
        ("_cudaFuncSetAttribute", (c_void_p, c_int, c_int), (1, 9, 0)),
    ],
)
def test_unknown_questions_are_errors(name, types, arguments):
    host = Host()

    def code(*_):
        host.load()
        assert host.c(name, *types)(*arguments) != 0

    with pytest.raises(emulator.EmulatorError, match="which is not modelled"):
        host.driver.call(code, [], (), emulator.Options())


def test_an_unknown_entry_is_named():
    host = Host()
    with pytest.raises(emulator.EmulatorError, match="no entry empty in the PTX; it has fill"):
        host.driver.call(lambda: host.load(b"empty"), [], (), emulator.Options())


def test_static_shared_memory_is_told():
    host = Host(PTX.replace(".reg .b32 %r<5>;", ".reg .b32 %r<5>; .shared .align 4 .b8 held[640];"))
    static = c_int(-1)
    host.load()
    host.c("_cuKernelGetAttribute", POINTER(c_int), c_int, c_void_p, c_int)(byref(static), 1, host.kernel, 0)
    assert static.value == 640


def test_one_device():
    host, device = Host(), c_int(-1)
    host.c("_cudaGetDevice", POINTER(c_int))(byref(device))
    assert device.value == 0
    assert host.c("_cudaSetDevice", c_int)(0) == 0
    assert host.c("_cudaSetDevice", c_int)(1) != 0


def test_an_exception_passes_below_c_frames_with_its_type():
    host = Host()

    def code(*_):
        host.load()
        host.launch(0)
        raise RuntimeError("what host code raises when a launch fails")

    with pytest.raises(emulator.OutOfBounds):
        host.driver.call(code, [], (), emulator.Options())

    def refusing(*_):
        raise ValueError("from host code itself")

    with pytest.raises(ValueError, match="from host code itself"):
        host.driver.call(refusing, [], (), emulator.Options())


def test_every_symbol_of_a_compiled_object_is_there():
    assert set(Host().driver.symbols) == {
        "_cudaLibraryLoadData", "_cudaLibraryGetKernel", "_cudaLaunchKernelEx", "_cudaGetDevice",
        "_cudaSetDevice", "_cudaDeviceGetAttribute", "_cudaFuncSetAttribute", "_cuKernelGetAttribute",
        "_cudaKernelSetAttributeForDevice", "cuda_dialect_init_library_once",
        "cuda_dialect_unload_library_once", "CuteDSLRT_TVMFFISetRaisedCudaError",
        "_cuTensorMapEncodeTiled", "cuda_dialect_assert_success",
    }  # fmt: skip
    assert all(Host().driver.symbols.values())


@pytest.mark.parametrize(
    "tensor, nbytes",
    [
        (torch.zeros(4, 6, dtype=torch.float16), 48),
        (torch.zeros(4, 6, dtype=torch.float16)[:, :2], 40),
        (torch.zeros(4, 6, dtype=torch.int64)[1:3, ::5], (6 + 5 + 1) * 8),
        (torch.zeros(3, dtype=torch.int32).expand(5, 3), 12),
        (torch.zeros(0, 6), 0),
    ],
)
def test_a_view_spans_what_the_tensor_reaches(tensor, nbytes):
    view = View(tensor, "x")
    assert view.nbytes == nbytes
    assert view.address == tensor.data_ptr()


@pytest.mark.parametrize(
    "dtype", ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float64"]
)
def test_a_view_has_the_dtype_of_its_tensor(dtype):
    import tvm_ffi

    held = torch.zeros(6, dtype=getattr(torch, dtype))
    assert str(tvm_ffi.from_dlpack(View(held, "x")).dtype) == dtype


def test_a_view_says_that_it_is_on_a_gpu():
    import tvm_ffi

    held = torch.zeros(4, 6, dtype=torch.bfloat16)[:, :4]
    taken = [tvm_ffi.from_dlpack(View(held, "x")) for _ in range(100)][-1]  # outlives its view
    assert str(taken.device) == "cuda:0" and str(taken.dtype) == "bfloat16"
    assert tuple(taken.shape) == (4, 4) and tuple(taken.strides) == (6, 1)


def test_a_view_of_an_unknown_dtype():
    with pytest.raises(TypeError, match="x: dtype complex64 is not one of float16"):
        View(torch.zeros(2, dtype=torch.complex64), "x")


def encode(host: Host, words, address, how: dict, strides=(64, 640)) -> int:
    """Call the driver's function for a tensor of 10 x 10 x 30 bf16 elements and boxes of 2 x 4 x 8."""
    given = {"rank": 3, "data_type": 9, "box": (8, 4, 2), "interleave": 0, "swizzle": 1, "fill": 0, **how}
    function = host.c(
        "_cuTensorMapEncodeTiled", c_void_p, c_int, c_uint32, c_void_p, *[POINTER(ctypes.c_uint64)] * 2,
        *[POINTER(c_uint32)] * 2, *[c_int] * 4,
    )  # fmt: skip
    sizes, steps = (ctypes.c_uint64 * 3)(30, 10, 10), (c_uint32 * 3)(1, 1, given.get("step", 1))
    return function(
        words, given["data_type"], given["rank"], address, sizes, (ctypes.c_uint64 * 2)(*strides),
        (c_uint32 * 3)(*given["box"]), steps, given["interleave"], given["swizzle"], 2, given["fill"],
    )  # fmt: skip


def test_host_code_may_let_the_driver_encode_a_tensor_map():
    words, address = ctypes.create_string_buffer(128), 0x7F00_1234_5600
    assert encode(Host(), words, address, {}, strides=(64, 1 << 37)) == 0
    found = decode(words.raw)
    assert (found.address, found.format, found.element, found.swizzle) == (address, "bf16", 2, 32)
    assert (found.sizes, found.strides, found.box) == ((30, 10, 10), (64, 1 << 37), (8, 4, 2))


@pytest.mark.parametrize(
    "how, strides",
    [
        ({"box": (8, 4, 257)}, (64, 640)),
        ({"box": (8, 0, 2)}, (64, 640)),
        ({"swizzle": 4}, (64, 640)),
        ({}, (68, 640)),
        ({}, (64, 1 << 40)),
    ],
)
def test_a_tensor_map_that_the_driver_refuses(how, strides):
    assert encode(Host(), ctypes.create_string_buffer(128), 256, how, strides) == 1


@pytest.mark.parametrize("how", [{"interleave": 1}, {"fill": 1}, {"step": 2}, {"data_type": 11}])
def test_a_tensor_map_without_a_model(how):
    host = Host()
    code = lambda: encode(host, ctypes.create_string_buffer(128), 256, how)  # noqa: E731
    with pytest.raises(emulator.EmulatorError, match="not modelled"):
        host.driver.call(lambda *_: code(), [], (), emulator.Options())


def test_a_failure_that_host_code_asserts_away_is_an_error():
    host = Host()
    succeed = ctypes.CFUNCTYPE(None, c_int)(host.driver.symbols["cuda_dialect_assert_success"])
    host.driver.call(lambda: succeed(0), [], (), emulator.Options())

    def fails():
        succeed(1)
        host.load(b"nothing of this name")

    with pytest.raises(emulator.EmulatorError, match="that must not fail returned 1"):
        host.driver.call(fails, [], (), emulator.Options())


def test_addresses_are_those_of_the_callbacks():
    assert objectfile.address_of(ctypes.CFUNCTYPE(c_int)(lambda: 0)) > 0
